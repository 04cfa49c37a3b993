"""Where pretrained files come from, and what is in their folder."""

import json
import os
import re
from pathlib import Path
from typing import Any

from mmjax.errors import UserError, one_line
from mmjax.interop import checksums, hub
from mmjax.interop.checksums import write_checksums
from mmjax.interop.pickles import read_pickle
from mmjax.interop.tensors import Tensors, read_safetensors, read_sharded, save_tensors

__all__ = ["Folder", "Tensors", "find", "open_tensors", "save_tensors", "write_checksums"]

_HUB_NAME = re.compile(r"([\w.-]+/[\w.-]+)(?:@(.+))?", re.ASCII)


class Folder:
    """A local folder with a model's files; `name` is what the user called it."""

    def __init__(self, path: Path, name: str):
        self.path, self.name = path, name

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.path / name).is_file()

    def read_json(self, name: str, optional: bool = False, kind: type = dict) -> Any:
        """The object, or the list, in a JSON file.

        Args:
          name: of the file.
          optional: a missing file is an empty one.
          kind: what it holds, `dict` or `list`.

        Raises:
          UserError: it is missing, is damaged, or holds something else.
        """
        if optional and not self.has(name):
            return kind()
        try:
            content = json.loads((self.path / name).read_bytes())
        except FileNotFoundError as error:
            raise UserError(f"{self.name} has no {name}") from error
        except OSError as error:
            raise UserError(f"{self.name}: {name}: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.name}: {name} is damaged: {one_line(error)}") from error
        if not isinstance(content, kind):
            raise UserError(f"{self.name}: {name} is damaged: it holds no JSON {'list' if kind is list else 'object'}")
        return content


def find(source: str | Path, revision: str | None = None, allow_pickle: bool = False) -> Folder:
    """Finds a pretrained model's files, and brings them here where they are elsewhere.

    What settings, tokenizers and weights are brought is compared with its checksums, where there are any.

    Args:
      source: a folder of Hugging Face's or open_clip's layout; a model's name on the hub, "owner/name" or
        "owner/name@revision"; or the address of a remote folder that fsspec reads, as in "gs://bucket/folder". A
        folder that is there comes before a name on the hub.
      revision: a branch, tag or commit of the hub.
      allow_pickle: also brings weights that are a pickle.

    Raises:
      UserError: it is nowhere, cannot be reached, or a file is not what its checksum says.
    """
    name = str(source)
    path = os.path.expanduser(name)
    on_hub = _HUB_NAME.fullmatch(name) if isinstance(source, str) and not os.path.lexists(path) else None
    if revision is not None and (on_hub is None or on_hub[2] not in (None, revision)):
        why = f"it names {on_hub[2]!r} itself" if on_hub else "it is no name on the hub"
        raise UserError(f"{name} cannot be of the revision {revision!r}: {why}")
    if on_hub:
        path = hub.download(on_hub[1], revision or on_hub[2], name, allow_pickle)
    elif isinstance(source, str) and "://" in name:
        path = hub.copy_folder(name, allow_pickle)
    elif not os.path.isdir(path):
        what = "is no folder" if os.path.lexists(path) else "is not there, and no name on the hub (owner/name)"
        raise UserError(f"{name} {what}")
    folder = Folder(Path(path), name)
    _verify_small(folder)
    return folder


def _verify_small(folder: Folder) -> None:
    """The weights are verified where they are opened: it takes seconds."""
    wanted = hub.small(checksums.listed(folder.path, folder.name))
    missing = [name for name in wanted if not folder.has(name)]
    if missing:
        raise UserError(f"{folder.name} has no {missing[0]}, which {checksums.FILE} lists")
    below = (path for pattern in ("*", "*/*") for path in folder.path.glob(pattern) if path.is_file())
    there = hub.small(path.relative_to(folder.path).as_posix() for path in below)
    checksums.verify(folder.path, there, folder.name)


def open_tensors(folder: Folder, allow_pickle: bool = False, first: str = "") -> Tensors:
    """Opens a folder's weights: `model.safetensors`, or all files that its index names, or open_clip's file.

    Args:
      folder: of the model.
      allow_pickle: reads a pickle with torch where there is nothing else.
      first: the file that comes before all others.

    Raises:
      UserError: there are no weights, only pickles, or a file is missing, damaged or not what its checksum says.
    """
    names = {path.name for path in folder.path.iterdir() if path.is_file()}
    chosen = hub.weights(names, folder.name, allow_pickle, first)
    path, source = folder.path / chosen, f"{folder.name}: {chosen}"
    # Headers come before checksums, since what they say of a truncated file is clearer; a pickle is read after its.
    if chosen.endswith(hub.INDEX):
        index = folder.read_json(chosen)
        tensors = read_sharded(folder.path, index, source)
        checksums.verify(folder.path, sorted(set(index["weight_map"].values())), folder.name)
        return tensors
    if chosen.endswith(".safetensors"):
        tensors = read_safetensors(path, source)
        checksums.verify(folder.path, [chosen], folder.name)
        return tensors
    checksums.verify(folder.path, [chosen], folder.name)
    return read_pickle(path, source)
