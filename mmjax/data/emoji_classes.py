"""The classes of emoji: Unicode's groups ("Animals & Nature") and their subgroups ("animal-mammal").

`emoji_classes.txt` lists them, in Unicode's own order, with the emoji of each; Unicode's licence is at its top. An
emoji has the class of its base: neither skin tones nor variation selectors count.
"""

import functools
from pathlib import Path
from typing import NamedTuple

PATH = Path(__file__).with_suffix(".txt")
NAMES = ("group", "subgroup")

_WITHOUT_CLASS = frozenset(("FE0F", "1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"))


class EmojiClass(NamedTuple):
    """`number` is the place of the subgroup among all of them, from 0; a subgroup's name has spaces for hyphens."""

    number: int
    group: str
    subgroup: str


def plain(key: str) -> str:
    """Code points in hexadecimal, joined by "-", without skin tones and variation selectors."""
    return "-".join(point for point in key.split("-") if point not in _WITHOUT_CLASS)


def class_of(key: str) -> EmojiClass | None:
    """The class of an emoji, or None where Emoji 17.0 has no such one; `key` is its code points in hexadecimal, joined
    by "-".
    """
    return _table().get(plain(key))


@functools.cache
def _table() -> dict[str, EmojiClass]:
    lines = [line for line in PATH.read_text("utf-8").splitlines() if not line.startswith("#")]
    table = {}
    for number, line in enumerate(lines):
        group, subgroup, keys = line.split("; ")
        table |= dict.fromkeys(keys.split(), EmojiClass(number, group, subgroup.replace("-", " ")))
    return table
