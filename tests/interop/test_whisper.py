"""Whisper folders: loaded, compared with what transformers computed, transcribing, written again."""

import itertools
import json

import jax
import numpy as np
import pytest

from mmjax import api, convert
from mmjax.config import flatten
from mmjax.errors import UserError
from mmjax.interop import pretrained, store, whisper
from mmjax.models.multimodal import Text, audio_samples
from mmjax.sharding.mesh import make_mesh
from tests.data.test_audio import encoded
from tests.interop import folders, whispers
from tests.interop.make_goldens_whisper import CLIPS, GOLDENS, LANGUAGES, texts

SINGLE = make_mesh(devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS) as arrays:
        return dict(arrays)


@pytest.fixture(scope="module")
def folders_by_name(tmp_path_factory):
    root = tmp_path_factory.mktemp("whisper")
    return {name: whispers.write(root / name, name == "multilingual") for name in ("english", "multilingual")}


@pytest.fixture(scope="module")
def english(folders_by_name):
    return api.load(folders_by_name["english"], mesh=SINGLE)


@pytest.fixture(scope="module")
def multilingual(folders_by_name):
    return api.load(folders_by_name["multilingual"], mesh=SINGLE)


@pytest.fixture(scope="module")
def clips():
    return [whispers.clip(number) for number in range(CLIPS)]


def outputs(model, clips, ids):
    """The audio tower's tokens, and the decoder's logits of all tokens but the first."""
    length = audio_samples(model.config.model.encoders.audio)
    audio = np.stack([np.pad(clip, (0, length - len(clip))) for clip in clips])

    @jax.jit
    def run(params, audio, ids):
        tokens, _ = model.module.apply({"params": params}, "audio", audio, method="tokens")
        return tokens, model.module.apply({"params": params}, Text(ids, None, None), tokens, method="caption")

    with jax.set_mesh(model.mesh):
        return jax.device_get(run(model.params, audio, ids))


def test_outputs_are_those_of_transformers(english, clips, goldens):
    tokens, logits = outputs(english, clips, texts())
    assert folders.relative_error(tokens, goldens["tokens"]) < 1e-4
    assert folders.relative_error(logits, goldens["logits"][:, :-1]) < 1e-4


def as_texts(model, rows):
    return [model.tokenizer.decode(row[row >= 0]) for row in rows]


def test_english_texts_are_those_of_transformers(english, clips, goldens):
    found = english.transcribe(clips)
    assert found == as_texts(english, goldens["english"]) and len(set(found)) > CLIPS // 2


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("name", LANGUAGES)
def test_texts_by_language_and_task_are_those_of_transformers(multilingual, clips, goldens, name, task):
    found = multilingual.transcribe(clips, LANGUAGES[name], task)
    assert found == as_texts(multilingual, goldens[f"{name}_{task}"])


def test_the_goldens_tell_languages_and_tasks_apart(goldens):
    """Or else the test above would not notice a prompt that is ignored."""
    for task in ("transcribe", "translate"):
        own = [(goldens[f"detected_{task}"] == goldens[f"{name}_{task}"]).all(axis=1) for name in ("en", "de")]
        assert np.logical_or(*own).all() and not own[0].all() and not own[1].all()
    assert (goldens["en_transcribe"] != goldens["en_translate"]).any()
    assert (goldens["english"][:, 15] == -1).any()  # one ends early


def test_windows_of_a_long_recording_are_transcribed_one_by_one(english):
    parts = [whispers.clip(number, seconds=1.0) for number in (0, 1, 2)]
    parts[2] = parts[2][:5_000]
    alone = english.transcribe(parts)
    assert english.transcribe([np.concatenate(parts)]) == [" ".join(alone)]
    assert english.transcribe([parts[0], np.concatenate(parts), parts[1]], batch_size=2) == [
        alone[0],
        " ".join(alone),
        alone[1],
    ]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_recording_is_of_one_language(multilingual, clips, batch_size):
    """That of its first window, also where the second one is in another batch and sounds like another language."""
    detected, *forced = (multilingual.transcribe(clips, language) for language in (None, "en", "de"))
    own = [forced[0] if found == forced[0][index] else forced[1] for index, found in enumerate(detected)]
    pairs = itertools.permutations(range(CLIPS), 2)
    first, second = next(pair for pair in pairs if own[pair[0]][pair[1]] != detected[pair[1]])
    both = np.concatenate([np.pad(clips[first], (0, whispers.RATE - len(clips[first]))), clips[second]])
    wanted = f"{own[first][first]} {own[first][second]}"
    assert multilingual.transcribe([both, both], batch_size=batch_size) == [wanted, wanted]


def test_recordings_come_as_files_and_at_other_rates(english, clips, tmp_path):
    path = tmp_path / "clip.wav"
    path.write_bytes(encoded(clips[0], subtype="FLOAT"))
    (wanted,) = english.transcribe(clips[:1])
    assert english.transcribe([path, str(path), (clips[0], whispers.RATE)]) == [wanted] * 3
    twice = np.repeat(clips[0], 2)
    assert english.transcribe([(twice, 2 * whispers.RATE)]) != english.transcribe([twice])


def test_no_recordings_give_no_texts(english):
    assert english.transcribe([]) == []


def test_what_is_suppressed_is_not_said(english, clips):
    letters = sorted(set("".join(english.transcribe(clips))))
    ids = [ord(letter) - ord("!") for letter in letters]
    found = english.transcribe(clips, suppress=ids)
    assert not set("".join(found)) & set(letters) and any(found)
    first = english.transcribe(clips, suppress_first=ids)
    assert not {text[:1] for text in first} & set(letters) and set("".join(first)) & set(letters)


@pytest.mark.parametrize("options", [{"beams": 2}, {"temperature": 1.0, "top_k": 5}])
def test_other_strategies_keep_to_what_may_be_said(english, clips, options):
    found = english.transcribe(clips, seed=3, **options)
    assert found == english.transcribe(clips, seed=3, batch_size=4, **options)
    assert "".join(found).isascii() and found != english.transcribe(clips)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"language": "fr"}, "unknown language 'fr'; known: de, en"),
        ({"task": "translat"}, 'unknown task .translat.; did you mean "translate"'),
        ({"beam": 3}, 'unknown option beam; did you mean "beams"'),
        ({"suppress": [264]}, "suppress: ids of tokens are from 0 to 263"),
        ({"batch_size": 0}, "batch_size 0 is less than 1"),
    ],
)
def test_wrong_options_are_named(multilingual, clips, arguments, message):
    with pytest.raises(UserError, match=message):
        multilingual.transcribe(clips[:1], **arguments)


def test_a_model_of_one_language_refuses_others(english, clips):
    assert english.transcribe(clips[:1], language="en") == english.transcribe(clips[:1])
    with pytest.raises(UserError, match="cannot transcribe 'de': it knows one language"):
        english.transcribe(clips[:1], language="de")
    with pytest.raises(UserError, match="cannot translate: it knows one language"):
        english.transcribe(clips[:1], task="translate")


def test_wrong_recordings_are_named(english, tmp_path):
    with pytest.raises(UserError, match=r"cannot read the recording .*none\.wav"):
        english.transcribe([tmp_path / "none.wav"])
    with pytest.raises(UserError, match=r"float array \[samples\]"):
        english.transcribe([np.zeros(10, np.int16)])
    with pytest.raises(UserError, match=r"takes a list of recordings: \['clip\.wav'\] for one"):
        english.transcribe("clip.wav")


def test_a_speech_model_says_what_it_cannot_do(english, clips):
    image = np.zeros((8, 8, 3), np.uint8)
    for ask in (english.encode_image, english.caption):
        with pytest.raises(UserError, match="this model cannot"):
            ask([image])
    with pytest.raises(UserError, match="embeds no recordings"):
        english.encode_audio(clips)


@pytest.mark.parametrize("weights", ["bfloat16", "int8"])
def test_smaller_weights_say_about_the_same(folders_by_name, clips, goldens, weights):
    model = api.load(folders_by_name["english"], mesh=SINGLE, weights=weights)
    tokens, logits = outputs(model, clips, texts())
    for found, wanted in ((tokens, goldens["tokens"]), (logits, goldens["logits"][:, :-1])):
        assert 1e-4 < folders.relative_error(found, wanted) < 0.2
    assert all(model.transcribe(clips))


def test_its_features_can_be_had(english, clips):
    def load(rows):
        return np.stack([np.pad(clips[row], (0, whispers.RATE - len(clips[row]))) for row in rows])

    found = english.features_rows("audio", len(clips), load, batch_size=4)
    np.testing.assert_allclose(found, outputs(english, clips, texts())[0].mean(axis=1), atol=1e-5)


@pytest.mark.parametrize("name", ["english", "multilingual"])
def test_a_written_folder_holds_the_same(folders_by_name, tmp_path, name):
    model = api.load(folders_by_name[name], mesh=SINGLE)
    target = tmp_path / "written"
    family = pretrained.save(target, model.config, model.params, model.tokenizer)
    assert family == "whisper"
    for file in ("config.json", "generation_config.json", "preprocessor_config.json"):
        assert json.loads((target / file).read_text()) == json.loads((folders_by_name[name] / file).read_text())
    folders.assert_same_tensors(folders_by_name[name], target)
    again = api.load(target, mesh=SINGLE)
    assert dict(flatten(again.config)) == dict(flatten(model.config))
    clip = [whispers.clip(0)]
    assert again.transcribe(clip) == model.transcribe(clip)


def test_it_becomes_a_run_and_is_the_same(multilingual, clips, tmp_path):
    convert.write_workdir(multilingual, tmp_path / "run")
    model = api.load(tmp_path / "run", mesh=SINGLE)
    assert dict(flatten(model.config)) == dict(flatten(multilingual.config))
    assert model.transcribe(clips, "de") == multilingual.transcribe(clips, "de")


def refused(folder, message, **changes):
    """Loading a folder with other settings raises this."""
    for name, content in changes.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | content))
    with pytest.raises(UserError, match=message):
        api.load(folder, mesh=SINGLE)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config", {"activation_function": "relu"}, "activation_function is 'relu'"),
        ("config", {"scale_embedding": True}, "scale_embedding is True"),
        ("config", {"encoder_layers": 3}, r"missing: model\.encoder\.layers\.2"),
        ("config", {"encoder_layers": 1}, r"unknown: model\.encoder\.layers\.1"),
        ("config", {"decoder_ffn_dim": 40}, r"of another shape: model\.decoder\.layers\.0\.fc1"),
        ("preprocessor_config", {"feature_size": 128}, "feature_size 128 for a model of 80"),
        ("preprocessor_config", {"chunk_length": 30}, "50 positions are 1 seconds, not 30 seconds"),
        ("preprocessor_config", {"hop_length": 150}, r"50 positions are 0\.9375 seconds"),
    ],
)
def test_settings_that_do_not_fit_are_refused(tmp_path, file, content, message):
    refused(whispers.write(tmp_path / "changed"), message, **{file: content})


def test_a_head_that_is_not_the_embeddings_is_refused(tmp_path):
    folder = whispers.write(tmp_path / "model")
    tensors = folders.tensors_of(folder)
    embeddings = tensors["model.decoder.embed_tokens.weight"]
    store.save_tensors(folder / "model.safetensors", tensors | {"proj_out.weight": embeddings})
    api.load(folder, mesh=SINGLE)
    store.save_tensors(folder / "model.safetensors", tensors | {"proj_out.weight": embeddings + 1})
    refused(folder, "proj_out.weight")


def test_old_folders_have_their_prompt_in_config_json():
    """Before there was a generation_config.json, and with languages that only a fixed prompt chooses."""
    old = whispers.CONFIG | {"forced_decoder_ids": [[1, 258], [2, 261], [3, 262]], "suppress_tokens": [1, 2]}
    speech = whisper.to_config(old, {"preprocessor_config.json": whispers.PROCESSOR}).model.speech
    assert speech.prompt == (258, 261, 262) and speech.suppress == (1, 2) and not speech.languages
    to_be_chosen = old | {"forced_decoder_ids": [[1, None], [2, 261]]}
    assert whisper.to_config(to_be_chosen, {"preprocessor_config.json": whispers.PROCESSOR}).model.speech.prompt == ()


def test_a_mesh_of_several_devices_says_the_same(folders_by_name, english, clips):
    model = api.load(folders_by_name["english"], mesh=make_mesh(data=2, fsdp=2, tensor=2))
    assert model.transcribe(clips) == english.transcribe(clips)
