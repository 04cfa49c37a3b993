"""Data sets that TFDS has prepared, read without TensorFlow."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from mmjax import files
from mmjax.data import records
from mmjax.data.records import Fields, assemble
from mmjax.data.sources.rows import check_columns
from mmjax.errors import RecordError, UserError, one_line
from mmjax.files import Progress, silent

_PREPARE = 'tfds.builder("NAME", file_format="array_record").download_and_prepare()'


class TfdsSource:
    """The examples of a split; a class's name is one more field, "<feature>_name".

    Images stay encoded. Examples in mmjax's own layout (`tfds_features`) are the records that were packed.
    """

    def __init__(
        self,
        location: str,
        split: str = "",
        fields: Fields | None = None,
        root: str = "",
        progress: Progress = silent,
    ):
        """Opens a split.

        Args:
          location: NAME, NAME/VERSION or NAME/CONFIG:VERSION of a data set in `TFDS_DATA_DIR` (by default
            ~/tensorflow_datasets), or its folder: the one with `dataset_info.json`. Without a version: the newest.
          split: a split as TFDS writes it, slices too: "train[:90%]".
          fields: the mapping; a dot goes into nested features.
          root: not used.
          progress: not used.

        Raises:
          UserError: TFDS is not installed; the data set is not prepared, or not in the format array_record; it has no
            such split or feature; or fields of mmjax's own layout are mapped.
        """
        self._fields = fields or Fields()
        folder = _find_folder(location)
        builder = _open(folder)
        self._records, paths = _open_split(builder, folder, split)
        self._own_layout = set(builder.info.features) == set(tfds_features())
        if self._own_layout and self._fields.mapped:
            raise UserError(f"tfds:{location} holds records in mmjax's own layout: map no fields of it")
        self._features = _readable(builder.info.features)
        self._decoders = _decoders(self._features)
        if not self._own_layout:
            columns = [*self._features, *(f"{name}_name" for name in _class_features(self._features))]
            check_columns(columns, self._fields, folder)
        self._key = f"{builder.info.full_name}/{split}"
        sizes = files.names_and_sizes(paths)
        self.fingerprint = files.fingerprint("tfds", builder.info.full_name, split, len(self), sizes, self._fields)

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int) -> dict:
        index = range(len(self))[index]
        key = f"{self._key}/{index}"
        try:
            packed = self._records[index]
            if self._own_layout:
                return records.decode(packed)
            raw = _plain(self._features, self._features.deserialize_example_np(packed, decoders=self._decoders))
        except Exception as error:  # whatever the two libraries make of damaged bytes
            raise RecordError(f"record {key!r} cannot be read: {one_line(error)}") from error
        return assemble(raw, self._fields, key)


def tfds_features() -> Any:
    """How TFDS describes the layout of packed records (`mmjax.data.records`).

    With it in `features.json`, `tfds.builder_from_directory(FOLDER).as_data_source()` reads files named
    NAME-SPLIT.array_record-00000-of-00001.
    """
    features = _tfds().features
    return features.FeaturesDict(
        {
            "version": features.Scalar(np.int64),
            "key": features.Text(),
            "image": features.Image(shape=(None, None, 3)),
            "captions": features.Sequence({"group": features.Text(), "text": features.Text()}),
            "label": features.Scalar(np.int64),
            "mirror": features.Scalar(np.bool_),
        }
    )


def _tfds() -> Any:
    try:
        import tensorflow_datasets
    except ImportError as error:
        raise UserError("this source needs the package tensorflow-datasets: pip install tensorflow-datasets") from error
    return tensorflow_datasets


def _find_folder(location: str) -> str:
    """The folder of a data set: as named, or in TFDS's own; in it, that of the newest version."""
    tfds = _tfds()
    data = tfds.core.constants.get_default_data_dir()
    for folder in (location, os.path.join(os.path.expanduser(data), location.replace(":", "/"))):
        if os.path.isdir(folder):
            if os.path.exists(os.path.join(folder, "dataset_info.json")):
                return folder
            versions = [name for name in os.listdir(folder) if tfds.core.Version.is_valid(name)]
            if versions:
                return os.path.join(folder, max(versions, key=tfds.core.Version))
    raise UserError(
        f"{location!r} is no prepared TFDS data set, neither as a folder nor in {data} (set TFDS_DATA_DIR); "
        f"prepare one with {_PREPARE}"
    )


def _open(folder: str) -> Any:
    try:
        return _tfds().builder_from_directory(folder)
    except Exception as error:  # TFDS has no error of its own for damaged descriptions
        raise UserError(f"{folder} is no TFDS data set, or is damaged: {one_line(error)}") from error


def _open_split(builder: Any, folder: str, split: str) -> tuple[Any, list[str]]:
    """The serialised examples of a split, and its files."""
    known = ", ".join(builder.info.splits) or "none"
    written = builder.info.file_format and builder.info.file_format.value
    if written != "array_record":
        raise UserError(
            f"{folder} is in the format {written}, but random access needs array_record: prepare it with {_PREPARE}"
        )
    if not split:
        raise UserError(f"{folder} has splits: {known}; set one")
    try:
        paths = [os.fspath(part.filename) for part in builder.info.splits[split].file_instructions]
    except Exception as error:  # of several kinds, by what is wrong with the split
        raise UserError(f'{folder} has no split "{split}"; known: {known}, and slices: "train[:90%]"') from error
    missing = [path for path in paths if not os.path.exists(path)]
    if missing:
        raise UserError(f"{missing[0]} is missing: prepare the data set again with {_PREPARE}")
    return builder.as_data_source(split, deserialize_method=_tfds().decode.DeserializeMethod.RAW_BYTES), paths


def _readable(features: Mapping[str, Any]) -> Any:
    """The features without those that only TensorFlow or ffmpeg can decode: lists of images, videos, sound."""
    kinds = _tfds().features

    def is_readable(feature: Any, listed: bool = False) -> bool:
        if isinstance(feature, kinds.Video | kinds.Audio | kinds.Dataset):
            return False
        if isinstance(feature, kinds.FeaturesDict):
            return all(is_readable(inner, listed) for inner in feature.values())
        if isinstance(feature, kinds.Sequence):
            return is_readable(feature.feature, listed=True)
        return not (listed and isinstance(feature, kinds.Image))

    return kinds.FeaturesDict({name: feature for name, feature in features.items() if is_readable(feature)})


def _decoders(features: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves images encoded, nested ones too."""
    tfds, found = _tfds(), {}
    for name, feature in features.items():
        if isinstance(feature, tfds.features.Image):
            found[name] = tfds.decode.SkipDecoding()
        elif isinstance(feature, tfds.features.FeaturesDict) and (inner := _decoders(feature)):
            found[name] = inner
    return found


def _class_features(features: Mapping[str, Any]) -> dict[str, Any]:
    """Feature -> its ClassLabel, for class numbers and lists of them that have names."""
    kinds, found = _tfds().features, {}
    for name, feature in features.items():
        while isinstance(feature, kinds.Sequence):
            feature = feature.feature
        if isinstance(feature, kinds.ClassLabel) and feature.names:
            found[name] = feature
    return found


def _plain(feature: Any, value: Any) -> Any:
    """TFDS's values as Python's: str for bytes of Text, int for classes, lists, dicts with names beside classes."""
    kinds = _tfds().features
    if isinstance(feature, kinds.FeaturesDict):
        plain = {name: _plain(inner, value[name]) for name, inner in feature.items()}
        for name, label in _class_features(feature).items():
            plain[f"{name}_name"] = _each(partial(_class_name, label.names), plain[name])
        return plain
    if isinstance(feature, kinds.Sequence):
        return _plain(feature.feature, value)
    if isinstance(feature, kinds.Text):
        return _each(lambda text: text.decode("utf-8", "replace"), value)
    if isinstance(feature, kinds.ClassLabel):
        return _each(int, value)
    return value


def _class_name(names: Sequence[str], number: int) -> str:
    return names[number] if 0 <= number < len(names) else ""


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    if isinstance(value, list | tuple | np.ndarray):
        return [_each(function, item) for item in value]
    return function(value)
