"""Images per second of the training pipeline, beside tf.data and PyTorch's DataLoader on the same JPEG files.

    python benchmarks/input_pipeline.py
    python benchmarks/input_pipeline.py --repeats=5 --seconds=15 --json=input_pipeline.json
    python benchmarks/input_pipeline.py --peers= --threads=4
    python benchmarks/input_pipeline.py --photos=../shared/data/flickr8k_train.tar --data=/tmp/photos

Every pipeline cuts a random window of 90 to 100 % of the area and an aspect ratio of 3/4 to 4/3, resizes it to
224 x 224 and yields uint8 batches of 64 in random order, without mirroring. The same JPEG files (4:2:0, quality 90;
500 x 375, and 1000 x 750 under `large/`; a third of them upright) lie in 8 tar files, ArrayRecord files and TFRecord
files, the last two with the same bytes in each record. They fit in the page cache: this measures processors, not disks.

    mmjax             `mmjax.data.pipeline.train_batches` with the default `config.loader` (2 threads, no worker
                      processes) unless `--threads` and `--workers` say otherwise; the one that tokenises its captions
    tfdata            parallel interleave and map with AUTOTUNE; `decode_and_crop_jpeg` of a window chosen before, with
                      the fast DCT and upsampling; bilinear without antialiasing, so it skips pixels
    torch_pil         2 worker processes, tar files read in sequence, Pillow and torchvision's `RandomResizedCrop`
                      (bicubic, antialiased) as open_clip has them, less its conversion to floating point
    torch_simplejpeg  the same with simplejpeg (fast DCT and upsampling) and OpenCV's bilinear resizing, which skips
                      pixels too

Each measurement is a process of its own and leaves out the start: at least 3 seconds and 30 batches. Pipelines
alternate, `--repeats` rounds of them. Images per second are medians; a ratio is the median of the rounds' ratios, which
a machine that gets slower and faster disturbs least. Where other programs take turns on the processors, who has more
threads gets more of them; so the processor time of an image, and the ratio of images per processor second (`_per_cpu`),
are reported too.

Without `--photos` the images are generated: noise of many scales under polygons. With it, they are the first images of
that tar file, made larger, with grain so that a file has as many bytes as a photograph of its size.

The peers need packages that mmjax does not; torchvision is installed without what it depends on because it has no CPU
build that fits (see `quickstart.import_torchvision`):

    pip install -e '.[benchmark]'
    pip install --no-deps torchvision==0.28.0

Exit code 2: a peer's package is not installed.
"""

import argparse
import contextlib
import io
import json
import math
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import report

ROOT = Path(__file__).resolve().parent.parent
SHARDS = 8
# Set of images -> (how many, longer and shorter side in pixels).
SETS = {"small": (1024, 500, 375), "large": (256, 1000, 750)}
SIZE, BATCH_SIZE, MIN_AREA, MAX_ASPECT = 224, 64, 0.9, 4 / 3
TEXT_LENGTH, VOCAB_SIZE = 32, 512
LISTED = 8  # times that mmjax is given each file: shuffling less than some thousand records costs it more
WORKERS = 2  # of the DataLoader
SHUFFLED = 256  # images among which a peer draws the next one
WARMUP_SECONDS, WARMUP_BATCHES = 3.0, 30
COST = "_cpu_ms_per_image"
NEEDED = {
    "tfdata": ("tensorflow",),
    "torch_pil": ("torch", "torchvision", "PIL"),
    "torch_simplejpeg": ("torch", "simplejpeg"),
}
INSTALL = "pip install -e '.[benchmark]' && pip install --no-deps torchvision==0.28.0"
RATIOS = {
    "tar/mmjax_over_tfdata": ("tar/mmjax", "tfrecord/tfdata"),
    "tar/mmjax_over_torch_pil": ("tar/mmjax", "tar/torch_pil"),
    "tar/mmjax_over_torch_simplejpeg": ("tar/mmjax", "tar/torch_simplejpeg"),
    "array_record/mmjax_over_tfdata": ("array_record/mmjax", "tfrecord/tfdata"),
    "array_record/mmjax_over_torch_pil": ("array_record/mmjax", "tar/torch_pil"),
    "array_record/mmjax_over_torch_simplejpeg": ("array_record/mmjax", "tar/torch_simplejpeg"),
    "large/mmjax_over_tfdata": ("large/mmjax", "large/tfdata"),
    "large/mmjax_over_torch_pil": ("large/mmjax", "large/torch_pil"),
    "large/mmjax_over_torch_simplejpeg": ("large/mmjax", "large/torch_simplejpeg"),
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse_arguments()
    if arguments.only:
        print(json.dumps(measure(PIPELINES[arguments.only], arguments)))
        return 0
    needed = [package for peer in arguments.peers for package in NEEDED[peer]]
    if not report.installed(needed, f"{INSTALL}; or use --peers="):
        return 2
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: load average {load:.1f}; on a busy machine the figures mislead", file=sys.stderr)
    with tempfile.TemporaryDirectory() as folder:
        arguments.data = Path(arguments.data or folder)
        for name in SETS:
            write_files(arguments.data / name, name, arguments.photos)
        rounds = [measure_all(arguments, number) for number in range(arguments.repeats)]
    metrics = {name: statistics.median(speeds[name] for speeds in rounds) for name in rounds[0]}
    for name, (ours, theirs) in RATIOS.items():
        if ours in metrics and theirs in metrics:
            metrics[name] = statistics.median(speeds[ours] / speeds[theirs] for speeds in rounds)
            metrics[f"{name}_per_cpu"] = statistics.median(
                speeds[f"{theirs}{COST}"] / speeds[f"{ours}{COST}"] for speeds in rounds
            )
    metrics = dict(sorted(metrics.items(), key=lambda metric: ("_over_" in metric[0], metric[0])))
    report.print_table(metrics, f"Images per second, median of {arguments.repeats}")
    if arguments.json:
        report.write_json(arguments.json, metrics)
    return 0


def parse_arguments() -> argparse.Namespace:
    """The command line; `peers` becomes a list of names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", default=",".join(NEEDED), help="comma-separated; empty for none")
    parser.add_argument("--json", help="also write the metrics to this file")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement, without its start")
    parser.add_argument("--threads", type=int, help="config.loader.threads of mmjax")
    parser.add_argument("--workers", type=int, help="config.loader.workers of mmjax")
    parser.add_argument("--photos", help="a tar file with images to make the data of")
    parser.add_argument("--data", help="keep the data in this folder; what an earlier run left there is used again")
    parser.add_argument("--only", choices=PIPELINES, help="measure this in this process, with --data; prints JSON")
    arguments = parser.parse_args()
    arguments.peers = report.chosen(parser, "peer", arguments.peers, NEEDED)
    if arguments.repeats < 1 or arguments.seconds <= 0:
        parser.error("--repeats must be 1 or more, --seconds above 0")
    if arguments.only and not arguments.data:
        parser.error("--only needs --data")
    return arguments


def measure_all(arguments: argparse.Namespace, number: int) -> dict[str, float]:
    """One round: the metrics of every pipeline, each in a process of its own."""
    speeds = {}
    for name in PIPELINES:
        if (system := name.partition("/")[2]) == "mmjax" or system in arguments.peers:
            command = [sys.executable, __file__, f"--only={name}", f"--data={arguments.data}"]
            command += [f"--seconds={arguments.seconds}"]
            for option in ("threads", "workers"):
                if getattr(arguments, option) is not None:
                    command.append(f"--{option}={getattr(arguments, option)}")
            speeds |= {f"{name}{end}": value for end, value in run(command).items()}
            print(f"round {number + 1}/{arguments.repeats} · {name} · {speeds[name]:,.0f} images/s", file=sys.stderr)
    return speeds


def run(command: list[str]) -> dict[str, float]:
    """Runs this program; returns the metrics that it prints last.

    Raises:
      SystemExit: it fails.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "TF_CPP_MIN_LOG_LEVEL": "2"}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    if finished.returncode:
        sys.exit(f"{finished.stderr}\nerror: exit code {finished.returncode} from {' '.join(command)}")
    return json.loads(finished.stdout.splitlines()[-1])


def measure(pipeline: Callable, arguments: argparse.Namespace) -> dict[str, float]:
    """Speed and cost of one pipeline in this process, once it runs evenly; metrics by the ends of their names."""
    batches = iter(pipeline(arguments))
    began = time.perf_counter()
    warmup = 0
    while warmup < WARMUP_BATCHES or time.perf_counter() - began < WARMUP_SECONDS:
        images = next(batches)
        warmup += 1
    if images.shape != (BATCH_SIZE, SIZE, SIZE, 3) or str(images.dtype).removeprefix("torch.") != "uint8":
        sys.exit(f"error: a batch of images is {images.dtype} {tuple(images.shape)}")
    began, processor_began, count = time.perf_counter(), report.processor_seconds(), 0
    while (seconds := time.perf_counter() - began) < arguments.seconds:
        count += len(next(batches))
    return {"": count / seconds, COST: 1000 * (report.processor_seconds() - processor_began) / count}


def write_files(folder: Path, name: str, photos: str | None) -> None:
    """Writes one set of images as tar files and ArrayRecord files, unless they are there."""
    import simplejpeg

    from mmjax.data import records

    if (folder / "complete").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    count, longer, shorter = SETS[name]
    rng = np.random.default_rng(0)
    shapes = [(longer, shorter) if number % 3 == 0 else (shorter, longer) for number in range(count)]
    images = photographs(photos, shapes, rng) if photos else (generated(*shape, rng) for shape in shapes)
    packed = [[] for _ in range(SHARDS)]
    with contextlib.ExitStack() as stack:
        tars = [stack.enter_context(tarfile.open(folder / f"{shard:02d}.tar", "w")) for shard in range(SHARDS)]
        for number, image in enumerate(images):
            key, caption = f"{number:06d}", f"a photograph with the number {number}"
            jpeg = simplejpeg.encode_jpeg(image, quality=90, colorsubsampling="420")
            for extension, content in (("jpg", jpeg), ("txt", caption.encode())):
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tars[number % SHARDS].addfile(member, io.BytesIO(content))
            record = {"key": key, "image": jpeg, "captions": {"txt": [caption]}, "mirror": 1}
            packed[number % SHARDS].append(records.encode(record))
    for shard in range(SHARDS):
        records.write(folder / f"{shard:02d}.array_record", packed[shard])
    (folder / "complete").touch()


def generated(height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """An image that compresses like a photograph: noise of every scale, the finer the weaker, and some hard edges."""
    import cv2

    image, strength = np.full((4, 4, 3), 128, np.float32), 40.0
    while image.shape[0] < height // 2:
        image = image + strength * rng.standard_normal(image.shape, np.float32)
        image = cv2.resize(image, None, fx=2, fy=2, interpolation=cv2.INTER_LINEAR)
        strength *= 0.7
    image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    for _ in range(8):
        corners = rng.uniform(0, (width, height), (4, 2)).astype(np.int32)
        cv2.fillConvexPoly(image, cv2.convexHull(corners), rng.uniform(0, 255, 3).tolist())
    return with_grain(image, rng)


def photographs(path: str, shapes: Iterable[tuple[int, int]], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The images of a tar file in these heights and widths, over and over."""
    import cv2

    from mmjax.data import image as images

    with tarfile.open(path) as tar:
        members = [member for member in tar if member.name.endswith((".jpg", ".jpeg", ".png", ".webp"))]
        for number, (height, width) in enumerate(shapes):
            pixels = images.decode(tar.extractfile(members[number % len(members)]).read())
            larger = cv2.resize(pixels, (width, height), interpolation=cv2.INTER_CUBIC)
            yield with_grain(larger.astype(np.float32), rng)


def with_grain(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Adds the noise of a sensor: most of what a JPEG file of quality 90 spends its bytes on."""
    grain = rng.standard_normal((*image.shape[:2], 1), np.float32) * 5
    return np.clip(image + grain, 0, 255).astype(np.uint8)


def mmjax_batches(arguments: argparse.Namespace, kind: str, name: str) -> Iterator[np.ndarray]:
    """The batches of a training run on one of the two sets, read as `kind`."""
    from absl import flags

    from mmjax import config as configs
    from mmjax import runtime

    flags.FLAGS.mark_as_parsed()  # worker processes want it
    runtime.configure()
    from mmjax.data import pipeline, text
    from mmjax.data.sources import open_stream

    folder = Path(arguments.data) / name
    suffix = {"webdataset": "tar", "array_record": "array_record"}[kind]
    config = configs.default()
    config.model.encoders.image = configs.image_encoder(image_size=SIZE)
    config.model.encoders.text = configs.text_encoder(length=TEXT_LENGTH)
    source = f"{kind}:" + "::".join([f"{folder}/*.{suffix}"] * LISTED)
    config.streams.train = configs.stream(source=source, batch_size=BATCH_SIZE)
    config.streams.train.preprocess.update(
        resize="inception_crop", crop_min_area=MIN_AREA, crop_max_aspect=MAX_ASPECT, mirror=0.0
    )
    for option in ("threads", "workers"):
        if getattr(arguments, option) is not None:
            config.loader[option] = getattr(arguments, option)
    sources = {"train": open_stream(config.streams.train)}
    tokenizer_file = folder / "tokenizer.json"
    text.train_bpe(["a photograph with the number 0123456789"], VOCAB_SIZE, tokenizer_file)
    tokenizer = text.load(tokenizer_file)
    steps = 100_000  # more than there is time for
    for _, batch, broken in pipeline.train_batches(
        config, sources, tokenizer, {"train": np.arange(BATCH_SIZE)}, 0, steps
    ):
        if broken:
            sys.exit(f"error: {broken[0]}")
        yield batch["image"]


def tfdata_batches(arguments: argparse.Namespace, name: str) -> Iterator[np.ndarray]:
    """TFRecord files through tf.data."""
    import tensorflow as tf

    folder = Path(arguments.data) / name
    write_tfrecords(folder)
    features = {feature: tf.io.FixedLenFeature([], tf.string) for feature in ("image", "captions/text")}

    def example(packed):
        record = tf.io.parse_single_example(packed, features)
        shape = tf.io.extract_jpeg_shape(record["image"])
        begin, extent, _ = tf.image.sample_distorted_bounding_box(
            shape,
            tf.zeros([1, 0, 4], tf.float32),
            area_range=(MIN_AREA, 1.0),
            aspect_ratio_range=(1 / MAX_ASPECT, MAX_ASPECT),
            max_attempts=10,
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], extent[:2]], 0)
        pixels = tf.io.decode_and_crop_jpeg(
            record["image"], window, channels=3, dct_method="INTEGER_FAST", fancy_upscaling=False
        )
        pixels = tf.image.resize(pixels, (SIZE, SIZE))
        return tf.saturate_cast(pixels, tf.uint8), record["captions/text"]

    dataset = tf.data.Dataset.from_tensor_slices(sorted(map(str, folder.glob("*.tfrecord")))).shuffle(SHARDS).repeat()
    dataset = dataset.interleave(
        tf.data.TFRecordDataset, cycle_length=SHARDS, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False
    )
    dataset = dataset.shuffle(SHUFFLED).map(example, num_parallel_calls=tf.data.AUTOTUNE, deterministic=False)
    dataset = dataset.batch(BATCH_SIZE, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
    for images, _ in dataset.as_numpy_iterator():
        yield images


def write_tfrecords(folder: Path) -> None:
    """Copies the packed records of the ArrayRecord files, unless that has been done."""
    import tensorflow as tf
    from array_record.python.array_record_module import ArrayRecordReader

    for path in sorted(folder.glob("*.array_record")):
        target, temporary = path.with_suffix(".tfrecord"), path.with_suffix(".temporary")
        if not target.exists():
            reader = ArrayRecordReader(str(path))
            with tf.io.TFRecordWriter(str(temporary)) as writer:
                for packed in reader.read_all():
                    writer.write(packed)
            reader.close()
            temporary.rename(target)


def torch_batches(arguments: argparse.Namespace, name: str, transform: Callable) -> Iterator:
    """Tar files through PyTorch's DataLoader; `transform` makes pixels of a JPEG file."""
    from torch.utils.data import DataLoader, IterableDataset, get_worker_info

    class Tars(IterableDataset):
        def __iter__(self):
            worker = get_worker_info()
            random.seed(worker.seed)
            mine = sorted(map(str, (Path(arguments.data) / name).glob("*.tar")))[worker.id :: worker.num_workers]
            for jpeg, caption in shuffled(tar_pairs(mine)):
                yield transform(jpeg), caption

    for images, _ in DataLoader(Tars(), BATCH_SIZE, num_workers=WORKERS, drop_last=True):
        yield images


def tar_pairs(paths: list[str]) -> Iterator[tuple[bytes, str]]:
    """(JPEG, caption) of the records of tar files, read from start to end, over and over."""
    while True:
        random.shuffle(paths)
        for path in paths:
            with tarfile.open(path, "r|") as tar:
                for member in tar:
                    content = tar.extractfile(member).read()
                    if member.name.endswith(".jpg"):
                        jpeg = content
                    else:
                        yield jpeg, content.decode()
                    tar.members = []  # else the reader keeps all of them


def shuffled(items: Iterator) -> Iterator:
    """The items, each drawn from SHUFFLED of them."""
    waiting = [next(items) for _ in range(SHUFFLED)]
    for item in items:
        place = random.randrange(SHUFFLED)
        yield waiting[place]
        waiting[place] = item


def torch_pil_batches(arguments: argparse.Namespace, name: str) -> Iterator:
    """Pillow and torchvision, as open_clip's transforms for training; without normalisation."""
    from PIL import Image
    from quickstart import import_torchvision

    import_torchvision()
    import torch
    from torchvision.transforms import InterpolationMode, RandomResizedCrop

    crop = RandomResizedCrop(SIZE, (MIN_AREA, 1.0), (1 / MAX_ASPECT, MAX_ASPECT), InterpolationMode.BICUBIC)

    def transform(jpeg: bytes):
        picture = crop(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        return torch.from_numpy(np.array(picture))

    return torch_batches(arguments, name, transform)


def torch_simplejpeg_batches(arguments: argparse.Namespace, name: str) -> Iterator:
    """The fastest decoder and resizing that have Python packages."""
    import cv2
    import simplejpeg
    import torch

    cv2.setNumThreads(0)

    def transform(jpeg: bytes):
        pixels = simplejpeg.decode_jpeg(jpeg, fastdct=True, fastupsample=True)
        top, left, height, width = random_window(*pixels.shape[:2])
        window = pixels[top : top + height, left : left + width]
        return torch.from_numpy(cv2.resize(window, (SIZE, SIZE), interpolation=cv2.INTER_LINEAR))

    return torch_batches(arguments, name, transform)


def random_window(height: int, width: int) -> tuple[int, int, int, int]:
    """Top, left, height and width, as torchvision's `RandomResizedCrop` draws them; all of the image in the end."""
    for _ in range(10):
        area = height * width * random.uniform(MIN_AREA, 1.0)
        aspect = math.exp(random.uniform(-math.log(MAX_ASPECT), math.log(MAX_ASPECT)))
        tall, wide = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
        if 0 < tall <= height and 0 < wide <= width:
            return random.randint(0, height - tall), random.randint(0, width - wide), tall, wide
    return 0, 0, height, width


PIPELINES = {
    "tar/mmjax": lambda arguments: mmjax_batches(arguments, "webdataset", "small"),
    "tfrecord/tfdata": lambda arguments: tfdata_batches(arguments, "small"),
    "array_record/mmjax": lambda arguments: mmjax_batches(arguments, "array_record", "small"),
    "tar/torch_pil": lambda arguments: torch_pil_batches(arguments, "small"),
    "tar/torch_simplejpeg": lambda arguments: torch_simplejpeg_batches(arguments, "small"),
    "large/mmjax": lambda arguments: mmjax_batches(arguments, "webdataset", "large"),
    "large/tfdata": lambda arguments: tfdata_batches(arguments, "large"),
    "large/torch_pil": lambda arguments: torch_pil_batches(arguments, "large"),
    "large/torch_simplejpeg": lambda arguments: torch_simplejpeg_batches(arguments, "large"),
}


if __name__ == "__main__":
    sys.exit(main())
