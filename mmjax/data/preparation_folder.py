"""The folder of a preparation: whose it is, what in it is whole, and what describes it at the end."""

import fcntl
import importlib.metadata
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from mmjax.data.preparation_plan import Plan
from mmjax.errors import UserError
from mmjax.files import write_atomically

MANIFEST = "manifest.json"
_PACKAGES = ("mmjax", "apache-beam", "array-record", "numpy", "opencv-python-headless", "tensorflow-datasets")


@contextmanager
def claimed(plan: Plan) -> Iterator[None]:
    """Makes the folder, and holds it against a second process of this machine."""
    out = Path(plan.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        strangers = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        if strangers and not (plan.state / "settings.json").exists():
            raise UserError(f"{out} holds {strangers[0]}, which no preparation made: name a new or an empty folder")
        plan.state.mkdir(exist_ok=True)
        lock = (plan.state / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another process is preparing data in {out}") from None
        except OSError:
            pass  # a file system without locks
        yield


def check_same(plan: Plan) -> None:
    """Writes down what is made here, or compares with what was.

    Raises:
      UserError: the folder was begun with other settings or other data.
    """
    wanted = _described(plan)
    path = plan.state / "settings.json"
    if not path.exists():
        write_atomically(path, json.dumps(wanted, indent=1).encode())
        return
    there = json.loads(path.read_text())
    for key in wanted:
        if there.get(key) != wanted[key] and "fingerprint" in key:
            raise UserError(f"the data has changed since {plan.out} was begun: name another folder, or delete this one")
        if there.get(key) != wanted[key]:
            raise UserError(
                f"{plan.out} was begun with {key} {there.get(key)}, not {wanted[key]}: name another folder, or delete "
                "this one"
            )


def _described(plan: Plan) -> dict:
    described = asdict(plan.settings)
    described["fingerprint"], *excluded = (origin.fingerprint for origin in plan.origins)
    return json.loads(json.dumps(described | {"exclude_fingerprints": excluded}))  # with lists, as they are read again


def finished(plan: Plan) -> dict | None:
    """The manifest, where it and all its shards are there."""
    path = Path(plan.out) / MANIFEST
    manifest = json.loads(path.read_text()) if path.exists() else None
    if manifest and all(_whole(path.with_name(shard["file"]), shard) for shard in manifest["shards"]):
        return manifest
    return None


def _whole(path: Path, shard: dict) -> bool:
    return path.exists() and path.stat().st_size == shard["bytes"]


def written(plan: Plan, number: int, total: int) -> dict | None:
    """What is in a shard, where it is whole: its file, records, bytes and sha256."""
    sidecar = plan.state / "shards" / f"{number:05d}.json"
    shard = json.loads(sidecar.read_text()) if sidecar.exists() else None
    return shard if shard and _whole(plan.shard(number, total), shard) else None


def finish(plan: Plan, summary: dict) -> dict:
    """Describes the shards for TFDS and in the manifest, which it returns.

    Raises:
      UserError: a shard is missing.
    """
    total = min(plan.settings.shards, summary["out"])
    shards = [shard for number in range(total) if (shard := written(plan, number, total))]
    if len(shards) < total:
        raise UserError(f"{plan.out} has {len(shards)} of {total} shards: do all workers write into the same folder?")
    _describe_for_tfds(plan, shards)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    manifest = summary | {"settings": _described(plan), "versions": versions, "shards": shards}
    write_atomically(Path(plan.out) / MANIFEST, json.dumps(manifest, indent=1).encode())
    for leftover in ("partial", "pairs", "scan"):
        shutil.rmtree(plan.state / leftover, ignore_errors=True)
    return manifest


def _describe_for_tfds(plan: Plan, shards: list[dict]) -> None:
    """Writes dataset_info.json and features.json, with which TFDS reads the folder."""
    import tensorflow_datasets as tfds

    from mmjax.data.sources.tfds import tfds_features

    settings = plan.settings
    split = tfds.core.SplitInfo(
        name=settings.out_split,
        shard_lengths=[shard["records"] for shard in shards],
        num_bytes=sum(shard["bytes"] for shard in shards),
    )
    tfds.folder_dataset.write_metadata(
        data_dir=plan.out,
        features=tfds_features(),
        split_infos=[split],
        description=f"Prepared by mmjax from {settings.source}.",
        check_data=False,  # it would need TensorFlow
    )
