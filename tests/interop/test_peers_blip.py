"""BLIP beside `transformers`."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmjax.models.generate import Strategy, generate
from mmjax.models.multimodal import Text
from tests.interop import bert_tokenizer, folders, peers

transformers = peers.transformers()
import torch  # noqa: E402

TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 3}
SMALL = {
    "image_text_hidden_size": 12,
    "text_config": TOWER | {"vocab_size": 440, "max_position_embeddings": 40, "bos_token_id": 438, "sep_token_id": 3},
    "vision_config": TOWER | {"hidden_size": 24, "num_attention_heads": 3, "image_size": 28, "patch_size": 14},
}
# Salesforce/blip-image-captioning-base and blip-itm-base-coco: the rest is BlipConfig's default.
PUBLISHED = {"text_config": {"num_attention_heads": 12}}
SHAPES = [SMALL, pytest.param(PUBLISHED, marks=pytest.mark.slow)]
TEXTS = ("a red fox", "the lazy dog", "!")


def reference_of(kind, settings):
    torch.manual_seed(0)
    model = peers.randomized(kind(transformers.BlipConfig(**settings)))
    if kind is transformers.BlipForConditionalGeneration:  # which never writes padding here, and sometimes an end
        with torch.no_grad():
            model.text_decoder.cls.predictions.bias[0] = -30
            model.text_decoder.cls.predictions.bias[model.config.text_config.sep_token_id] += 1
    return model


def inputs_of(model, count=3):
    """Images as ours and theirs."""
    encoder = model.config.model.encoders.image
    pixels = folders.pixels(count, encoder.image_size)
    return pixels, peers.normalized(pixels, encoder)


def tokens_of(exported, count):
    """The texts as the tokenizer of the export has them."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    inputs = tokenizer(list(TEXTS[:count]), padding=True, return_tensors="pt")
    return {name: inputs[name] for name in ("input_ids", "attention_mask")}


def references(reference, kind, exported, settings):
    """Theirs, and theirs as the export holds it: not of published size, where the tensors are known to be the same."""
    yield reference
    if settings is SMALL:
        yield kind.from_pretrained(exported).eval()


@pytest.mark.parametrize("settings", SHAPES, ids=["small", "itm-base-coco"])
def test_matching_and_embeddings_agree_both_ways(settings, tmp_path):
    kind, count = transformers.BlipForImageTextRetrieval, 3 if settings is SMALL else 1
    model, exported = peers.there_and_back(reference := reference_of(kind, settings), tmp_path, bert_tokenizer.write)
    (pixels, theirs_see), inputs = inputs_of(model, count), tokens_of(exported, count)
    matches = model.match(pixels, TEXTS[:count])
    image, text = model.encode_image(pixels), model.encode_text(TEXTS[:count])
    for theirs in references(reference, kind, exported, settings):
        with torch.inference_mode():
            out = theirs(**inputs, pixel_values=theirs_see)
            cosines = theirs(**inputs, pixel_values=theirs_see, use_itm_head=False).itm_score
            features = torch.nn.functional.normalize(theirs.vision_proj(out.last_hidden_state[:, 0]), dim=-1)
        odds = (out.itm_score[:, 1] - out.itm_score[:, 0]).numpy()
        assert folders.relative_error(np.log(matches / (1 - matches)), odds) < peers.TOLERANCE
        np.testing.assert_allclose(matches, out.itm_score.softmax(dim=1)[:, 1], rtol=1e-4)
        assert folders.relative_error(image, features.numpy()) < peers.TOLERANCE
        assert folders.relative_error(image @ text.T, cosines.numpy()) < peers.TOLERANCE


def image_tokens(model, pixels):
    return peers.applied(model, "tokens", "image", pixels)[0]


@pytest.mark.parametrize("settings", SHAPES, ids=["small", "image-captioning-base"])
def test_captions_agree_both_ways(settings, tmp_path):
    kind, count = transformers.BlipForConditionalGeneration, 3 if settings is SMALL else 1
    model, exported = peers.there_and_back(reference := reference_of(kind, settings), tmp_path, bert_tokenizer.write)
    (pixels, theirs_see), ids = inputs_of(model, count), tokens_of(exported, count)["input_ids"]
    logits = peers.applied(model, "caption", Text(ids.numpy(), None, None), image_tokens(model, pixels))
    captions = model.caption(pixels)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids[:, 0] = reference.config.text_config.bos_token_id
    for theirs in references(reference, transformers.AutoModelForImageTextToText, exported, settings):
        with torch.inference_mode():
            wanted = theirs(pixel_values=theirs_see, input_ids=ids).logits[:, :-1]
            written = theirs.generate(pixel_values=theirs_see)
        assert folders.relative_error(logits, wanted.numpy()) < peers.TOLERANCE
        assert captions == [tokenizer.decode(row, skip_special_tokens=True).strip() for row in written]


def written_ids(model, pixels, strategy, length):
    """Ids that our search finds, start and end included, and no padding."""
    count, text = len(pixels), model.config.model.encoders.text
    prompt = jnp.full((count, length), 2, jnp.int32)
    with jax.set_mesh(model.mesh):
        tokens = jnp.asarray(image_tokens(model, pixels))
        keys = jax.vmap(jax.random.key)(jnp.arange(count))
        one = jnp.ones(count, jnp.int32)
        ids, _ = generate(model.module, model.params, tokens, prompt, one, keys, text.end_id, strategy)
    return [row[: (row != text.pad_id).sum()].tolist() for row in np.asarray(ids)]


@pytest.fixture(scope="module")
def captioner(tmp_path_factory):
    reference = reference_of(transformers.BlipForConditionalGeneration, SMALL)
    return reference, *peers.there_and_back(reference, tmp_path_factory.mktemp("blip"), bert_tokenizer.write)


def test_written_ids_are_those_of_generate(captioner):
    reference, model, _ = captioner
    pixels, theirs_see = inputs_of(model, 16)
    found = written_ids(model, pixels, Strategy(max_new_tokens=20), 21)
    with torch.inference_mode():
        wanted = reference.generate(pixel_values=theirs_see)
    lengths = {len(row) for row in found}
    assert len(lengths) > 1, "some captions end by themselves"
    for own, theirs in zip(found, wanted.tolist(), strict=True):
        assert own[1:] == theirs[1 : len(own)] and not any(theirs[len(own) :])


def test_prompts_are_continued_as_by_generate(captioner):
    reference, model, exported = captioner
    pixels, theirs_see = inputs_of(model)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    for prompt in ("a red", "the lazy dog"):
        inputs = tokenizer([prompt] * 3, return_tensors="pt")
        inputs = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
        with torch.inference_mode():
            wanted = reference.generate(pixel_values=theirs_see, **inputs, max_new_tokens=9)
        texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in wanted]
        assert model.caption(pixels, [prompt] * 3, max_new_tokens=9) == texts
    # Each text has its own share, whatever stands beside it.
    both = model.caption(pixels[:2], ["a red", "the lazy dog"], max_new_tokens=9)
    assert both[1] == texts[1] and both[0] == model.caption(pixels[:1], ["a red"], max_new_tokens=9)[0]


def test_beams_find_what_generate_finds_without_a_length_penalty(captioner):
    """With one they differ by definition: ours divides by ((5 + tokens) / 6)^penalty, theirs by tokens^penalty.

    Ours keeps finished texts among the beams, theirs beside them: now and then one of the two finds a likelier text.
    """
    reference, model, _ = captioner
    pixels, theirs_see = inputs_of(model, 12)
    found = written_ids(model, pixels, Strategy(beams=4, length_penalty=0.0, max_new_tokens=6), 7)
    with torch.inference_mode():
        options = {"num_beams": 4, "length_penalty": 0.0, "max_new_tokens": 6, "do_sample": False}
        wanted = reference.generate(pixel_values=theirs_see, **options).tolist()
    wanted = [row[: row.index(3) + 1] if 3 in row else row for row in wanted]
    same = [own[1:] == theirs[1:] for own, theirs in zip(found, wanted, strict=True)]
    assert sum(same) >= len(same) - 1


def test_the_processor_of_an_export_sees_what_we_see(captioner):
    _, model, exported = captioner
    processor = transformers.AutoProcessor.from_pretrained(exported)
    assert type(processor).__name__ == "BlipProcessor"
    picture = np.asarray(Image.fromarray(folders.pixels(1, 7)[0]).resize((90, 60), Image.Resampling.BILINEAR))
    theirs = processor(images=Image.fromarray(picture), text="a red fox", return_tensors="pt")
    own = peers.normalized(model._loader([picture])(np.arange(1)), model.config.model.encoders.image)
    assert (own - theirs["pixel_values"]).abs().max() < 2.5 / 255 / 0.26  # two steps of a byte: torchvision's rounding
    length = theirs["input_ids"].shape[1]
    np.testing.assert_array_equal(model.token_ids(["a red fox"])[:, :length], theirs["input_ids"])
