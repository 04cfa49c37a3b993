"""A folder of images, with a folder for each class."""

import os
from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np

from mmjax import files
from mmjax.data.records import Fields, assemble
from mmjax.data.sources.rows import check_columns
from mmjax.errors import UserError
from mmjax.files import Progress, silent

_MAX_TEXT_BYTES = 2**20
_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")


class FolderSource:
    """The images DIR/CLASS/.../IMAGE, ordered by their paths; those right in DIR come first and have no class.

    A class's number is the place of its name among all of DIR's folders, sorted. The caption is the class's name
    (group "class", with spaces for "_" and "-"), or the lines of a text file beside the image, called like it but for
    the extension ".txt" (group "txt"). Names that begin with a dot are left out, links to folders are not followed.
    """

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Lists the images.

        Args:
          location: the folder.
          split: not used.
          fields: the mapping; there are "image", "label", "class" and "txt".
          root: the folder that linked images have to lie in; "" is the folder itself.
          progress: `progress(items, total, title)` wraps the iteration over the classes to show it.

        Raises:
          UserError: there is no such folder, a folder in it cannot be read, or it holds no image.
        """
        self._folder, self._fields = os.path.abspath(location), fields or Fields()
        self._root = root or self._folder
        check_columns(["image", "label", "class", "txt"], self._fields, location)
        names, sizes, labels, has_text = [], [], [], []
        try:
            self._classes = _class_folders(self._folder)
            folders = progress(self._classes, len(self._classes), f"listing the images of {location}")
            for label, images in enumerate(_per_folder(self._folder, folders), start=-1):
                for name, size, text in images:
                    names.append(os.fsencode(name))
                    sizes.append(size)
                    labels.append(label)
                    has_text.append(text)
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
        if not names:
            raise UserError(f"{location} holds no image: no file with an extension of {', '.join(_EXTENSIONS)}")
        self._names = b"".join(names)  # one string: a list of millions takes several times the memory
        self._ends = np.cumsum([len(name) for name in names])
        self._labels, self._has_text = np.array(labels, np.int32), np.array(has_text)
        parts = (self._names, self._ends.tobytes(), np.array(sizes).tobytes(), self._has_text.tobytes())
        self.fingerprint = files.fingerprint("folder", self._classes, *parts, self._fields)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        key, label = os.fsdecode(self._names[start : self._ends[index]]), int(self._labels[index])
        path = os.path.join(self._folder, key)
        name = self._classes[label].replace("_", " ").replace("-", " ") if label >= 0 else None
        lines = None
        if self._has_text[index]:
            lines = files.read_inside(self._root, os.path.splitext(path)[0] + ".txt", _MAX_TEXT_BYTES).splitlines()
        captions = {"txt": lines} if lines is not None else {"class": name} if name is not None else {}
        raw = {"image": partial(files.read_inside, self._root, path), "label": label, "class": name, "txt": lines}
        return assemble(raw | {"captions": captions}, self._fields, key)


def _class_folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    return sorted(name for name in names if not name.startswith("."))


def _per_folder(folder: str, classes: Iterable[str]) -> Iterator[Iterator[tuple[str, int, bool]]]:
    """What `_images` finds right in the folder, then in each class."""
    yield _images(folder, "", deep=False)
    for name in classes:
        yield _images(folder, f"{name}/", deep=True)


def _images(folder: str, start: str, deep: bool) -> Iterator[tuple[str, int, bool]]:
    """Path in the folder, bytes, and whether a text lies beside it, of each image below `start`."""
    pending = [start]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        names = {entry.name for entry in entries}
        for entry in entries:
            stem, extension = os.path.splitext(entry.name)
            if extension.lower() in _EXTENSIONS and not stem.startswith(".") and entry.is_file():
                yield prefix + entry.name, entry.stat().st_size, f"{stem}.txt" in names
        below = [entry.name for entry in entries if deep and entry.is_dir(follow_symlinks=False)]
        pending.extend(f"{prefix}{name}/" for name in reversed(below) if not name.startswith("."))
