"""Whisper beside `transformers.WhisperForConditionalGeneration`."""

import json

import numpy as np
import pytest

from mmjax import api
from mmjax.interop import pretrained
from tests.interop import folders, peers, whispers
from tests.interop.make_goldens_whisper import features, generated, outputs, texts
from tests.interop.test_whisper import SINGLE
from tests.interop.test_whisper import outputs as our_outputs

transformers = peers.transformers()

SMALL = {
    "vocab_size": 264,
    "num_mel_bins": 128,
    "d_model": 24,
    "encoder_layers": 3,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 40,
    "decoder_layers": 2,
    "decoder_attention_heads": 6,
    "decoder_ffn_dim": 56,
    "max_source_positions": 50,
    "max_target_positions": 20,
}
TINY_ENGLISH = {"vocab_size": 51_864}  # the rest is what transformers fills in
IDS = {f"{name}_token_id": whispers.CONFIG[f"{name}_token_id"] for name in ("pad", "bos", "eos", "decoder_start")}


def reference(settings):
    """A random model of theirs."""
    return peers.randomized(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**settings)))


def there_and_back(settings, tmp_path, multilingual=True):
    """Their model, the features that it reads of a recording; ours, and the folder of our export."""
    theirs = reference(settings)
    seconds = settings.get("max_source_positions", 1500) // 50
    extractor = transformers.WhisperFeatureExtractor(
        feature_size=settings.get("num_mel_bins", 80), chunk_length=seconds
    )

    def prepare(folder):
        extractor.save_pretrained(folder)
        (folder / "generation_config.json").write_text(json.dumps(whispers.generation(multilingual)))
        (folder / "tokenizer.json").write_text(whispers.tokenizer())

    ours, exported = peers.there_and_back(theirs, tmp_path, prepare)
    return theirs, extractor, ours, exported


@pytest.mark.parametrize(
    "settings",
    [pytest.param(SMALL | IDS, id="small"), pytest.param(TINY_ENGLISH, id="tiny.en", marks=pytest.mark.slow)],
)
def test_outputs_and_their_way_back(tmp_path, settings):
    theirs, extractor, ours, exported = there_and_back(settings, tmp_path)
    clips = [whispers.clip(number) for number in range(2)]
    inputs, ids = features(extractor, clips), texts()[:2]
    wanted_tokens, wanted_logits = outputs(theirs, inputs, ids)
    tokens, logits = our_outputs(ours, clips, ids)
    assert folders.relative_error(tokens, wanted_tokens) < peers.TOLERANCE
    assert folders.relative_error(logits, wanted_logits[:, :-1]) < peers.TOLERANCE
    again, report = transformers.WhisperForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    for found, wanted in zip(outputs(again.eval(), inputs, ids), (wanted_tokens, wanted_logits), strict=True):
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("multilingual", [False, True])
def test_texts_are_theirs_from_their_folder_and_from_ours(tmp_path, multilingual):
    folder = whispers.write(tmp_path / "theirs", multilingual)
    ours = api.load(folder, mesh=SINGLE)
    exported = tmp_path / "ours"
    pretrained.save(exported, ours.config, ours.params, ours.tokenizer)
    clips = [whispers.clip(number) for number in range(10, 22)]
    found = ours.transcribe(clips)
    assert len(set(found)) > 3
    for source in (folder, exported):
        model = transformers.WhisperForConditionalGeneration.from_pretrained(source).eval()
        extractor = transformers.WhisperFeatureExtractor.from_pretrained(source)
        options = {"task": "transcribe"} if multilingual else {}  # without one they leave its token out
        wanted = generated(model, features(extractor, clips), **options)
        assert found == [ours.tokenizer.decode(row) for row in wanted]


def test_a_model_of_ours_goes_there_with_its_tokenizer(tmp_path):
    _, _, ours, exported = there_and_back(SMALL | IDS, tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(exported)
    ids = [whispers.START, whispers.ENGLISH, whispers.NO_TIMESTAMPS, *range(60, 70), whispers.END]
    assert tokenizer.decode(ids, skip_special_tokens=True) == ours.tokenizer.decode(ids)
    assert tokenizer("Hello").input_ids == ours.tokenizer.encode(["Hello"], 8)[0].tolist()
