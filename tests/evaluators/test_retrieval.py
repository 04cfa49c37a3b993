import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax import config as configs
from mmjax.data import image
from mmjax.data.image_reader import Reader
from mmjax.data.pipeline import evaluation_images
from mmjax.data.sources import open_source
from mmjax.errors import UserError
from mmjax.evaluators import Evaluation, contact_sheet, ranking, retrieval
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
@given(rows=st.integers(1, 6), items=st.integers(1, 9), count=st.integers(1, 9), seed=st.integers(0, 9999))
def test_the_best_are_those_of_a_full_sort(rows, items, count, seed):
    rng = np.random.default_rng(seed)
    queries, gallery = rng.normal(size=(rows, 3)), rng.normal(size=(items, 3))
    before, ranking.CHUNK = ranking.CHUNK, 2
    try:
        found = ranking.best(queries, gallery, count)
    finally:
        ranking.CHUNK = before
    expected = [sorted(range(items), key=lambda item, query=query: -(gallery[item] @ query)) for query in queries]
    np.testing.assert_array_equal(found, [order[:count] for order in expected])


@settings(deadline=None, max_examples=100)
@given(rows=st.integers(1, 5), items=st.integers(1, 8), count=st.integers(1, 8), seed=st.integers(0, 9999))
def test_reranked_is_a_sort_of_the_first_ones_with_ties_against_the_model(rows, items, count, seed):
    """The first `count` by similarity, own items last among equals, are sorted by the other score, in the same way."""
    rng = np.random.default_rng(seed)
    queries, gallery = (rng.integers(-1, 2, (size, 2)).astype(np.float32) for size in (rows, items))
    query_owners, item_owners = rng.integers(0, 3, rows), np.append(np.arange(3), rng.integers(0, 3, items))[-items:]
    item_owners[0] = query_owners[0]
    query_owners = np.where(np.isin(query_owners, item_owners), query_owners, item_owners[0])
    other_scores = rng.integers(0, 3, (rows, items)).astype(np.float32)
    count = min(count, items)
    first = ranking.best(queries, gallery, count)
    found = ranking.reranked(
        ranking.ranks(queries, gallery, query_owners, item_owners),
        np.take_along_axis(other_scores, first, axis=1),
        item_owners[first] == query_owners[:, None],
    )
    for row in range(rows):
        own, similarity = item_owners == query_owners[row], gallery @ queries[row]
        order = sorted(range(items), key=lambda item: (-similarity[item], own[item]))
        place = next(place for place, item in enumerate(order) if own[item])
        if place >= count:
            assert found[row] == place
            continue
        best = max(other_scores[row, item] for item in first[row] if own[item])
        assert found[row] == sum(other_scores[row, item] >= best and not own[item] for item in first[row])


def test_a_model_that_tells_nothing_apart_gains_nothing_from_reranking():
    same, owners = np.ones((50, 4), np.float32), np.arange(50)
    found, first = ranking.ranks(same, same, owners, owners), ranking.best(same, same, 5)
    right = first == owners[:, None]
    assert (ranking.reranked(found, np.ones((50, 5)), right) == 49).all()
    assert (ranking.reranked(found * 0, np.ones((50, 5)), right)[:5] == 4).all()
    assert (ranking.reranked(found * 0, np.full((50, 5), np.nan), right)[:5] == 4).all()


@settings(deadline=None, max_examples=50)
@given(owners=st.integers(1, 12), each=st.integers(1, 3), seed=st.integers(0, 9999), chunk=st.integers(1, 9))
def test_ranks_equal_brute_force_with_ties_and_several_captions(owners, each, seed, chunk):
    rng = np.random.default_rng(seed)
    # Small whole numbers: exact products, and many ties.
    images = rng.integers(-2, 3, (owners, 3)).astype(np.float32)
    texts = rng.integers(-2, 3, (owners * each, 3)).astype(np.float32)
    text_owners, image_owners = np.repeat(np.arange(owners), each), np.arange(owners)
    before, ranking.CHUNK = ranking.CHUNK, chunk
    try:
        for arguments in ((texts, images, text_owners, image_owners), (images, texts, image_owners, text_owners)):
            np.testing.assert_array_equal(ranking.ranks(*arguments), brute_force(*arguments))
    finally:
        ranking.CHUNK = before


def test_equal_embeddings_earn_nothing():
    same, owners = np.ones((50, 4), np.float32), np.arange(50)
    assert (ranking.ranks(same, same, owners, owners) == 49).all()
    assert (ranking.ranks(same * np.nan, same, owners, owners) == 49).all()


def test_perfect_embeddings_are_first():
    eye, owners = np.eye(50, dtype=np.float32), np.arange(50)
    assert (ranking.ranks(eye, eye, owners, owners) == 0).all()
    summary = dict(retrieval._summary("text_to_image", np.array([0, 0, 4, 12])))
    assert summary["text_to_image_R@1"] == 0.5 and summary["text_to_image_R@5"] == 0.75
    assert summary["text_to_image_median_rank"] == 3 and summary["text_to_image_mean_rank"] == 5


def test_the_contact_sheet_frames_the_right_image(tmp_path, openmoji_folder):
    images = evaluation_images(open_source("openmoji", "test"), Reader(contact_sheet.TILE), range(3))[0]
    path = tmp_path / "pictures" / "sheet.png"
    contact_sheet.draw(path, ["first", "a caption " * 20], [images, images[::-1]], [[True, False, False], [False] * 3])
    pixels = np.asarray(Image.open(path))
    green = (pixels == contact_sheet.RIGHT).all(axis=2)
    rows, columns = np.nonzero(green)
    assert columns.max() < contact_sheet.TILE + 2 * contact_sheet.GAP
    assert rows.max() - rows.min() + 1 == contact_sheet.TILE + 2 * contact_sheet.FRAME


def test_recalls_have_the_names_of_clip_benchmark_too_and_precision_counts_all_own_items():
    """An image is found by the first of its captions; its average precision says where the others are."""
    owners = np.repeat(np.arange(20), 2)
    images = np.eye(20, dtype=np.float32)
    texts = images[owners]
    texts[1::2] = np.roll(images, 6, axis=0)  # the second caption of each image describes another one
    forth, back = ranking.rivals(texts, images, owners, np.arange(20), both=True)
    found = dict(retrieval.summary("text_to_image", forth)) | dict(retrieval.summary("image_to_text", back))
    assert found["image_retrieval_recall@5"] == found["text_to_image_R@5"] == 0.5
    assert found["text_retrieval_recall@5"] == found["image_to_text_R@5"] == 1.0
    assert found["text_to_image_mAP@10"] == 0.5  # the others tie with all of the rest
    assert found["image_to_text_mAP@10"] == pytest.approx(1 / 4)  # in place 2 of 2, the other one far behind
    assert len(found) == 14


class Oracle:
    """A model that knows every picture and every caption of the samples."""

    def __init__(self):
        self.config = configs.default()
        self.config.model.encoders.image = configs.image_encoder(image_size=16)
        self.config.model.encoders.text = configs.text_encoder(length=4)
        self.tokenizer = self
        self.means = np.array([self.mean(samples.png(number)) for number in range(samples.COUNT)])
        self.pairs, self.sure = 0, 20.0  # log-odds of what belongs together

    @staticmethod
    def mean(data):
        return image.for_evaluation(image.decode(data), image.Fit(16)).mean()

    def encode(self, texts, length):
        return np.array([[int(text.split()[1])] for text in texts])

    def encode_rows(self, modality, count, load_rows, batch_size):
        rows = load_rows(np.arange(count))
        if modality == "text":
            return np.eye(samples.COUNT, dtype=np.float32)[rows[:, 0]]
        return np.eye(samples.COUNT, dtype=np.float32)[self.known(rows)]

    def known(self, images):
        return np.abs(images.mean(axis=(1, 2, 3))[:, None] - self.means).argmin(axis=1)

    def agreed(self, array):
        return array

    def match_rows(self, images, texts, load_images, load_texts, batch_size):
        self.pairs = len(images)
        belong = self.known(load_images(images)) == load_texts(texts)[:, 0]
        return np.where(belong, self.sure, 0).astype(np.float32)

    def logits(self):
        return {"logit_scale": 10.0, "logit_bias": 0.0}


class Confused(Oracle):
    """It knows what belongs together, but its embeddings of images are those of their neighbours."""

    def encode_rows(self, modality, count, load_rows, batch_size):
        found = super().encode_rows(modality, count, load_rows, batch_size)
        if modality == "text":
            return found
        return 0.5 * found + np.roll(found, 1, axis=1)


def test_the_matching_head_puts_the_first_ones_in_order(tmp_path):
    source = samples.write_all(tmp_path)["webdataset"]
    model = Confused()

    def evaluate(**options):
        evaluator = retrieval.Retrieval(configs.retrieval(source=source, split="", **options))
        evaluator.open()
        return dict(evaluator.evaluate(model))

    plain, one, two = evaluate(), evaluate(rerank=1), evaluate(rerank=2)
    assert set(one) - set(plain) == {
        f"{direction}_reranked_{rest}"
        for direction in ("text_to_image", "image_to_text")
        for rest in ("R@1", "R@5", "R@10", "median_rank", "mean_rank")
    }
    for name in ("text_to_image_R@1", "text_to_image_mean_rank"):
        assert plain[name] == one[name] == two[name]
    assert plain["text_to_image_R@1"] == one["text_to_image_reranked_R@1"] == 0
    assert two["text_to_image_reranked_R@1"] == 1
    assert model.pairs == 2 * samples.COUNT  # of the images with their first two texts
    assert evaluate(rerank=1000)["image_to_text_reranked_R@1"] == 1  # there are only so many
    model.sure = 1.0  # less than what the embeddings say against it
    assert evaluate(rerank=2)["text_to_image_reranked_R@1"] == 0
    assert evaluate(rerank=2, rerank_weight=20.0)["text_to_image_reranked_R@1"] == 1


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
        assert metrics["image_to_text_mAP@10"] == metrics["text_retrieval_recall@5"] == 1.0


def test_every_record_that_is_read_at_the_start_is_a_sign_of_life(tmp_path):
    source = samples.write_all(tmp_path)["webdataset"]
    entries = {"retrieval": configs.retrieval(source=source, split="")}
    entries["captions"] = configs.captions(source=source, split="")
    beats = []
    Evaluation(entries, lambda: beats.append(1))
    assert len(beats) == 2 * samples.COUNT  # each reads a record once, retrieval for its caption and its image


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
