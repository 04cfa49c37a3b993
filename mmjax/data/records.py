"""The layout of one record in mmjax's own ArrayRecord files (version 1).

A record is one msgpack map:

    {"key": str,                       unique inside the data set
     "image": bytes,                   any format that OpenCV decodes
     "captions": {language: [str]},    one or more captions for each language
     "mirror": bool}                   whether the mirrored image still fits its captions

Every record of the data set sits in a group of its own, so that it can be read alone.
"""

from collections.abc import Iterable
from pathlib import Path

import msgpack
from array_record.python import array_record_module

VERSION = 1
WRITER_OPTIONS = "group_size:1,zstd:3"


def encode(key: str, image: bytes, captions: dict[str, list[str]], mirror: bool) -> bytes:
    """Packs one record."""
    return msgpack.packb({"key": key, "image": image, "captions": captions, "mirror": mirror})


def decode(data: bytes) -> dict:
    """Unpacks one record that `encode` packed."""
    return msgpack.unpackb(data)


def write(path: Path, records: Iterable[bytes]) -> None:
    """Writes packed records, in order, into one ArrayRecord file."""
    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()
