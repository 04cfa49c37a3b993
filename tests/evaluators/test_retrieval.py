import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmjax.evaluators import contact_sheet, retrieval


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
    from mmjax.data.sources import open_source

    source = open_source("openmoji", "test")
    images = [source[index]["image"] for index in range(3)]
    path = tmp_path / "pictures" / "sheet.png"
    contact_sheet.draw(path, ["first", "a caption " * 20], [images, images[::-1]], [[True, False, False], [False] * 3])
    pixels = np.asarray(Image.open(path))
    green = (pixels == contact_sheet.RIGHT).all(axis=2)
    rows, columns = np.nonzero(green)
    assert columns.max() < contact_sheet.TILE + 2 * contact_sheet.GAP
    assert rows.max() - rows.min() + 1 == contact_sheet.TILE + 2 * contact_sheet.FRAME
