"""Prepares data: any source becomes clean ArrayRecord shards, which mmjax and TFDS read.

    python -m mmjax.prepare 'webdataset:shards/{00000..00099}.tar' data/clean
    python -m mmjax.prepare jsonl:captions.jsonl data/clean --root=images --short_side=384 --exclude=folder:evaluation
    python -m mmjax.prepare parquet:/raw/*.parquet /clean --runner=FlinkRunner --beam_options="--parallelism=64"
    python -m mmjax.prepare parquet:/raw/*.parquet gs://bucket/clean --runner=DataflowRunner --beam_options="..."

SOURCE is KIND:LOCATION as in a recipe's streams (docs/data.md); OUT is a new folder: a path, or with the package gcsfs
or s3fs gs://BUCKET/FOLDER or s3://BUCKET/FOLDER. Records are dropped that cannot be read, are too small, too elongated
or without a fitting caption, and images that are there already: the record that comes first stays. The rest keeps its
order. Two images are nearly the same when their 64-bit perceptual hashes differ in at most --near_distance bits; it
sees brightness alone, so use --near_distance=-1 for drawings that differ in colour. The same command goes on with a
preparation that was stopped. OUT/manifest.json tells what was dropped and why.
Exit codes: 0 done, 2 a mistake in the flags or no record left, 130 stopped by Ctrl-C.
"""

import _thread
import contextlib
import io
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator

from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from mmjax import cli
from mmjax.errors import UserError

_SPLIT = flags.DEFINE_string("split", "", "the source's split")
_FIELDS = flags.DEFINE_list("fields", [], cli.FIELDS)
_ROOT = flags.DEFINE_string("root", "", "the folder in which the images that the source names lie")
_NAME = flags.DEFINE_string("name", None, "the data set's name, in file names and for TFDS; by default that of OUT")
_OUT_SPLIT = flags.DEFINE_string("out_split", "train", "the split's name, in file names and for TFDS")
_SHARDS = flags.DEFINE_integer("shards", 8, "how many files are written")
_SHORT_SIDE = flags.DEFINE_integer("short_side", 0, "pixels to which larger images are shrunk, as JPEG; 0: none is")
_MIN_SIDE = flags.DEFINE_integer("min_side", 16, "pixels that the shorter side has at least")
_MAX_ASPECT = flags.DEFINE_float("max_aspect", 8.0, "how many times its shorter side the longer one may be; 0: any")
_MIN_CAPTION = flags.DEFINE_integer("min_caption", 1, "characters; shorter captions are left out")
_MAX_CAPTION = flags.DEFINE_integer("max_caption", 1000, "characters; longer captions are left out")
_KEEP_UNCAPTIONED = flags.DEFINE_bool("keep_uncaptioned", False, "keep records without captions too")
_NEAR_DISTANCE = flags.DEFINE_integer(
    "near_distance", 3, "bits of 64 in which hashes of nearly the same images differ; 0: in none; -1: keep such images"
)
_EXCLUDE = flags.DEFINE_multi_string("exclude", [], "a source whose images are dropped; may be given several times")
_EXCLUDE_SPLIT = flags.DEFINE_multi_string("exclude_split", [], "its split; one for all of them, or one for each")
_EXCLUDE_ROOT = flags.DEFINE_multi_string("exclude_root", [], "its --root; one for all of them, or one for each")
_RUNNER = flags.DEFINE_string("runner", "DirectRunner", "the Apache Beam runner")
_BEAM_OPTIONS = flags.DEFINE_string("beam_options", "", "options for Beam and its runner, as on a command line")
_WORKERS = flags.DEFINE_integer("workers", 0, "threads of the DirectRunner; 0: one for each core")
_DEBUG = flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")

CONSOLE = Console(file=sys.stderr, highlight=False)
POLL_SECONDS = 0.2
LINE_SECONDS = 30  # between two lines where there is no terminal


def main(arguments: list[str]) -> int:
    """Prepares as the flags say; returns the exit code."""
    source, out = arguments
    if not _DEBUG.value:
        logging.getLogger().setLevel(logging.ERROR)
    from mmjax.data import preparation

    signal.signal(signal.SIGINT, _interrupt)
    # Beam's workers print tracebacks of what is raised here too.
    with contextlib.nullcontext() if _DEBUG.value else contextlib.redirect_stderr(io.StringIO()):
        manifest, was_there = preparation.prepare(_settings(source, out), out, _RUNNER.value, _options(), _watch)
    if was_there:
        CONSOLE.print(f"{out} is whole already: nothing to do", markup=False)
    _report(manifest, out.rstrip("/"))
    return 0


def _settings(source: str, out: str):
    from mmjax.data.preparation_plan import Settings

    splits = _for_each_exclude("exclude_split", _EXCLUDE_SPLIT.value)
    roots = _for_each_exclude("exclude_root", _EXCLUDE_ROOT.value)
    return Settings(
        source=source,
        split=_SPLIT.value,
        fields=cli.parse_fields(_FIELDS.value),
        root=_ROOT.value,
        exclude=tuple(zip(_EXCLUDE.value, splits, roots, strict=True)),
        name=_NAME.value or re.sub(r"\W", "_", os.path.basename(os.path.realpath(out))) or "dataset",
        out_split=_OUT_SPLIT.value,
        shards=_SHARDS.value,
        short_side=_SHORT_SIDE.value,
        min_side=_MIN_SIDE.value,
        max_aspect=_MAX_ASPECT.value,
        min_caption=_MIN_CAPTION.value,
        max_caption=_MAX_CAPTION.value,
        keep_uncaptioned=_KEEP_UNCAPTIONED.value,
        near_distance=_NEAR_DISTANCE.value,
    )


def _for_each_exclude(flag: str, values: list[str]) -> list[str]:
    count = len(_EXCLUDE.value)
    if len(values) not in (0, 1, count):
        raise UserError(f"--{flag}: {len(values)} of them for {count} times --exclude")
    return values if len(values) == count else (values or [""]) * count


def _options() -> list[str]:
    options = shlex.split(_BEAM_OPTIONS.value)
    if _RUNNER.value != "DirectRunner":
        return options
    workers = _WORKERS.value or len(os.sched_getaffinity(0))
    # Threads suffice: decoding and encoding release Python's lock.
    mode = "multi_threading" if workers > 1 else "in_memory"
    return [f"--direct_num_workers={workers}", f"--direct_running_mode={mode}", *options]


_interrupted = threading.Event()


def _interrupt(number: int, frame) -> None:
    _interrupted.set()
    raise KeyboardInterrupt


@contextlib.contextmanager
def _watch(title: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """Asks in a thread how far the pipeline is: a bar on a terminal, a line now and then elsewhere."""
    ended = threading.Event()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=CONSOLE, disable=not CONSOLE.is_terminal) as progress:
        task = progress.add_task(title, total=total)

        def poll():
            told = time.monotonic()
            while not ended.wait(POLL_SECONDS):
                if _interrupted.is_set():  # what Beam was doing just then may have swallowed it
                    _thread.interrupt_main()
                progress.update(task, completed=min(done(), total))
                if not CONSOLE.is_terminal and time.monotonic() - told > LINE_SECONDS:
                    told = time.monotonic()
                    CONSOLE.print(f"{title}: {done():,} of {total:,}", markup=False)

        if not CONSOLE.is_terminal:
            CONSOLE.print(title, markup=False)
        thread = threading.Thread(target=poll, daemon=True)
        thread.start()
        try:
            yield
            if _interrupted.is_set():
                raise KeyboardInterrupt
            progress.update(task, completed=total)
        finally:
            ended.set()
            thread.join()


def _report(manifest: dict, out: str) -> None:
    CONSOLE.print(f"{manifest['settings']['source']} -> {out}", markup=False, soft_wrap=True)
    table = Table()
    table.add_column("")
    table.add_column("records", justify="right")
    table.add_column("examples", overflow="fold")
    table.add_row("in", f"{manifest['in']:,}", "")
    for reason, dropped in manifest["dropped"].items():
        table.add_row(f"dropped: {reason}", f"{dropped['records']:,}", _plain("\n".join(dropped["examples"])))
    table.add_row("out", f"{manifest['out']:,}", "")
    CONSOLE.print(table)
    if manifest["unreadable_in_excluded"]:
        CONSOLE.print(f"{manifest['unreadable_in_excluded']:,} records of excluded sources could not be read")
    size = sum(shard["bytes"] for shard in manifest["shards"])
    lines = [
        f"{len(manifest['shards'])} shards, {size / 2**20:,.1f} MiB; what happened: {out}/manifest.json",
        f"train on it:  --config.streams.train.source='array_record:{out}/*.array_record*'",
    ]
    if "://" not in out:  # TFDS reads ArrayRecord files from disks only
        split = manifest["settings"]["out_split"]
        lines.append(f'with TFDS:    tfds.builder_from_directory("{out}").as_data_source("{split}")')
    for line in lines:
        CONSOLE.print(line, markup=False, soft_wrap=True)


def _plain(text: str):
    """Text in which brackets mean nothing, and control characters are spelt out: keys come from the data."""
    from rich.text import Text

    return Text("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__, positional=("SOURCE", "OUT")))
