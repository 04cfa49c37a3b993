"""The sections of what evaluators drew, of classes, and of explanations."""

import base64
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from mmjax.errors import one_line
from mmjax.report.markup import Markup, details, join, row, table, tag
from mmjax.report.plot import share_bar
from mmjax.report.read import Run, read_classes, read_json
from mmjax.report.section import Section, nothing, number, run_titles, section

MOST_CLASSES = 10  # at either end of a table of classes; all of them are shown on demand
_DRAWN = {
    "retrieval": "Captions and the images found for them, best first; the right ones are framed in green",
    "captions": "Held-out images with the captions written for them, green where right",
    "robustness": "An image as it is, and corrupted at severities 1 to 5",
}


def pictures(runs: Sequence[Run]) -> Section:
    """What evaluators drew, but for what is about classes."""
    names = sorted({name for run in runs for name in run.pictures if not _is_of_classes(runs, name)})
    made = []
    for name in names:
        about = next((_DRAWN[kind] for run in runs if (kind := run.evaluator(name).get("kind")) in _DRAWN), None)
        hint = about and tag("p", about, ".", class_="hint")
        made.append(join(tag("h3", name), hint, _drawn(runs, name, about or "picture of an evaluator")))
    content = made or nothing("No evaluator has drawn a picture: contact_sheet is not set.")
    return section(runs, "pictures", "Answers", content)


def classes(runs: Sequence[Run]) -> Section:
    """How many images of each class are right, and the pictures of the same evaluators."""
    hint = tag("p", "Recall: the share of a class's images that are right.", class_="hint")
    made = []
    for name in sorted({name for run in runs for name in run.classes}):
        titled = zip(runs, run_titles(runs), strict=True)
        tables = [_recalls(run, name, title) for run, title in titled if name in run.classes]
        made.append(join(tag("h3", name), tag("div", tables, class_="parts")))
        for picture, about in ((name, "Confusion matrix"), (f"reliability-{name}", "Reliability diagram")):
            if any(picture in run.pictures for run in runs):
                made.append(join(tag("h4", about), _drawn(runs, picture, about)))
    content = join(hint, made) if made else nothing("No evaluator has told classes apart.")
    return section(runs, "classes", "Classes", content)


def explanations(runs: Sequence[Run]) -> Section | None:
    """What models looked at, with the weights of their texts' tokens; None where no run has any."""
    found = [sorted((run.path / "eval/explanations").glob("*.png"), key=_by_number) for run in runs]
    if not any(found) and not any("explanations" in run.notes for run in runs):
        return None
    hint = "The warmer a patch and the darker a token, the more the similarity of image and text rests on it."
    made = [
        join(tag("h3", title), tag("div", [_explanation(run, path) for path in paths], class_="pictures"))
        for run, title, paths in zip(runs, run_titles(runs), found, strict=True)
        if paths
    ]
    return section(runs, "explanations", "Explanations", tag("p", hint, class_="hint"), made)


def _by_number(path: Path) -> tuple[int, str]:
    return len(path.name), path.name


def _is_of_classes(runs: Sequence[Run], name: str) -> bool:
    return any(name.removeprefix("reliability-") in run.classes for run in runs)


def _drawn(runs: Sequence[Run], name: str, about: str) -> Markup:
    """The pictures of an evaluator, side by side."""
    found = [
        _picture(
            run.pictures[name].path, f"{name} of {run.name}: {about}", [title, f", step {run.pictures[name].step:,}"]
        )
        for run, title in zip(runs, run_titles(runs), strict=True)
        if name in run.pictures
    ]
    return tag("div", found, class_="pictures")


def _picture(path: Path, alt: str, caption: Sequence, *more: Markup) -> Markup:
    """A picture inside the page, or in its place what is wrong with it."""
    try:
        with Image.open(path) as image:
            image.load()
            width, height = image.size
        content = base64.b64encode(path.read_bytes()).decode()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        shown = nothing(f"{path.name} cannot be shown: {one_line(error)}".replace(str(path), path.name))
    else:
        shown = tag("img", src=f"data:image/png;base64,{content}", alt=alt, width=width, height=height)
    return tag("figure", shown, tag("figcaption", caption), *more)


def _recalls(run: Run, name: str, title: Markup) -> Markup:
    """The classes with the lowest and the highest recall, and all of them on demand."""
    of_step = join(title, f", step {run.classes[name].step:,}: ")
    found = sorted(read_classes(run, run.classes[name].path), key=lambda each: (each[2], -each[1], each[0]))
    if len(found) <= 2 * MOST_CLASSES:
        return _table(join(of_step, f"all {len(found)}, lowest recall first"), found)
    highest = sorted(found, key=lambda each: (-each[2], -each[1], each[0]))[:MOST_CLASSES]
    whole = details(f"All {len(found):,} classes", _table(None, found, bars=False))
    lowest = _table(join(of_step, f"the {MOST_CLASSES} lowest of {len(found):,}"), found[:MOST_CLASSES], more=whole)
    return join(lowest, _table(join(of_step, f"the {MOST_CLASSES} highest"), highest))


def _table(
    title: Markup | None, found: Sequence[tuple[str, int, float]], bars: bool = True, more: Markup | None = None
) -> Markup:
    rows = [
        row(name, [f"{images:,}", tag("td", number(recall), share_bar(recall) if bars else None)])
        for name, images, recall in found
    ]
    made = table("Recall by class", ["class", "images", "recall"], rows, "numbers")
    return tag("div", title and tag("h4", title), made, more, class_="part")


def _explanation(run: Run, path: Path) -> Markup:
    about = read_json(run, f"eval/explanations/{path.stem}.json", "explanations")
    title = str(about.get("title") or path.stem)
    try:
        tokens = [(str(text), float(weight)) for text, weight in about.get("tokens") or ()]
    except (TypeError, ValueError):
        run.note("explanations", f"{path.stem}.json: its tokens are no pairs of a text and a weight")
        tokens = []
    spans = [tag("span", text, class_=f"token w{_tenth(weight)}", title=number(weight)) for text, weight in tokens]
    return _picture(path, f"What the model looked at: {title}", [title], tag("p", spans, class_="tokens"))


def _tenth(weight: float) -> int:
    return round(10 * min(max(weight, 0.0), 1.0)) if weight == weight else 0
