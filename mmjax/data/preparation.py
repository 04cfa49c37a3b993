"""Turns any source into clean ArrayRecord shards, with Apache Beam: on this machine or on a cluster.

1. Scan: every record is read, checked and hashed; a file of verdicts for each chunk of records.
2. Compare: records that are equal, or nearly, meet by hash (`GroupByKey`); no image is moved.
3. Write: the records that stay, in their order, are read again; each shard is written by one worker.

What is done is kept in OUT/.prepare, so that the same call goes on where it was stopped, and gives the same bytes.
OUT is a local folder or a remote one (`mmjax.data.preparation_storage`).
"""

import io
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import numpy as np
from etils import epath

from mmjax.data import preparation_folder
from mmjax.data import preparation_storage as storage
from mmjax.data import preparation_work as work
from mmjax.data.preparation_plan import ANY_FIELDS, EXACT, REASONS, Origin, Plan, Settings
from mmjax.errors import UserError, one_line

EXAMPLES = 3  # that the report names for each reason
_USER_ERROR = re.compile(r"mmjax\.errors\.(?:User|Record)Error: (.*?)(?: \[while running|\n|$)")

# Shows a bar (title, total, how many are done by now) while the block runs.
Watch = Callable[[str, int, Callable[[], int]], AbstractContextManager]


@contextmanager
def silent(title: str, total: int, done: Callable[[], int]) -> Iterator[None]:
    """A `Watch` that shows nothing."""
    yield


def prepare(
    settings: Settings,
    out: str | os.PathLike,
    runner: str = "DirectRunner",
    options: Sequence[str] = (),
    watch: Watch = silent,
) -> tuple[dict, bool]:
    """Prepares `settings.source` in the folder `out`, or goes on with what is there.

    Args:
      settings: what is made.
      out: a new folder, or one where this call with the same settings was stopped; all workers reach it. A path, or
        gs://BUCKET/FOLDER or s3://BUCKET/FOLDER; nothing keeps two processes out of one remote folder.
      runner: a Beam runner's name.
      options: for Beam, as on a command line.
      watch: shows progress.

    Returns:
      The manifest, and whether everything was there already.

    Raises:
      UserError: a source cannot be opened, `out` holds something else or cannot be reached, or no record is left.
    """
    plan = Plan(settings, storage.locate(out), _origins(settings))
    with preparation_folder.claimed(plan):
        preparation_folder.check_same(plan)
        run = partial(_run, runner=runner, options=options)
        manifest = preparation_folder.finished(plan)
        if manifest:
            return manifest, True
        _beam()
        if storage.size(plan.state / "summary.json") < 0:
            _scan(plan, run, watch)
            _compare(plan, run, watch)
        summary = json.loads(storage.read(plan.state / "summary.json"))
        if not summary["out"]:
            raise UserError(f"no record of {settings.source} is left: {_most_frequent(summary['dropped'])}")
        _write(plan, summary["out"], run, watch)
        return preparation_folder.finish(plan, summary), False


def _beam():
    """Apache Beam, quiet: what a worker raises is raised here too."""
    logging.getLogger("apache_beam").setLevel(logging.CRITICAL)
    try:
        import apache_beam
        import tensorflow_datasets  # noqa: F401  needed at the end; better missed now

        return apache_beam
    except ImportError as error:
        raise UserError(f"preparing data needs more packages: pip install 'mmjax[prepare]' ({error})") from error


def _origins(settings: Settings) -> tuple[Origin, ...]:
    wanted = [(settings.source, settings.split, settings.fields, settings.root)]
    wanted += [(source, split, ANY_FIELDS, root) for source, split, root in settings.exclude]
    origins, first = [], 0
    for arguments in wanted:
        source = work.open_source(*arguments)
        first = first - len(source) if origins else 0
        origins.append(Origin(*arguments, source.fingerprint, len(source), first))
    return tuple(origins)


def _scan(plan: Plan, run: Callable, watch: Watch) -> None:
    folder = plan.state / "scan"
    storage.make(folder)
    chunks = [(number, *chunk) for number, origin in enumerate(plan.origins) for chunk in origin.chunks]

    def find_missing():
        there = set(storage.names(folder))
        return [chunk for chunk in chunks if plan.scanned(*chunk[:2]).name not in there]

    missing = find_missing()

    def build(pipeline, beam):
        return _spread(pipeline, beam, missing) | "scan" >> beam.Map(partial(work.scan_chunk, plan))

    if missing:
        with watch("reading chunks of records", len(chunks), storage.counter(folder, "*.json")):
            run(build)
    if missing and find_missing():
        raise UserError(f"not all workers write into the same {plan.out}")


def _compare(plan: Plan, run: Callable, watch: Watch) -> None:
    """Finds duplicates, and writes kept.npy (indices), twins.npy (index, that of an equal image) and summary.json."""
    folder = plan.state / "pairs"
    storage.remove(folder)  # of a comparison that was stopped
    storage.make(folder)
    chunks = [(number, begin) for number, origin in enumerate(plan.origins) for begin, _ in origin.chunks]
    distance = plan.settings.near_distance

    def build(pipeline, beam):
        rows = _spread(pipeline, beam, chunks) | "read" >> beam.FlatMap(partial(work.read_hashes, plan))
        found = [
            rows | "digest" >> beam.Map(work.by_digest) | "same" >> beam.GroupByKey() | beam.FlatMap(work.exact_pairs)
        ]
        if distance >= 0:
            near = rows | "bands" >> beam.FlatMap(partial(work.by_band, distance)) | "close" >> beam.GroupByKey()
            found.append(near | "distance" >> beam.FlatMap(partial(work.near_pairs, distance)))
        files = found | beam.Flatten() | "file" >> beam.Map(work.by_file) | "together" >> beam.GroupByKey()
        return files | "pairs" >> beam.Map(partial(work.write_pairs, plan))

    with watch("comparing images", 1, lambda: 0):
        run(build)
        reasons, partners = _judge(plan, folder)
    kept = np.flatnonzero(reasons == len(REASONS))
    equal = np.flatnonzero(reasons == REASONS.index(EXACT)).tolist()
    twins = sorted((partners[record], record) for record in equal)
    _save(plan.state / "kept.npy", kept)
    _save(plan.state / "twins.npy", np.array(twins, np.int64).reshape(-1, 2))
    summary = {"in": len(reasons), "out": len(kept), "dropped": _dropped(plan, reasons, partners)}
    summary["unreadable_in_excluded"] = _unreadable(plan)
    storage.write(plan.state / "summary.json", json.dumps(summary, indent=1).encode())
    storage.remove(folder)
    storage.remove(plan.state / "scan")


def _save(path: epath.Path, array: np.ndarray) -> None:
    content = io.BytesIO()
    np.save(content, array)
    storage.write(path, content.getbuffer())


def _verdicts(plan: Plan, number: int) -> Iterator[list]:
    """The rows of a source's records, in their order."""
    chunks = plan.origins[number].chunks
    for content in storage.read_all([plan.scanned(number, begin) for begin, _ in chunks]):
        yield from json.loads(content)


def _judge(plan: Plan, folder: epath.Path) -> tuple[np.ndarray, dict[int, int]]:
    """The number of each record's reason (len(REASONS): it stays), and which record duplicates resemble."""
    reasons = np.fromiter((row[0] for row in _verdicts(plan, 0)), np.uint8, plan.origins[0].records)
    partners: dict[int, int] = {}
    for content in storage.read_all([folder / name for name in storage.names(folder)]):
        for reason, record, partner in (map(int, line.split()) for line in content.splitlines()):
            better = (reason, partner) < (int(reasons[record]), partners.get(record, partner + 1))
            if better:
                reasons[record], partners[record] = reason, partner
    return reasons, partners


def _dropped(plan: Plan, reasons: np.ndarray, partners: dict[int, int]) -> dict:
    dropped = {}
    for number, reason in enumerate(REASONS):
        found = np.flatnonzero(reasons == number)
        if len(found):
            examples = [_told(plan, int(record), partners.get(int(record))) for record in found[:EXAMPLES]]
            dropped[reason] = {"records": len(found), "examples": examples}
    return dropped


def _unreadable(plan: Plan) -> int:
    """How many records of excluded sources could not be compared.

    Raises:
      UserError: none of a source could: it would exclude nothing.
    """
    total = 0
    for number, origin in list(enumerate(plan.origins))[1:]:
        unreadable = [row for row in _verdicts(plan, number) if row[0] != len(REASONS)]
        if len(unreadable) == origin.records:
            raise UserError(f"no image of the excluded source {origin.source} can be read: {unreadable[0][1]}")
        total += len(unreadable)
    return total


def _told(plan: Plan, record: int, partner: int | None) -> str:
    return _key(plan, record) + ("" if partner is None else f" ({_key(plan, partner)})")


def _key(plan: Plan, record: int) -> str:
    number, origin = next((n, o) for n, o in enumerate(plan.origins) if o.first <= record < o.first + o.records)
    index = record - origin.first
    begin = next(begin for begin, end in origin.chunks if begin <= index < end)
    return json.loads(storage.read(plan.scanned(number, begin)))[index - begin][1]


def _write(plan: Plan, kept: int, run: Callable, watch: Watch) -> None:
    total = min(plan.settings.shards, kept)
    storage.remove(plan.state / "partial")
    for folder in ("partial", "shards"):
        storage.make(plan.state / folder)
    whole = preparation_folder.written(plan)
    missing = [number for number in range(total) if number not in whole]

    def build(pipeline, beam):
        return _spread(pipeline, beam, missing) | "write" >> beam.Map(partial(work.write_shard, plan, total))

    if missing:
        with watch("writing records", kept, _records_written(plan, kept, total, len(whole))):
            run(build)


def _records_written(plan: Plan, kept: int, total: int, whole: int) -> Callable[[], int]:
    """Counts about: by what local workers tell, or by whole shards."""
    if storage.is_remote(plan.out):
        shards = storage.counter(plan.out, "*.array_record-*")
        return lambda: shards() * kept // total
    ticks = plan.state / "partial"
    return lambda: whole * kept // total + work.TICK * sum(map(storage.size, ticks.glob("*.ticks")))


def _most_frequent(dropped: dict) -> str:
    reason = max(dropped, key=lambda reason: dropped[reason]["records"], default="the source is empty")
    examples = dropped.get(reason, {}).get("examples", [])
    return reason + (f', such as "{examples[0]}"' if examples else "")


def _run(build: Callable, runner: str, options: Sequence[str]) -> None:
    """Runs a pipeline to its end.

    Raises:
      UserError: a worker raised one, or the runner does not exist or lacks a package.
    """
    beam = _beam()
    from apache_beam.options.pipeline_options import PipelineOptions
    from apache_beam.runners.portability.fn_api_runner import FnApiRunner

    try:
        # "DirectRunner" would first try to download the Prism runner.
        chosen = FnApiRunner() if runner == "DirectRunner" else runner
        pipeline = beam.Pipeline(runner=chosen, options=PipelineOptions(list(options)))
    except (ImportError, ValueError) as error:
        raise UserError(f"runner {runner}: {one_line(error)}") from error
    try:
        with pipeline:
            build(pipeline, beam)
    except Exception as error:  # what a worker raises comes as text inside the runner's own exceptions
        if "KeyboardInterrupt" in str(error):
            raise KeyboardInterrupt from error
        told = _USER_ERROR.findall(str(error))
        if isinstance(error, UserError) or not told:
            raise
        raise UserError(told[-1]) from error


def _spread(pipeline, beam, items: Iterable):
    return pipeline | beam.Create(list(items)) | beam.Reshuffle()
