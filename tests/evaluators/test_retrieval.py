import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax import config as configs
from mmjax.data import image
from mmjax.data.pipeline import evaluation_images
from mmjax.data.sources import open_source
from mmjax.errors import UserError
from mmjax.evaluators import contact_sheet, retrieval
from tests.data import samples


def brute_force(queries, gallery, query_owners, item_owners):
    """Sorts every row, own items last among equals."""
    found = []
    for query, owner in zip(queries, query_owners, strict=True):
        scores = gallery @ query
        order = sorted(range(len(gallery)), key=lambda item: (-scores[item], item_owners[item] == owner))
        others = 0
        for item in order:
            if item_owners[item] == owner:
                break
            others += 1
        found.append(others)
    return np.array(found)


@settings(deadline=None, max_examples=50)
@given(owners=st.integers(1, 12), each=st.integers(1, 3), seed=st.integers(0, 9999), chunk=st.integers(1, 9))
def test_ranks_equal_brute_force_with_ties_and_several_captions(owners, each, seed, chunk):
    rng = np.random.default_rng(seed)
    # Small whole numbers: exact products, and many ties.
    images = rng.integers(-2, 3, (owners, 3)).astype(np.float32)
    texts = rng.integers(-2, 3, (owners * each, 3)).astype(np.float32)
    text_owners, image_owners = np.repeat(np.arange(owners), each), np.arange(owners)
    before, retrieval.CHUNK = retrieval.CHUNK, chunk
    try:
        for arguments in ((texts, images, text_owners, image_owners), (images, texts, image_owners, text_owners)):
            np.testing.assert_array_equal(retrieval.ranks(*arguments), brute_force(*arguments))
    finally:
        retrieval.CHUNK = before


def test_equal_embeddings_earn_nothing():
    same, owners = np.ones((50, 4), np.float32), np.arange(50)
    assert (retrieval.ranks(same, same, owners, owners) == 49).all()
    assert (retrieval.ranks(same * np.nan, same, owners, owners) == 49).all()


def test_perfect_embeddings_are_first():
    eye, owners = np.eye(50, dtype=np.float32), np.arange(50)
    assert (retrieval.ranks(eye, eye, owners, owners) == 0).all()
    summary = dict(retrieval._summary("text_to_image", np.array([0, 0, 4, 12])))
    assert summary["text_to_image_R@1"] == 0.5 and summary["text_to_image_R@5"] == 0.75
    assert summary["text_to_image_median_rank"] == 3 and summary["text_to_image_mean_rank"] == 5


def test_the_contact_sheet_frames_the_right_image(tmp_path, openmoji_folder):
    images = evaluation_images(open_source("openmoji", "test"), contact_sheet.TILE, "squash", range(3))[0]
    path = tmp_path / "pictures" / "sheet.png"
    contact_sheet.draw(path, ["first", "a caption " * 20], [images, images[::-1]], [[True, False, False], [False] * 3])
    pixels = np.asarray(Image.open(path))
    green = (pixels == contact_sheet.RIGHT).all(axis=2)
    rows, columns = np.nonzero(green)
    assert columns.max() < contact_sheet.TILE + 2 * contact_sheet.GAP
    assert rows.max() - rows.min() + 1 == contact_sheet.TILE + 2 * contact_sheet.FRAME


class Oracle:
    """A model that knows every picture and every caption of the samples."""

    def __init__(self):
        self.config = configs.default()
        self.config.model.encoders.image = configs.image_encoder(image_size=16)
        self.config.model.encoders.text = configs.text_encoder(length=4)
        self.tokenizer = self
        self.means = np.array([self.mean(samples.png(number)) for number in range(samples.COUNT)])

    @staticmethod
    def mean(data):
        return image.for_evaluation(image.decode(data), 16, "squash").mean()

    def encode(self, texts, length):
        return np.array([[int(text.split()[1])] for text in texts])

    def encode_rows(self, modality, count, load_rows, batch_size):
        rows = load_rows(np.arange(count))
        if modality == "text":
            return np.eye(samples.COUNT, dtype=np.float32)[rows[:, 0]]
        known = np.abs(rows.mean(axis=(1, 2, 3))[:, None] - self.means).argmin(axis=1)
        return np.eye(samples.COUNT, dtype=np.float32)[known]


def test_one_row_for_each_caption_and_keys_that_repeat_are_the_same_images(tmp_path):
    """Recalls are perfect for a perfect model, however the pairs are written down."""
    written = samples.write_all(tmp_path)
    (tmp_path / "again").mkdir()
    rows = [
        f"class_{samples.label(n)}/{samples.NAMES[n]}.png,{text}" for n in range(30) for text in samples.captions(n)
    ]
    (tmp_path / "images" / "rows.csv").write_text("filepath,title\n" + "\n".join(rows))
    for source in (
        f"csv:{tmp_path}/images/rows.csv",
        written["webdataset"],
        written["webdataset"] + "::" + written["webdataset"].partition(":")[2],
    ):
        evaluator = retrieval.Retrieval(configs.retrieval(source=source, split=""))
        evaluator.open()
        metrics = dict(evaluator.evaluate(Oracle()))
        assert metrics["text_to_image_R@1"] == metrics["image_to_text_R@1"] == 1.0, source
        assert metrics["image_to_text_mean_rank"] == 1.0 and "unreadable_images" not in metrics


def test_captions_may_belong_to_their_record_alone(tmp_path):
    """Equal images of other records then are rivals, and ties count against the model."""
    written = samples.write_all(tmp_path)
    twice = written["webdataset"] + "::" + written["webdataset"].partition(":")[2]
    with pytest.raises(UserError, match="several records have the key '000': set match to \"image\""):
        retrieval.Retrieval(configs.retrieval(source=twice, split="", match="record")).open()
    for name in ("a", "b"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "x.png").write_bytes(samples.png(0))
        (tmp_path / "both" / name / "x.txt").write_text("picture 0 seen")
    recalls = {}
    for match in ("image", "record"):
        evaluator = retrieval.Retrieval(configs.retrieval(source=f"folder:{tmp_path / 'both'}", split="", match=match))
        evaluator.open()
        recalls[match] = dict(evaluator.evaluate(Oracle()))["text_to_image_R@1"]
    assert recalls == {"image": 1.0, "record": 0.0}
