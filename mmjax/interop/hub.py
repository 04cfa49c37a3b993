"""Bringing a pretrained model's files here: from the Hugging Face hub, or from an object store."""

import glob
import json
import os
import re
from collections.abc import Collection, Iterable
from fnmatch import fnmatch
from pathlib import Path

from mmjax.errors import UserError, one_line
from mmjax.files import NO_SPACE, cache_folder, copied, fingerprint, reading, replacing

# Settings, tokenizers and checksums: small, so all of them are brought. Those one folder down are of parts of a model,
# as `1_Pooling/config.json` is.
_SMALL = ("*.json", "*.txt", "*.txt.gz", "*.model", "SHA256SUMS")
_NOT_SMALL = ("*/*/*", ".*")
INDEX = ".index.json"
_OPEN_CLIP = "open_clip_model.safetensors"
# The files that weights are in, the first that is there.
_WEIGHTS = (
    "model.safetensors",
    "model.safetensors" + INDEX,
    _OPEN_CLIP,
    _OPEN_CLIP + INDEX,
)
_PICKLES = ("pytorch_model.bin", "open_clip_pytorch_model.bin")
# What a trainer leaves beside the weights.
_NO_WEIGHTS = ("optimizer.pt", "scheduler.pt", "scaler.pt")
_TIMEOUT_SECONDS = 10
_SHARD = re.compile(r"[^/]+-\d+-of-\d+\.(safetensors|bin)")


def small(names: Iterable[str]) -> list[str]:
    """The names of settings, tokenizers and checksums."""
    return [
        name
        for name in names
        if any(fnmatch(name, pattern) for pattern in _SMALL) and not any(fnmatch(name, no) for no in _NOT_SMALL)
    ]


def weights(names: Collection[str], source: str, allow_pickle: bool, first: str = "") -> str:
    """The name of the file that weights are read from, or of their index.

    Args:
      names: of the files of a folder.
      source: what messages call the folder.
      allow_pickle: takes a pickle where there is nothing else.
      first: the file that comes before all others.

    Raises:
      UserError: there are none, or several and no telling which, or only pickles and these are not allowed.
    """
    for name in (first, first + INDEX, *_WEIGHTS):
        if name in names:
            return name
    others = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    if len(others) > 1:
        raise UserError(f"{source} has several files of weights and no index: {_some(others)}")
    if others:
        return others[0]
    pickles = [name for name in _PICKLES if name in names]
    pickles += sorted(n for n in names if n.endswith(".pt") and "/" not in n and n not in _NO_WEIGHTS)
    parts = sorted(name for name in names if _SHARD.fullmatch(name))
    if not pickles and not parts:
        raise UserError(f"{source} has no weights: none of {', '.join(_WEIGHTS[:3])} is there, nor *.safetensors")
    if not allow_pickle:
        raise UserError(
            f"{source} has its weights only as a pickle, {(pickles or parts)[0]}, and a pickle can run code: "
            "convert it with `python -m mmjax.convert --allow_pickle FROM TO`, or load it with allow_pickle=True"
        )
    if not pickles:
        raise UserError(f"{source} has its weights as pickles in several files, {parts[0]}, ...: convert them first")
    if len(pickles) > 1 and pickles[0] not in _PICKLES:
        raise UserError(f"{source} has several pickles: {_some(pickles)}")
    return pickles[0]


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _wanted(names: Collection[str], source: str, allow_pickle: bool, first: str = "") -> list[str]:
    """What of a folder elsewhere is brought: small files, and the weights with all that their index may name."""
    chosen = weights(names, source, allow_pickle, first)
    is_index = chosen.endswith(INDEX)
    shards = [n for n in names if is_index and _SHARD.fullmatch(n) and n.endswith(".safetensors")]
    return sorted({*small(names), chosen, *shards})


def download(name: str, revision: str | None, source: str, allow_pickle: bool) -> Path:
    """The folder, in the hub's own cache, of a model on the hub; what is there already is not downloaded again.

    Where the hub cannot be reached, or may not (`HF_HUB_OFFLINE`), the folder is what the cache has.

    Args:
      name: "owner/name".
      revision: a branch, tag or commit; by default the main branch.
      source: what messages call it.
      allow_pickle: see `weights`.

    Raises:
      UserError: the hub has it not or does not give it, or cannot be reached and the cache has it not.
    """
    import huggingface_hub

    try:
        # Asked once and not for long: other calls try a hub that cannot be reached again and again.
        found = huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
    except Exception as error:  # each version of the library raises others where there is no connection
        _tell_refusal(error, source, revision)
        return _cached(name, revision, source, error)
    names = [file.rfilename for file in found.siblings or ()]

    def bring(wanted: list[str]) -> Path:
        patterns = [glob.escape(each) for each in wanted]  # names are patterns there
        return Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=patterns))

    try:
        first = ""
        if _OPEN_CLIP in names and "config.json" in names and not _is_transformers(bring(["config.json"])):
            first = _OPEN_CLIP
        return bring(_wanted(names, source, allow_pickle, first))
    except UserError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno in NO_SPACE:
            raise
        _tell_refusal(error, source, revision)
        raise UserError(f"{source}: downloading stopped, and goes on the next time: {one_line(error)}") from error


def _is_transformers(folder: Path) -> bool:
    """Whether a config.json is of transformers; timm's, beside a model of open_clip, is of its image tower alone."""
    try:
        return "model_type" in json.loads((folder / "config.json").read_bytes())
    except ValueError:
        return True


def _tell_refusal(error: Exception, source: str, revision: str | None) -> None:
    """Raises UserError where it is the hub that said no."""
    from huggingface_hub import errors

    reasons = {  # a gated model is one that is not found, so it comes first
        errors.GatedRepoError: "it is for those who agreed to its terms: do so on its page, then `hf auth login`",
        errors.RepositoryNotFoundError: "no such folder nor model on the hub; if it is private there, `hf auth login`",
        errors.RevisionNotFoundError: f"the hub has no revision {revision!r} of it",
        errors.HFValidationError: "no such folder, and no name that a model on the hub can have",
    }
    for kind, reason in reasons.items():
        if isinstance(error, kind):
            raise UserError(f"{source}: {reason}") from error


def _cached(name: str, revision: str | None, source: str, reason: Exception) -> Path:
    """What the hub's cache has, since the hub was not reached for this reason."""
    import huggingface_hub
    from huggingface_hub import errors

    try:
        folder = huggingface_hub.snapshot_download(
            name, revision=revision, local_files_only=True, allow_patterns=[*_SMALL], ignore_patterns=[*_NOT_SMALL]
        )
    except errors.LocalEntryNotFoundError as error:
        offline = isinstance(reason, errors.OfflineModeIsEnabled)
        why = "HF_HUB_OFFLINE is set" if offline else f"the hub cannot be reached: {one_line(reason)}"
        raise UserError(f"{source}: no such folder, it is not in the hub's cache, and {why}") from error
    return Path(folder)


def copy_folder(address: str, allow_pickle: bool) -> Path:
    """A local folder with the files of a remote one, each copied into the cache once.

    Args:
      address: "gs://...", "s3://..." or another address of fsspec.
      allow_pickle: see `weights`.

    Raises:
      UserError: it cannot be read, or has no weights that can be.
    """
    import fsspec

    scheme = address.partition("://")[0]
    with reading(address):
        system, root = fsspec.core.url_to_fs(address)
        system.invalidate_cache()  # listings, of which some clients believe one for ever
        paths = {path[len(root) :].strip("/"): path for path in system.find(root, maxdepth=2)}
        paths.pop("", None)  # the address is that of a file
        if not paths:
            raise UserError(f"there is no folder {address}, or it is empty")
        # Absolute, since the cache's own path may not be.
        copies = {
            name: os.path.abspath(copied(system, scheme, paths[name])) for name in _wanted(paths, address, allow_pickle)
        }
    folder = cache_folder("pretrained", fingerprint(scheme, root, sorted(copies.items())))
    for name, copy in copies.items():
        link = folder / name
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            with replacing(link) as temporary:
                temporary.symlink_to(copy)
    return folder
