"""What a record is, how raw fields become one, and how records are packed in ArrayRecord files.

A record is a dictionary:

    key       str                       unique inside the data set
    image     bytes                     encoded, as `mmjax.data.image` decodes it
    captions  {group: [str]}            grouped by language, or by the field that they come from; may be empty
    label     int                       a class number; -1 where there is none
    mirror    bool                      whether the mirrored image still fits its captions

Packed (version 2), a record is a serialised `tf.train.Example` with the features `version`, `key`, `image`,
`captions/group` and `captions/text` (in step: one group name for each text), `label` and `mirror`. So TFDS and
TensorFlow read the same files; nothing of them is needed here. Every record sits in a group of its own, so that it
can be read alone.
"""

import functools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmjax.errors import RecordError

VERSION = 2
WRITER_OPTIONS = "group_size:1,uncompressed"  # images are compressed already
MAX_CAPTION = 10_000  # characters; what goes beyond is cut off
MAX_CAPTIONS = 1_000  # of one record

# Where a source's fields have no mapping in the config, the first of these that a record has.
IMAGE_FIELDS = (
    *("image", "jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "avif"),
    *("filepath", "file_name", "image_path", "path", "img"),
)
CAPTION_FIELDS = ("captions", "caption", "txt", "text", "title", "sentences")
LABEL_FIELDS = ("label", "cls", "class")


@dataclass(frozen=True)
class Fields:
    """Which of a source's fields make up a record; a dot goes into nested ones ("meta.caption").

    An empty one is found by its usual names above; where `image` is None, no image is read.
    """

    image: str | None = ""
    captions: tuple[str, ...] = ()
    label: str = ""

    @property
    def mapped(self) -> tuple[str, ...]:
        """All that are named."""
        return tuple(name for name in (self.image, *self.captions, self.label) if name)


def assemble(raw: Mapping[str, Any], fields: Fields, key: str) -> dict:
    """Makes a record from a source's raw fields.

    Args:
      raw: field -> value. An image is bytes, {"bytes": bytes} or a function that returns bytes; captions are a
        text, a list of texts, or {group: text or list of texts}; a text may be UTF-8 bytes, or an object that holds it
        as "raw", "caption" or "text", as in COCO's lists. None and NaN are missing values.
      fields: the mapping.
      key: of the record.

    Raises:
      RecordError: a mapped field is missing, or a value is of another kind.
    """
    record = {"key": key, "captions": {}, "label": -1, "mirror": bool(raw.get("mirror", True))}
    image = None if fields.image is None else _find(raw, fields.image, IMAGE_FIELDS, key)
    if image is not None:
        image = image.get("bytes") if isinstance(image, Mapping) else image
        image = image() if callable(image) else image
        if not isinstance(image, bytes):
            raise RecordError(f"record {key!r}: the image is no bytes but {type(image).__name__}")
        record["image"] = image
    names = fields.captions or [name for name in CAPTION_FIELDS if not _is_missing(raw.get(name))][:1]
    for name in names:
        for group, texts in _captions(_find(raw, name, (), key), name, key).items():
            record["captions"].setdefault(group, []).extend(texts)
    label = _find(raw, fields.label, LABEL_FIELDS, key)
    try:
        number = -1 if label is None else int(label)
        if not -(2**63) <= number < 2**63:
            raise OverflowError
        record["label"] = number
    except (TypeError, ValueError, OverflowError):
        if fields.label:
            raise RecordError(f"record {key!r}: the label is no 64-bit whole number: {str(label)[:40]!r}") from None
    return record


def _find(raw: Mapping[str, Any], name: str, usual: Iterable[str], key: str) -> Any:
    if not name:
        return next((raw[usual_name] for usual_name in usual if not _is_missing(raw.get(usual_name))), None)
    value: Any = raw
    for part in [name] if name in raw else name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            raise RecordError(f'record {key!r} has no field "{name}"; it has: {", ".join(map(repr, raw))[:200]}')
        value = value[part]
    return None if _is_missing(value) else value


def _is_missing(value: Any) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def _captions(value: Any, name: str, key: str) -> dict[str, list[str]]:
    if value is None:
        return {}
    if isinstance(value, Mapping):
        groups = {clean_text(str(group)): texts for group, texts in value.items()}
    else:
        groups = {name: value}
    found = {}
    for group, texts in groups.items():
        listed = list(texts) if isinstance(texts, list | tuple) else [texts]
        listed = [_text_in(text) for text in listed if not _is_missing(text)]
        if not all(isinstance(text, str | bytes) for text in listed):
            raise RecordError(f'record {key!r}: field "{name}" is neither a text nor a list of texts')
        cleaned = [clean_text(text) for text in listed[:MAX_CAPTIONS]]
        if any(cleaned):
            found[group] = [text for text in cleaned if text]
    return found


def _text_in(value: Any) -> Any:
    if isinstance(value, Mapping):
        return next((value[name] for name in ("raw", "caption", "text") if name in value), value)
    return value


def clean_text(text: str | bytes) -> str:
    """The text as valid Unicode of at most MAX_CAPTION characters, without white space around it."""
    if isinstance(text, bytes):
        text = text[: 4 * MAX_CAPTION].decode("utf-8", "replace")
    text = text[:MAX_CAPTION].strip()
    try:
        text.encode()
    except UnicodeEncodeError:  # lone surrogates, which JSON can spell
        text = text.encode("utf-8", "replace").decode()
    return text


def encode(record: Mapping[str, Any]) -> bytes:
    """Packs one record."""
    example = _example_class()()
    features = example.features.feature
    features["version"].int64_list.value.append(VERSION)
    features["key"].bytes_list.value.append(record["key"].encode("utf-8", "surrogateescape"))
    features["image"].bytes_list.value.append(record["image"])
    pairs = [(group, text) for group, texts in record["captions"].items() for text in texts]
    features["captions/group"].bytes_list.value.extend(group.encode() for group, _ in pairs)
    features["captions/text"].bytes_list.value.extend(text.encode() for _, text in pairs)
    features["label"].int64_list.value.append(int(record.get("label", -1)))
    features["mirror"].int64_list.value.append(int(record.get("mirror", True)))
    return example.SerializeToString(deterministic=True)


def decode(data: bytes) -> dict:
    """Unpacks one record that `encode` packed.

    Raises:
      RecordError: it is none, or of another version.
    """
    from google.protobuf.message import DecodeError

    try:
        features = _example_class().FromString(data).features.feature
        if "version" not in features or features["version"].int64_list.value[:] != [VERSION]:
            raise RecordError("it has another layout than mmjax/data/records.py describes")
        captions: dict[str, list[str]] = {}
        groups, texts = (features[f"captions/{part}"].bytes_list.value for part in ("group", "text"))
        for group, text in zip(groups, texts, strict=True):
            captions.setdefault(group.decode(), []).append(text.decode())
        return {
            "key": features["key"].bytes_list.value[0].decode("utf-8", "surrogateescape"),
            "image": features["image"].bytes_list.value[0],
            "captions": captions,
            "label": features["label"].int64_list.value[0],
            "mirror": bool(features["mirror"].int64_list.value[0]),
        }
    except (DecodeError, IndexError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"it is damaged: {error}") from error


def write(path: Path, records: Iterable[bytes]) -> None:
    """Writes packed records, in order, into one ArrayRecord file."""
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), WRITER_OPTIONS)
    try:
        for record in records:
            writer.write(record)
    finally:
        writer.close()


@functools.cache
def _example_class() -> type:
    """A message class with the wire format of `tf.train.Example`, in a pool of its own.

    TensorFlow may be there or not, and registers the same names in the default pool.
    """
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kind = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="mmjax/example.proto", package="mmjax", syntax="proto3")

    def add(parent, name: str, number: int, type_: int, message: str = "", repeated: bool = False):
        label = kind.LABEL_REPEATED if repeated else kind.LABEL_OPTIONAL
        reference = {"type_name": message} if message else {}
        return parent.field.add(name=name, number=number, type=type_, label=label, **reference)

    lists = {"BytesList": kind.TYPE_BYTES, "FloatList": kind.TYPE_FLOAT, "Int64List": kind.TYPE_INT64}
    for name, type_ in lists.items():
        add(file.message_type.add(name=name), "value", 1, type_, repeated=True)
    feature = file.message_type.add(name="Feature")
    feature.oneof_decl.add(name="kind")
    for number, name in enumerate(lists, start=1):
        field = add(feature, f"{name[:-4].lower()}_list", number, kind.TYPE_MESSAGE, f".mmjax.{name}")
        field.oneof_index = 0
    features = file.message_type.add(name="Features")
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    add(entry, "key", 1, kind.TYPE_STRING)
    add(entry, "value", 2, kind.TYPE_MESSAGE, ".mmjax.Feature")
    add(features, "feature", 1, kind.TYPE_MESSAGE, ".mmjax.Features.FeatureEntry", repeated=True)
    add(file.message_type.add(name="Example"), "features", 1, kind.TYPE_MESSAGE, ".mmjax.Features")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("mmjax.Example"))
