"""Embeds a data set: the features of all its images and texts, by any model.

    python -m mmjax.embed --model=runs/quickstart --source=openmoji:en --out=embedded
    python -m mmjax.embed --model=google/siglip-base-patch16-224 --source='webdataset:/data/{00..99}.tar' --out=found
    python -m mmjax.embed --model=runs/quickstart --source=openmoji:en --out=npy --format=npy --modalities=image

--model is what `mmjax.load` takes, --source what a recipe's streams take (docs/data.md). OUT becomes a folder of
parts of --rows records each, in the source's order: Parquet files with the columns key, and for each modality its
embedding (fixed-size lists of float32, of unit norm) and whether it is valid; the text's caption, too. With
--format=npy a part is one array for each modality, and a JSON file with the rest. What cannot be read is told, has
zeros, and is not valid: row n is record n. The text of a record is its first caption, of those in --captions.
The batches are spread over all devices. A part is whole or absent: the same command goes on where it was stopped.
On several hosts, start it in every process, as `mmjax.main`; all need OUT.
Exit codes: 0 done, 2 a mistake in the flags, 130 stopped by Ctrl-C.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Bool, Float

from mmjax import cli
from mmjax.errors import RecordError, UserError

_MODEL = flags.DEFINE_string("model", None, "the model: whatever `mmjax.load` loads")
_SOURCE = flags.DEFINE_string("source", None, "the data, KIND:LOCATION")
_OUT = flags.DEFINE_string("out", None, "the folder for what is found")
_SPLIT = flags.DEFINE_string("split", "train", "the source's split")
_ROOT = flags.DEFINE_string("root", "", "the folder in which the images that the source names lie")
_IMAGE_FIELD = flags.DEFINE_string("image_field", "", "which of the source's fields is the image; found by its name")
_CAPTIONS = flags.DEFINE_list("captions", [], "languages or fields whose first caption is the text; all by default")
_MODALITIES = flags.DEFINE_list("modalities", [], "image, text or both; by default what the model reads")
_FORMAT = flags.DEFINE_enum("format", "parquet", ["parquet", "npy"], "what a part is written as")
_ROWS = flags.DEFINE_integer("rows", 16_384, "records in a part", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 256, "records in a batch, over all devices", lower_bound=1)
_STEP = flags.DEFINE_integer("step", 0, "which checkpoint of a run; 0 takes the latest")
_REVISION = flags.DEFINE_string("revision", "", "which version on the hub: a branch, tag or commit")
_WEIGHTS = flags.DEFINE_string("weights", "float32", "the type of the model's matrices: float32, bfloat16 or int8")
flags.DEFINE_bool("debug", False, "show tracebacks and the libraries' own messages")

ABOUT = "embed.json"
TOLD = 5  # broken records that are named
THREADS = 4  # that decode images


class Part(NamedTuple):
    """What is known of some records: of each modality the embeddings, and which of them are valid."""

    keys: list[str]
    embeddings: dict[str, Float[np.ndarray, "rows width"]]
    valid: dict[str, Bool[np.ndarray, " rows"]]
    captions: list[str]


def main() -> int:
    """Embeds as the flags say; returns the exit code."""
    for flag in (_MODEL, _SOURCE, _OUT):
        if not flag.value:
            raise UserError(f"--{flag.name} is missing")
    out = Path(_OUT.value)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file")
    from mmjax import config as configs
    from mmjax import runtime

    runtime.configure()
    from mmjax.sharding import distributed

    distributed.initialize(configs.default().distributed)
    from mmjax import api
    from mmjax.data.sources import Fields, open_source
    from mmjax.training import feedback

    model = api.load(_MODEL.value, _STEP.value or None, None, _REVISION.value or None, weights=_WEIGHTS.value)
    modalities = _modalities(model)
    fields = Fields(_IMAGE_FIELD.value if "image" in modalities else None, tuple(_CAPTIONS.value))
    if _SOURCE.value.startswith("openmoji"):  # its captions are languages, and no fields
        fields = Fields(fields.image)
    source = open_source(_SOURCE.value, _SPLIT.value, fields, _ROOT.value, feedback.data_progress)
    _claim(out, _about(model, source, modalities))
    broken = _embed(model, source, modalities, out)
    more = f", {broken} of them with something that cannot be read" if broken else ""
    feedback.say(f"{out}: {len(source):,} records{more}")
    return 0


def _modalities(model: Any) -> list[str]:
    there = [name for name in ("image", "text") if name in model.module.parts]
    chosen = _MODALITIES.value or there
    for name in chosen:
        if name not in there:
            raise UserError(f"--modalities: {_MODEL.value} embeds {' and '.join(there) or 'neither'}, and no {name}")
    if "text" in chosen and model.tokenizer is None:
        raise UserError(f"--modalities: {_MODEL.value} came without a tokenizer for texts")
    return [name for name in there if name in chosen]


def _about(model: Any, source: Any, modalities: Sequence[str]) -> dict[str, Any]:
    """What decides the contents of the folder: the same again goes on, anything else is refused."""
    from mmjax.files import fingerprint
    from mmjax.training.checkpoint import checksums

    return {
        "model": fingerprint(checksums(model.params), model.config.model.to_json()),
        "data": source.fingerprint,
        "records": len(source),
        "modalities": [*modalities],
        "captions": _CAPTIONS.value,
        "width": model.config.model.embed_dim,
        "rows": _ROWS.value,
        "format": _FORMAT.value,
    }


def _claim(out: Path, about: dict[str, Any]) -> None:
    import jax

    from mmjax.files import write_atomically

    path = out / ABOUT
    try:
        found = json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if found is not None:
        different = [key for key in about if found.get(key) != about[key]]
        if different:
            key = different[0]
            raise UserError(f"{out} holds embeddings with another {key}: {found.get(key)} there, {about[key]} now")
        return
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={out} is not empty, and holds no embeddings")
    if jax.process_index() == 0:
        try:
            out.mkdir(parents=True, exist_ok=True)
            write_atomically(path, (json.dumps(about, indent=2) + "\n").encode())
        except OSError as error:
            raise UserError(f"cannot write into --out={out}: {error.strerror}") from error


def _embed(model: Any, source: Any, modalities: Sequence[str], out: Path) -> int:
    """Writes the parts that are missing; returns in how many records something is broken."""
    import jax

    from mmjax.sharding import distributed
    from mmjax.training import feedback

    starts = range(0, len(source), _ROWS.value)
    paths = {start: out / f"part-{number:05d}" for number, start in enumerate(starts)}
    last = ".parquet" if _FORMAT.value == "parquet" else ".json"
    left = [start for start in starts if not distributed.from_first_process(paths[start].with_suffix(last).exists())]
    if len(left) < len(starts):
        feedback.say(f"{len(starts) - len(left)} of {len(starts)} parts are there already")
    count, told = sum(min(_ROWS.value, len(source) - start) for start in left), []
    progress = iter(feedback.data_progress(range(count * len(modalities)), count * len(modalities), "embedding"))
    for start in left:
        rows = range(start, min(start + _ROWS.value, len(source)))
        part = _part(model, _Records(source, rows, told), modalities, lambda: next(progress, None))
        if jax.process_index() == 0:
            (_write_parquet if _FORMAT.value == "parquet" else _write_npy)(paths[start], part)
        feedback.say(f"{paths[start].name}: records {rows.start:,} to {rows.stop - 1:,}")
    next(progress, None)
    for line in told[:TOLD]:
        feedback.say(line)
    return len(told)


class _Records:
    """Some records of a source; what is wrong with them is added to `told`, once for each record."""

    def __init__(self, source: Any, rows: range, told: list[str]):
        self._source, self._rows, self._told = source, rows, told
        self._broken: set[int] = set()

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, number: int, what: Callable[[dict], Any]) -> Any | None:
        """What a function makes of a record; None where it cannot be read."""
        try:
            return what(self._source[self._rows[number]])
        except RecordError as error:
            if number not in self._broken:
                self._broken.add(number)
                self._told.append(str(error))
            return None


def _part(model: Any, records: _Records, modalities: Sequence[str], advance: Callable[[], Any]) -> Part:
    from jax.experimental import multihost_utils

    from mmjax.data import pipeline
    from mmjax.data.image_reader import GREY, Reader

    keys = [records.read(number, lambda record: record["key"]) or "" for number in range(len(records))]
    found: dict[str, np.ndarray] = {}
    valid = {name: np.ones(len(records), bool) for name in modalities}
    captions: list[str] = []
    if "image" in modalities:
        reader = Reader.of(model.config.model.encoders.image)

        def decode(number: int) -> np.ndarray:
            pixels = records.read(number, pipeline.decode_image)
            if pixels is None:
                valid["image"][number] = False
            return GREY if pixels is None else pixels

        def decoded(rows: np.ndarray) -> Iterator[np.ndarray]:
            for pixels in pool.map(decode, rows.tolist()):
                advance()
                yield pixels

        with ThreadPoolExecutor(THREADS) as pool:
            count = len(records)
            found["image"] = model.encode_rows("image", count, lambda rows: reader(decoded(rows)), _BATCH_SIZE.value)
        valid["image"] = multihost_utils.process_allgather(valid["image"]).reshape(-1, count).all(axis=0)
    if "text" in modalities:
        groups = () if _SOURCE.value.startswith("openmoji") and not _CAPTIONS.value else tuple(_CAPTIONS.value)
        texts = [records.read(n, lambda record: pipeline.captions_of(record, groups)[0]) for n in range(len(records))]
        valid["text"] = np.array([text is not None for text in texts], bool)
        captions = [text or "" for text in texts]
        ids = model.token_ids(captions)

        def load_ids(rows: np.ndarray) -> np.ndarray:
            for _ in rows:
                advance()
            return ids[rows]

        found["text"] = model.encode_rows("text", len(records), load_ids, _BATCH_SIZE.value)
    for name, values in found.items():
        values[~valid[name]] = 0
    return Part(keys, found, valid, captions)


def _columns(part: Part) -> Iterator[tuple[str, Any]]:
    """What a part has beside its embeddings."""
    yield "key", part.keys
    if part.captions:
        yield "caption", part.captions
    for name, valid in part.valid.items():
        yield f"{name}_valid", valid.tolist()


def _write_parquet(path: Path, part: Part) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    from mmjax.files import replacing

    columns: dict[str, Any] = {name: pa.array(values) for name, values in _columns(part)}
    for name, values in part.embeddings.items():
        columns[name] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
    with replacing(path.with_suffix(".parquet")) as temporary:
        parquet.write_table(pa.table(columns), temporary)


def _write_npy(path: Path, part: Part) -> None:
    """The JSON file comes last: with it the part is whole."""
    from mmjax.files import replacing, write_atomically

    for name, values in part.embeddings.items():
        with replacing(path.with_name(f"{path.name}.{name}.npy")) as temporary, temporary.open("wb") as file:
            np.save(file, values)
    content = json.dumps(dict(_columns(part)), ensure_ascii=False)
    write_atomically(path.with_suffix(".json"), content.encode())


if __name__ == "__main__":
    sys.exit(cli.run(main, __doc__))
