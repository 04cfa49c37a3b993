"""Whole folders of SigLIP and SigLIP 2, with tokenizer and image processor, beside what transformers makes of them."""

import json
import tarfile

import numpy as np
import pytest
import tokenizers
from PIL import Image
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from mmjax import api
from mmjax.data import image as image_ops
from mmjax.data import text
from mmjax.data.image_reader import Reader, fitting_grid
from mmjax.interop import pretrained
from tests.data import make_goldens_text as texts
from tests.data.test_peers_image import PHOTOS
from tests.interop import folders, peers
from tests.interop.test_siglip import pictures

transformers = peers.transformers()
import torch  # noqa: E402

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 2}
GEMMA = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False, "add_eos_token": True, "padding_side": "right"}
TOKENIZERS = {
    "siglip": {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>"},
    "cased": {"tokenizer_class": "SiglipTokenizer", "pad_token": "</s>", "do_lower_case": False},
    "fixed": GEMMA | {"do_lower_case": True},
    "naflex": GEMMA,
}


def write_tokenizer(folder, name):
    """The files as they lie on the hub: SigLIP's sentencepiece model, or SigLIP 2's tokenizer.json in Gemma's name."""
    config = TOKENIZERS[name]
    if config["tokenizer_class"] == "GemmaTokenizer":
        gemma_tokenizer().save(str(folder / "tokenizer.json"))
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    else:
        texts.write(texts.sentencepiece_files(800, "nmt_nfkc", config), folder)
    return text.load(folder)


def gemma_tokenizer():
    """A small one in Gemma's layout: byte-pair encoding of characters, with bytes for what is unknown."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    ordinary = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*special, *ordinary], show_progress=False)
    tokenizer.train_from_iterator(texts.SENTENCES[:20], trainer)
    end = [("<eos>", tokenizer.token_to_id("<eos>"))]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", pair="$A <eos> $B <eos>", special_tokens=end
    )
    parts = json.loads(tokenizer.to_str())
    parts["added_tokens"] = [token for token in parts["added_tokens"] if token["content"] in special]
    return tokenizers.Tokenizer.from_str(json.dumps(parts))


def write(folder, name):
    """A folder with random weights, and their model of it."""
    folder.mkdir()
    kind = "Siglip2" if name == "naflex" else "Siglip"
    if name == "naflex":
        vision, processor = {"patch_size": 4, "num_patches": 25}, {"patch_size": 4, "max_num_patches": 30}
    else:
        vision = {"image_size": 24, "patch_size": 8}
        processor = {"size": {"height": 24, "width": 24}, "resample": 2 if name == "fixed" else 3}
    size = write_tokenizer(folder, name).vocab_size
    config = getattr(transformers, f"{kind}Config")(
        vision_config=TOWER | vision, text_config=TOWER | {"vocab_size": size, "max_position_embeddings": 16}
    )
    model = peers.randomized(getattr(transformers, f"{kind}Model")(config))
    model.save_pretrained(folder)
    getattr(transformers, f"{kind}ImageProcessorPil")(**processor).save_pretrained(folder)
    return model


def photos():
    if not PHOTOS.exists():
        return [Image.fromarray(each) for each in pictures()]
    with tarfile.open(PHOTOS) as archive:
        members = [member for member in archive if member.name.endswith(".jpg")][:6]
        return [Image.fromarray(image_ops.decode(archive.extractfile(member).read())) for member in members]


def ids_by(processor):
    options = {"padding": "max_length", "truncation": True, "max_length": 16}
    return np.array(processor(text=list(texts.SENTENCES), **options)["input_ids"])


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_exported_folder_gives_what_ours_does(name, tmp_path):
    reference, images = write(tmp_path / "in", name), photos()
    model = api.load(tmp_path / "in")
    pretrained.save(tmp_path / "out", model.config, model.params, model.tokenizer)
    folders.assert_same_tensors(tmp_path / "in", tmp_path / "out")
    processor = transformers.AutoProcessor.from_pretrained(tmp_path / "out")
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "out").eval()
    assert type(theirs) is type(reference)
    ids = ids_by(processor)
    np.testing.assert_array_equal(model.token_ids(texts.SENTENCES), ids)
    if name != "fixed":  # there transformers keeps capitals: see `mmjax.data.text`
        np.testing.assert_array_equal(ids_by(transformers.AutoProcessor.from_pretrained(tmp_path / "in")), ids)
    theirs.save_pretrained(tmp_path / "saved")  # with the image processor in processor_config.json
    processor.save_pretrained(tmp_path / "saved")
    assert api.load_config(tmp_path / "saved").to_dict() == model.config.to_dict()
    np.testing.assert_array_equal(api.load_tokenizer(tmp_path / "saved").encode(texts.SENTENCES, 16), ids)
    again = api.load(tmp_path / "out")
    np.testing.assert_array_equal(again.token_ids(texts.SENTENCES), ids)
    assert again.config.to_dict() == model.config.to_dict()
    pil = type(transformers.AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil"))
    with torch.inference_mode():
        pixels = dict(pil.from_pretrained(tmp_path / "out")(images, return_tensors="pt"))
        wanted = theirs(**pixels, input_ids=torch.tensor(ids))
    found = model.encode_image(images)
    assert folders.relative_error(found, wanted.image_embeds.numpy()) < peers.TOLERANCE
    assert folders.relative_error(model.encode_text(texts.SENTENCES), wanted.text_embeds.numpy()) < peers.TOLERANCE


def test_gemmas_class_loses_capitals_where_the_folder_says_so(tmp_path):
    """As SigLIP 2's own class does always; Gemma's in transformers does not."""
    tokenizer = write_tokenizer(tmp_path, "fixed")
    kept, lowered = (
        ids_by(getattr(transformers, name).from_pretrained(tmp_path, padding_side="right"))
        for name in ("GemmaTokenizer", "Siglip2Tokenizer")
    )
    assert (kept != lowered).any()
    np.testing.assert_array_equal(tokenizer.encode(texts.SENTENCES, 16), lowered)


def test_grids_of_many_sizes():
    from transformers.models.siglip2.image_processing_pil_siglip2 import get_image_size_for_max_num_patches

    draw = np.random.default_rng(0)
    for _ in range(2000):
        height, width = (int(side) for side in np.exp(draw.uniform(0, 9, 2)))
        patch, most = int(draw.choice([4, 14, 16])), int(draw.choice([1, 30, 256, 729, 1024]))
        wanted = get_image_size_for_max_num_patches(height, width, patch, most)
        assert np.multiply(fitting_grid(height, width, patch, most), patch).tolist() == [*wanted], (height, width)


@pytest.mark.parametrize("name", ["Siglip2ImageProcessor", "Siglip2ImageProcessorPil"])
def test_patches_of_photos(name):
    processor = getattr(transformers, name)(do_rescale=False, do_normalize=False)
    wanted = processor(photos(), return_tensors="np")
    found = Reader(256, resample="bilinear", max_patches=256, patch=16)(map(image_ops.pixels_of, photos()))
    np.testing.assert_array_equal(found["shape"], wanted["spatial_shapes"])
    np.testing.assert_array_equal(found["patches"], wanted["pixel_values"])


@pytest.mark.parametrize("name", ["SiglipImageProcessor", "SiglipImageProcessorPil"])
def test_bilinear_photos(name):
    processor = getattr(transformers, name)(do_rescale=False, do_normalize=False, resample=2)
    wanted = processor(photos(), return_tensors="np")["pixel_values"].transpose(0, 2, 3, 1)
    found = Reader(224, resample="bilinear")(map(image_ops.pixels_of, photos()))
    assert np.abs(found.astype(int) - wanted).mean() < 0.5
    assert np.abs(found.astype(int) - Reader(224)(map(image_ops.pixels_of, photos()))).mean() > 0.5
