"""The same few records in every format that mmjax reads."""

import csv
import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from PIL import Image

from mmjax.data import records
from mmjax.data.sources.tfds import tfds_features

COUNT = 30
NAMES = [f"{number:03d}" for number in range(COUNT)]


def png(number):
    """A small picture of its own."""
    rng = np.random.default_rng(number)
    low = Image.fromarray(rng.integers(0, 256, (5, 6, 3), np.uint8))
    file = io.BytesIO()
    low.resize((24, 20), Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


def captions(number):
    """One to three captions."""
    return [f"picture {number} seen {times}" for times in range(number % 3 + 1)]


def label(number):
    """0 for the first half, then 1."""
    return number * 2 // COUNT


def write_all(folder):
    """Writes every format below `folder`; returns {kind: what to write into a config's `source`}."""
    images = folder / "images"
    for number, name in enumerate(NAMES):
        path = images / f"class_{label(number)}" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(number))
        path.with_suffix(".txt").write_text("\n".join(captions(number)))
    rows = [
        {"filepath": f"class_{label(number)}/{name}.png", "captions": captions(number), "label": label(number)}
        for number, name in enumerate(NAMES)
    ]
    (images / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with (images / "list.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["filepath", "title", "label"])
        writer.writerows([row["filepath"], row["captions"][0], row["label"]] for row in rows)
    for part in range(2):
        with tarfile.open(folder / f"part-{part:05d}.tar", "w") as tar:
            for number in half(part):
                content = {"captions": captions(number), "label": label(number)}
                for extension, data in ((".png", png(number)), (".json", json.dumps(content).encode())):
                    member = tarfile.TarInfo(NAMES[number] + extension)
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        table = pa.table(
            {
                "image": [{"bytes": png(number), "path": None} for number in half(part)],
                "captions": [captions(number) for number in half(part)],
                "label": [label(number) for number in half(part)],
            }
        )
        pq.write_table(table, folder / f"part-{part}.parquet")
        with (
            pa.OSFile(str(folder / f"part-{part}.arrow"), "wb") as file,
            pa.ipc.new_stream(file, table.schema) as writer,
        ):
            writer.write_table(table)
    write_packed(folder / "packed")
    return {
        "folder": f"folder:{images}",
        "jsonl": f"jsonl:{images}/list.jsonl",
        "csv": f"csv:{images}/list.csv",
        "webdataset": f"webdataset:{folder}/part-{{00000..00001}}.tar",
        "parquet": f"parquet:{folder}/part-*.parquet",
        "arrow": f"arrow:{folder}/part-*.arrow",
        "array_record": f"array_record:{folder}/packed/*.array_record*",
        "tfds": f"tfds:{folder}/packed",
    }


def half(part):
    """The numbers of one of two files."""
    return range(part * COUNT // 2, (part + 1) * COUNT // 2)


def write_packed(folder):
    """mmjax's own layout, as a folder that TFDS reads too."""
    folder.mkdir()
    for part in range(2):
        packed = [
            records.encode({"key": NAMES[n], "image": png(n), "captions": {"captions": captions(n)}, "label": label(n)})
            for n in half(part)
        ]
        records.write(folder / f"samples-train.array_record-{part:05d}-of-00002", packed)
    split = tfds.core.SplitInfo(name="train", shard_lengths=[len(half(0)), len(half(1))], num_bytes=0)
    tfds.folder_dataset.write_metadata(
        data_dir=str(folder), features=tfds_features(), split_infos=[split], version="1.0.0", check_data=False
    )
