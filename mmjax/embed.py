"""Embeds a data set: the features of every record's image and caption, in files.

    python -m mmjax.embed --model=runs/quickstart --source=openmoji:en --split=test --out=embedded
    python -m mmjax.embed --model=google/siglip-base-patch16-224 --source='webdataset:{00000..00099}.tar' --out=embedded
    python -m mmjax.embed --model=runs/clip --source=folder:photos --modalities=image --format=npy --out=embedded

MODEL is what `mmjax.load` takes, SOURCE is KIND:LOCATION as in a recipe's streams (docs/data.md). OUT becomes a folder
with a file for each --part_rows records, in the order of the source: part-00000.parquet, ..., and embed.json, which
says what they are of. The same command goes on with what was stopped; a folder of another model or source is refused.
Embeddings are float32 and of unit norm. A record that cannot be read keeps its row: `valid` is false, `error` says why,
the embedding is zeros; with more than --max_broken_fraction of them the program stops.
On several hosts, start it in every process, as `mmjax.main`: each embeds parts of its own.
Exit codes: 0 done, 2 a mistake in the flags or the data, 130 stopped by Ctrl-C.
"""

import dataclasses
import itertools
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from mmjax import cli
from mmjax.errors import UserError

_MODEL = flags.DEFINE_string("model", None, "what `mmjax.load` takes: a run, a folder, a name on the hub")
_STEP = flags.DEFINE_integer("step", None, "which checkpoint of a run; the latest by default")
_REVISION = flags.DEFINE_string("revision", None, "which version on the hub: a branch, tag or commit")
_SOURCE = flags.DEFINE_string("source", None, "the data set, KIND:LOCATION")
_SPLIT = flags.DEFINE_string("split", "", "the source's split")
_FIELDS = flags.DEFINE_list("fields", [], cli.FIELDS)
_ROOT = flags.DEFINE_string("root", "", "the folder in which the images that the source names lie")
_CAPTIONS = flags.DEFINE_list("captions", [], "groups of captions; the first caption in them is embedded; default: all")
_MODALITIES = flags.DEFINE_list("modalities", [], "image, text or both; by default what the model has")
_OUT = flags.DEFINE_string("out", None, "the folder to write")
_FORMAT = flags.DEFINE_string("format", "parquet", "parquet, or npy: the embeddings in arrays beside the parquet files")
_PART_ROWS = flags.DEFINE_integer("part_rows", 8192, "records of a file")
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "records at a time, on all devices of a process together")
_THREADS = flags.DEFINE_integer("threads", 0, "that read records; 0: one for each core")
_BROKEN = flags.DEFINE_float("max_broken_fraction", 0.05, "of records that cannot be read; with more, it stops")
flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")

MODALITIES = ("image", "text")
FORMATS = ("parquet", "npy")
FEW = 200  # the fraction is of at least so many records: one broken record among the first is no verdict
NAMED = 10  # so many of these are told of as they come
LINE_SECONDS = 10  # between two lines about progress where there is no terminal


def main() -> int:
    """Embeds as the flags say; returns the exit code."""
    _check_flags()
    fields = cli.parse_fields(_FIELDS.value)
    from mmjax import runtime

    runtime.configure()
    import jax

    from mmjax import api
    from mmjax.data.sources import open_source
    from mmjax.embedding import Records, Store
    from mmjax.sharding import distributed
    from mmjax.sharding.mesh import make_mesh
    from mmjax.training import feedback

    config = api.load_config(_MODEL.value, _REVISION.value)
    distributed.initialize(config.distributed)
    modalities = tuple(name for name in MODALITIES if name in (_MODALITIES.value or api.make_module(config).parts))
    if not modalities:
        raise UserError(f"--model={_MODEL.value}: it embeds neither images nor texts")
    if "image" not in modalities:
        fields = dataclasses.replace(fields, image=None)
    source = open_source(_SOURCE.value, _SPLIT.value, fields, _ROOT.value, feedback.data_progress)
    model = api.load(_MODEL.value, _STEP.value, make_mesh(devices=jax.local_devices()), _REVISION.value)
    for modality in modalities:
        model.needs(modality, f"embed inputs of the modality {modality}")
    store = Store(Path(_OUT.value), _description(model, source, fields, modalities))
    missing = store.missing()
    if missing:
        _embed(store, missing, model, Records(source, model, modalities, _CAPTIONS.value))
    distributed.any_process(False)  # a process that ends before the others would not be waited for
    done = "is whole" if missing else "is whole already: nothing to do"
    feedback.say(f"{store.folder} {done} ({len(source):,} records in {store.parts:,} parts)")
    return 0


def _check_flags() -> None:
    for flag, meaning in ((_MODEL, "what `mmjax.load` takes"), (_SOURCE, "KIND:LOCATION"), (_OUT, "a folder")):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing: {meaning}")
    for flag, known in ((_MODALITIES, MODALITIES), (_FORMAT, FORMATS)):
        for value in [flag.value] if isinstance(flag.value, str) else flag.value:
            if value not in known:
                raise UserError(f'--{flag.name}: unknown "{value}"; known: {", ".join(known)}')
    for flag, least in ((_PART_ROWS, 1), (_BATCH_SIZE, 1), (_THREADS, 0)):
        if flag.value < least:
            raise UserError(f"--{flag.name}={flag.value}: the least is {least}")
    if not 0 <= _BROKEN.value <= 1:
        raise UserError(f"--max_broken_fraction={_BROKEN.value:g} is no fraction between 0 and 1")
    if "://" in _OUT.value:
        raise UserError(f"--out={_OUT.value}: it has to be a folder of this machine")
    if _CAPTIONS.value and _MODALITIES.value and "text" not in _MODALITIES.value:
        raise UserError("--captions chooses what is embedded as text, and --modalities leaves text out")


def _description(model: Any, source: Any, fields: Any, modalities: Sequence[str]) -> dict[str, Any]:
    """What goes into embed.json."""
    import jax

    from mmjax import __version__, files
    from mmjax.training.checkpoint import checksums

    with jax.set_mesh(model.mesh):
        sums = checksums(model.params)
    return {
        "model": _MODEL.value,
        "step": model.step,
        "model_fingerprint": files.fingerprint(sorted(sums.items())),
        "source": _SOURCE.value,
        "split": _SPLIT.value,
        "source_fingerprint": source.fingerprint,
        "fields": {"image": fields.image, "captions": [*fields.captions], "label": fields.label},
        "captions": _CAPTIONS.value,
        "modalities": {name: model.config.model.embed_dim for name in modalities},  # and their widths
        "rows": len(source),
        "part_rows": _PART_ROWS.value,
        "format": _FORMAT.value,
        "mmjax": __version__,
    }


def _embed(store: Any, parts: Sequence[int], model: Any, records: Callable) -> None:
    """Embeds and writes these parts of the `mmjax.embedding.Store`.

    Raises:
      UserError: too many records cannot be read.
    """
    from mmjax.embedding import encode
    from mmjax.sharding import distributed

    # A part begins with a batch of its own, so that what goes on computes what would have been computed in one piece.
    batches = [(part, rows) for part in parts for rows in _batches(store.rows_of(part))]
    threads = _THREADS.value or os.cpu_count() or 1
    with ThreadPoolExecutor(threads) as pool, Progress(sum(len(rows) for _, rows in batches)) as progress:
        try:
            reading = ((part, pool.submit(records, rows)) for part, rows in batches)
            ahead = distributed.prefetch(reading, 2 * threads, lead=2 * threads)  # all threads read from the start
            for part, futures in itertools.groupby(ahead, key=lambda each: each[0]):
                rows, embeddings = [], defaultdict(list)
                for _, future in futures:
                    batch = future.result()
                    for modality, values in encode(model, batch, _BATCH_SIZE.value).items():
                        embeddings[modality].append(values)
                    rows += batch.rows
                    progress.add([row.error for row in batch.rows])
                store.write(part, rows, {modality: np.concatenate(values) for modality, values in embeddings.items()})
        finally:
            pool.shutdown(cancel_futures=True)


def _batches(rows: range) -> list[range]:
    return [rows[start : start + _BATCH_SIZE.value] for start in range(0, len(rows), _BATCH_SIZE.value)]


class Progress:
    """Shows how many records are done, a bar on a terminal, else a line now and then; and which cannot be read."""

    def __init__(self, total: int):
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        from mmjax.training import feedback

        self._total, self._done, self._broken = total, 0, 0
        self._began = self._told = time.monotonic()
        columns = (TextColumn("embedding"), BarColumn(), MofNCompleteColumn(), TextColumn("ETA"), TimeRemainingColumn())
        self._bar = Bar(*columns, console=feedback.CONSOLE, disable=not feedback.CONSOLE.is_terminal)
        self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception) -> None:
        from mmjax.training import feedback

        self._bar.stop()
        if self._broken:
            feedback.say(f"{self._broken:,} of {self._done:,} records could not be read: `error` says why, row by row")

    def add(self, errors: Sequence[str | None]) -> None:
        """So many more records are done.

        Raises:
          UserError: too many of all cannot be read.
        """
        from mmjax.training import feedback

        self._done += len(errors)
        for error in filter(None, errors):
            self._broken += 1
            if self._broken <= NAMED:
                feedback.say(f"cannot be read: {error}")
        if self._broken > _BROKEN.value * max(self._done, FEW):
            raise UserError(
                f"{self._broken:,} of {self._done:,} records cannot be read, more than "
                f"--max_broken_fraction={_BROKEN.value:g} allows; the last one: {error}"
            )
        self._bar.update(self._task, completed=self._done)
        now = time.monotonic()
        if self._bar.disable and now - self._told > LINE_SECONDS:
            self._told, rate = now, self._done / (now - self._began)
            left = feedback.clock((self._total - self._done) / rate)
            feedback.say(f"{self._done:,}/{self._total:,} records · {rate:,.3g} a second · ETA {left}")


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
