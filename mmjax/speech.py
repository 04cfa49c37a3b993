"""From recordings to texts, with a decoder that reads an audio tower's tokens."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Int, PyTree
from ml_collections import ConfigDict

from mmjax.config import suggest
from mmjax.data import audio as audio_ops
from mmjax.errors import UserError
from mmjax.models.generate import Strategy, generate, make_strategy
from mmjax.models.multimodal import MultimodalModel, audio_samples

if TYPE_CHECKING:
    from mmjax.model import Model

BATCH_SIZE = 16  # windows of 30 seconds
TASKS = ("transcribe", "translate")
_TO_DETECT = -1  # in place of a language's id


class _Window(NamedTuple):
    """A part of a recording: whose, which one of all windows, and its samples."""

    owner: int
    number: int
    samples: np.ndarray


def loader(encoder: ConfigDict, audios: Sequence[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """Row numbers -> the first window of each of these recordings, [rows, samples]."""

    def load_rows(indices: np.ndarray) -> np.ndarray:
        read = (audio_ops.samples_of(audios[index], encoder.sample_rate) for index in indices)
        return np.stack([audio_ops.windows(samples, audio_samples(encoder))[0] for samples in read])

    return load_rows


def transcribe(
    model: "Model",
    audios: Sequence[Any],
    language: str | None,
    task: str,
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
) -> list[str]:
    """See `Model.transcribe`. A few batches of windows are in memory at a time, not all recordings."""
    model.needs("audio", "read recordings")
    model.needs("decoder", "transcribe recordings")
    if not model.config.model.speech:
        raise UserError("this model cannot transcribe: config.model.speech says nothing of how it is asked to")
    if model.tokenizer is None:
        raise UserError("this model came without a tokenizer, so it has ids instead of texts")
    if isinstance(audios, str | Path):
        raise UserError(f"transcribe takes a list of recordings: [{str(audios)!r}] for one")
    if batch_size < 1:
        raise UserError(f"batch_size {batch_size} is less than 1")
    speech = model.config.model.speech
    prompt = _prompt(speech, language, task)
    text = model.config.model.encoders.text
    strategy = make_strategy(options, text.vocab_size)
    strategy = strategy._replace(
        suppress=(*speech.suppress, *strategy.suppress),
        suppress_first=(*speech.suppress_first, *strategy.suppress_first),
    )
    run = partial(_transcribe, module=model.module, strategy=strategy, end_id=text.end_id, seed=seed)
    texts: list[list[str]] = [[] for _ in audios]
    languages: dict[int, int] = {}  # of the recordings that windows have been transcribed of
    for windows in _batches(model.config.model.encoders.audio, audios, batch_size):
        loaders = _loaders(windows, prompt, languages, text.length)
        for ids in model.batches(run, len(windows), loaders, batch_size):
            for window, row in zip(windows, ids, strict=True):
                texts[window.owner].append(model.tokenizer.decode(row))
                if speech.languages:
                    languages[window.owner] = int(row[1])
    return [" ".join(filter(None, parts)) for parts in texts]


def _prompt(speech: ConfigDict, language: str | None, task: str) -> list[int]:
    """The ids that texts begin with."""
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; {suggest(task, TASKS)}")
    if not speech.languages:
        if task != "transcribe" or language not in (None, "en"):
            asked = task if task != "transcribe" else f"transcribe {language!r}"
            raise UserError(f"this model cannot {asked}: it knows one language, and transcribes that")
        return [speech.start_id, *speech.prompt]
    if language is not None and language not in speech.languages:
        raise UserError(f"unknown language {language!r}; {suggest(language, speech.languages)}")
    found = _TO_DETECT if language is None else speech.language_ids[speech.languages.index(language)]
    task_id = speech[f"{task}_id"]
    return [speech.start_id, found, *([task_id] if task_id >= 0 else []), *speech.prompt]


def _batches(encoder: ConfigDict, audios: Sequence[Any], batch_size: int) -> Iterator[list[_Window]]:
    """All windows of all recordings, as many at a time."""
    pending: list[_Window] = []
    number = 0
    for owner, audio in enumerate(audios):
        samples = audio_ops.samples_of(audio, encoder.sample_rate)
        for window in audio_ops.windows(samples, audio_samples(encoder)):
            pending.append(_Window(owner, number, window))
            number += 1
            if len(pending) == batch_size:
                yield pending
                pending = []
    if pending:
        yield pending


def _loaders(
    windows: Sequence[_Window], prompt: Sequence[int], languages: dict[int, int], length: int
) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """What `_transcribe` reads, by rows. `first` is the place of a recording's first window in the batch."""
    owners = [window.owner for window in windows]
    prompts = np.zeros((len(windows), length), np.int32)
    prompts[:, : len(prompt)] = prompt
    if _TO_DETECT in prompt:
        prompts[:, 1] = [languages.get(owner, _TO_DETECT) for owner in owners]
    lengths = np.full(len(windows), len(prompt), np.int32)
    return {
        "audio": lambda rows: np.stack([windows[row].samples for row in rows]),
        "first": lambda rows: np.array([owners.index(owners[row]) for row in rows], np.int32),
        "number": lambda rows: np.array([windows[row].number for row in rows], np.int32),
        "prompt": lambda rows: prompts[rows],
        "prompt_length": lambda rows: lengths[rows],
    }


@partial(jax.jit, static_argnames=("module", "strategy", "end_id"))
def _transcribe(
    params: PyTree[Array], batch: dict[str, Array], module: MultimodalModel, strategy: Strategy, end_id: int, seed: int
) -> Int[Array, "windows length"]:
    """The ids of a batch of windows, prompts included; the second one is the language's where there are several."""
    tokens, _ = module.apply({"params": params}, "audio", batch["audio"], method="tokens")
    prompt, languages = batch["prompt"], module.config["speech"]["language_ids"]
    if languages:
        logits, _ = module.apply({"params": params}, tokens, prompt[:, 0], method="begin_caption")
        likeliest = jnp.asarray(languages)[logits[:, jnp.asarray(languages)].argmax(axis=1)]
        detected = likeliest[batch["first"]]
        prompt = prompt.at[:, 1].set(jnp.where(prompt[:, 1] == _TO_DETECT, detected, prompt[:, 1]))
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), batch["number"])
    ids, _ = generate(module, params, tokens, prompt, batch["prompt_length"], keys, end_id, strategy)
    return jax.lax.with_sharding_constraint(ids, P())
