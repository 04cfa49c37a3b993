"""The folder of a preparation: whose it is, what in it is whole, and what describes it at the end."""

import fcntl
import importlib.metadata
import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import IO

from mmjax.data import preparation_storage as storage
from mmjax.data.preparation_plan import Plan
from mmjax.errors import UserError

MANIFEST = "manifest.json"
_PACKAGES = ("mmjax", "apache-beam", "array-record", "numpy", "opencv-python-headless", "tensorflow-datasets")


@contextmanager
def claimed(plan: Plan) -> Iterator[None]:
    """Makes the folder; a local one is held against a second process of this machine."""
    out = plan.out
    try:
        storage.make(out)
        strangers = [name for name in storage.names(out) if not name.startswith(".")]
        if strangers and storage.size(plan.state / "settings.json") < 0:
            raise UserError(f"{out} holds {strangers[0]}, which no preparation made: name a new or an empty folder")
        storage.make(plan.state)
        lock = nullcontext() if storage.is_remote(out) else (plan.state / "lock").open("w")
    except OSError as error:
        raise UserError(f"cannot write into {out}: {error.strerror}") from error
    with lock as file:
        if file is not None:
            _hold(file, plan)
        yield


def _hold(lock: IO, plan: Plan) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another process is preparing data in {plan.out}") from None
    except OSError:
        pass  # a file system without locks


def check_same(plan: Plan) -> None:
    """Writes down what is made here, or compares with what was.

    Raises:
      UserError: the folder was begun with other settings or other data.
    """
    wanted = _described(plan)
    path = plan.state / "settings.json"
    if storage.size(path) < 0:
        storage.write(path, json.dumps(wanted, indent=1).encode())
        return
    there = json.loads(storage.read(path))
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
    path = plan.out / MANIFEST
    manifest = json.loads(storage.read(path)) if storage.size(path) >= 0 else None
    if manifest and all(_whole(plan, manifest["shards"])):
        return manifest
    return None


def _whole(plan: Plan, shards: list[dict]) -> Iterator[bool]:
    sizes = storage.sizes([plan.out / shard["file"] for shard in shards])
    return (size == shard["bytes"] for size, shard in zip(sizes, shards, strict=True))


def written(plan: Plan) -> dict[int, dict]:
    """What is in each shard that is whole, by number: its file, records, bytes and sha256."""
    folder = plan.state / "shards"
    sidecars = [name for name in storage.names(folder) if name.endswith(".json")]
    shards = [json.loads(content) for content in storage.read_all([folder / name for name in sidecars])]
    whole = zip(sidecars, shards, _whole(plan, shards), strict=True)
    return {int(name.removesuffix(".json")): shard for name, shard, is_whole in whole if is_whole}


def finish(plan: Plan, summary: dict) -> dict:
    """Describes the shards for TFDS and in the manifest, which it returns.

    Raises:
      UserError: a shard is missing.
    """
    total = min(plan.settings.shards, summary["out"])
    shards = [shard for _, shard in sorted(written(plan).items())]
    if len(shards) < total:
        raise UserError(f"{plan.out} has {len(shards)} of {total} shards: do all workers write into the same folder?")
    _describe_for_tfds(plan, shards)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    manifest = summary | {"settings": _described(plan), "versions": versions, "shards": shards}
    storage.write(plan.out / MANIFEST, json.dumps(manifest, indent=1).encode())
    for leftover in ("partial", "pairs", "scan"):
        storage.remove(plan.state / leftover)
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
    with storage.told("write", plan.out):
        tfds.folder_dataset.write_metadata(
            data_dir=plan.out,
            features=tfds_features(),
            split_infos=[split],
            description=f"Prepared by mmjax from {settings.source}.",
            check_data=False,  # it would need TensorFlow
        )
