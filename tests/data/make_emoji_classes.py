"""Writes mmjax/data/emoji_classes.txt: the emoji of each of Unicode's groups and subgroups.

    python -m tests.data.make_emoji_classes emoji-test.txt

It reads Unicode's own `emoji-test.txt` (Emoji 17.0), which is in every release of the Unicode emoji data files.
"""

import sys
from pathlib import Path

from mmjax.data import emoji_classes


def main(source: Path) -> None:
    """Reads Unicode's file; keeps the licence that the table already carries."""
    group, lines = "", {}
    for line in source.read_text("utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ")
        elif line.startswith("# subgroup: "):
            emoji = lines.setdefault((group, line.removeprefix("# subgroup: ")), {})
        elif "; fully-qualified" in line:
            points = line.partition(";")[0].split()
            emoji[emoji_classes.plain("-".join(points))] = None
    old = emoji_classes.PATH.read_text("utf-8").splitlines(keepends=True)
    notice = [line for line in old if line.startswith("#")]
    table = [f"{group}; {subgroup}; {' '.join(emoji)}\n" for (group, subgroup), emoji in lines.items() if emoji]
    emoji_classes.PATH.write_text("".join(notice + table), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
