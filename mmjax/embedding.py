"""Embedding a data set: reading its records, and the folder that the embeddings go to.

The folder holds parts of so many records each, in the order of the source, and `embed.json`. `part-00000.parquet` has a
row for each record: `key`; `valid`, and `error` where that is false; `caption`, where captions are embedded; and the
embeddings `image` and `text`, float32 lists of one size. In the format "npy" these are arrays of their own,
`part-00000.image.npy` and `part-00000.text.npy`, with the same rows.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pyarrow as pa
from jaxtyping import Float
from pyarrow import parquet

from mmjax.api import Model
from mmjax.data.image_reader import GREY, Reader
from mmjax.data.pipeline import captions_of, decode_image
from mmjax.data.sources import Source
from mmjax.errors import RecordError, UserError
from mmjax.files import replacing, write_atomically
from mmjax.sharding import distributed

FILE = "embed.json"
# What tells one folder from another -> what is shown where it differs.
_IDENTITY = {
    "model_fingerprint": ("model", "step"),
    "source_fingerprint": ("source", "split"),
    "fields": ("fields",),
    "captions": ("captions",),
    "modalities": ("modalities",),
    "format": ("format",),
    "part_rows": ("part_rows",),
}


class Row(NamedTuple):
    """A record without its inputs; `missing` are the modalities of which it has none that can be read."""

    key: str | None
    caption: str | None
    error: str | None
    missing: tuple[str, ...]


class Batch(NamedTuple):
    """Some records: their rows, and by modality what the encoder reads."""

    rows: list[Row]
    inputs: dict[str, Any]


class Records:
    """Reads records as a model's encoders take them; several threads may ask at a time."""

    def __init__(self, source: Source, model: Model, modalities: Sequence[str], captions: Sequence[str] = ()):
        """`modalities`: of "image" and "text". A text is the first caption in the groups `captions`; () is all."""
        self._source, self._model = source, model
        makers = {"image": decode_image, "text": lambda record: captions_of(record, captions)[0]}
        self._makers = {modality: makers[modality] for modality in modalities}

    def __call__(self, numbers: Sequence[int]) -> Batch:
        """These records. An image that cannot be read is grey, a text empty."""
        errors: list[dict[str, str]] = [{} for _ in numbers]
        records = [self._record(*each) for each in zip(numbers, errors, strict=True)]

        def made(modality: str, otherwise: Any) -> Iterator[Any]:
            for record, own in zip(records, errors, strict=True):
                try:
                    yield self._makers[modality](record) if record else otherwise
                except RecordError as error:
                    own[modality] = str(error)
                    yield otherwise

        inputs, captions = {}, [None] * len(records)
        if "image" in self._makers:  # one at a time: as they are stored they can be large
            inputs["image"] = Reader.of(self._model.config.model.encoders.image)(made("image", GREY))
        if "text" in self._makers:
            captions = [*made("text", None)]
            ids = self._model.token_ids([caption or "" for caption in captions])
            inputs["text"] = self._model.without_padding(ids)
        rows = [
            Row(record and record["key"], caption, "; ".join(dict.fromkeys(own.values())) or None, tuple(own))
            for record, caption, own in zip(records, captions, errors, strict=True)
        ]
        return Batch(rows, inputs)

    def _record(self, number: int, errors: dict[str, str]) -> dict | None:
        try:
            return self._source[number]
        except RecordError as error:
            errors.update(dict.fromkeys(self._makers, str(error)))
            return None


def encode(model: Model, batch: Batch, batch_size: int) -> dict[str, Float[np.ndarray, "rows width"]]:
    """The embeddings of a batch by modality, float32 of unit norm; zeros where a record has no such input."""
    found = {}
    for modality, inputs in batch.inputs.items():
        values = model.encode_rows(
            modality, len(batch.rows), lambda rows, own=inputs: jax.tree.map(lambda x: x[rows], own), batch_size
        )
        values[[modality in row.missing for row in batch.rows]] = 0
        found[modality] = values
    return found


class Store:
    """The folder; parts are numbered from 0.

    Raises:
      UserError: it holds something else, or embeddings of another model or data set, or cannot be written.
    """

    def __init__(self, folder: Path, description: Mapping[str, Any]):
        """`description` is what goes into `embed.json`, `rows` and the keys and values of _IDENTITY among it.

        Of several processes the first one writes it, and all of them have to ask.
        """
        self.folder, self._description = folder, json.loads(json.dumps(description))
        self._rows, self._part_rows = description["rows"], description["part_rows"]
        refusal = ""
        if jax.process_index() == 0:
            try:
                self._claim()
            except UserError as error:
                refusal = str(error)
        refusal = distributed.from_first_process(refusal)
        if refusal:
            raise UserError(refusal)

    def _claim(self) -> None:
        path = self.folder / FILE
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for left in self.folder.glob(".part-*"):  # by a process that was killed
                left.unlink()
            if path.exists():
                self._compare(path)
            elif any(not child.name.startswith(".") for child in self.folder.iterdir()):
                raise UserError(f"{self.folder} is not empty, and no folder of embeddings: it has no {FILE}")
            else:
                write_atomically(path, (json.dumps(self._description, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from error

    def _compare(self, path: Path) -> None:
        try:
            saved = dict(json.loads(path.read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"{path} is damaged: {error}") from error
        for key, shown in _IDENTITY.items():
            if saved.get(key) != self._description[key]:
                there, here = (
                    ", ".join(f"{name} {each.get(name)}" for name in shown) for each in (saved, self._description)
                )
                raise UserError(
                    f"{self.folder} holds other embeddings: {there}; asked for: {here}; take another folder"
                )

    @property
    def parts(self) -> int:
        """How many there are."""
        return -(-self._rows // self._part_rows)

    def missing(self) -> list[int]:
        """The parts that are not there yet; of several processes, this one's."""
        own = range(jax.process_index(), self.parts, jax.process_count())
        return [number for number in own if not self.path(number).exists()]

    def path(self, number: int) -> Path:
        """The file with which a part is whole."""
        return self.folder / f"part-{number:05d}.parquet"

    def rows_of(self, number: int) -> range:
        """The rows of a part."""
        return range(number * self._part_rows, min((number + 1) * self._part_rows, self._rows))

    def write(
        self, number: int, rows: Sequence[Row], embeddings: Mapping[str, Float[np.ndarray, "rows width"]]
    ) -> None:
        """Writes a part: its rows, and their embeddings by modality."""
        columns = {
            "key": pa.array([_utf8(row.key) for row in rows], pa.string()),
            "valid": pa.array([row.error is None for row in rows], pa.bool_()),
            "error": pa.array([_utf8(row.error) for row in rows], pa.string()),
        }
        if "text" in embeddings:
            columns["caption"] = pa.array([_utf8(row.caption) for row in rows], pa.string())
        for modality, values in embeddings.items():
            if self._description["format"] == "npy":
                path = self.path(number).with_suffix(f".{modality}.npy")
                with replacing(path) as temporary, open(temporary, "wb") as file:
                    np.save(file, values)
            else:
                columns[modality] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        with replacing(self.path(number)) as temporary:
            parquet.write_table(pa.table(columns), temporary, compression="NONE", use_dictionary=False)


def _utf8(text: str | None) -> str | None:
    """The same text; bytes of a file name that are no UTF-8 as escapes, which Parquet can hold."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode()
