"""What the rows of lists and tables have in common."""

import os
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from mmjax import files
from mmjax.data.records import CAPTION_FIELDS, IMAGE_FIELDS, LABEL_FIELDS, Fields
from mmjax.errors import RecordError, UserError

_MAX_PATH = 4096  # characters, as in Linux


def with_image_file(raw: dict[str, Any], fields: Fields, folder: str, key: str) -> dict[str, Any]:
    """Puts a function that reads the file in the place of an image that is a path, or {"bytes": None, "path": path}.

    Raises:
      RecordError: the path is none, such as an image spelled in base64.
    """
    if fields.image is None:
        return raw
    name = fields.image or next((usual for usual in IMAGE_FIELDS if raw.get(usual) is not None), "")
    value: Any = raw
    for part in [name] if name in raw else name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping) and value.get("bytes") is None:
        value = value.get("path")
    if not isinstance(value, str):
        return raw
    if len(value) > _MAX_PATH:
        raise RecordError(f'record {key!r}: field "{name}" has {len(value):,} characters: no path of an image file')
    return raw | {name: partial(files.read_inside, folder, value)}


def names_within(paths: Sequence[str]) -> list[str]:
    """The paths from the folder that they have in common: the same on every host."""
    absolute = [os.path.abspath(path) for path in paths]
    common = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, common) for path in absolute]


def check_columns(columns: Sequence[str], fields: Fields, path: str) -> None:
    """Tells early what no record of a table can have.

    Raises:
      UserError: a mapped column is missing, or nothing is mapped and no column has a usual name.
    """
    there = ", ".join(columns)[:500]
    for name in fields.mapped:
        if name not in columns and name.split(".")[0] not in columns:
            raise UserError(f'{path} has no column "{name}"; it has: {there}')
    if not fields.mapped and not {*IMAGE_FIELDS, *CAPTION_FIELDS, *LABEL_FIELDS} & set(columns):
        raise UserError(f"{path} has no column with a usual name; name some in `fields`; it has: {there}")
