"""The whole page: one file that needs no other, and asks for nothing over a network."""

import base64
import hashlib
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from mmjax.errors import UserError
from mmjax.files import write_atomically
from mmjax.report import curves, pictures, results, settings, speed
from mmjax.report.markup import Markup, row, table, tag
from mmjax.report.read import Run
from mmjax.report.section import Section, number, run_titles, section

FILE = "report.html"


def write(runs: Sequence[Run], folder: Path) -> Path:
    """Writes the page of some runs into a folder, which is made; returns its path.

    Raises:
      UserError: the folder cannot be made.
    """
    content = page(runs)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    write_atomically(folder / FILE, content.encode("utf-8", "replace"))
    return folder / FILE


def page(runs: Sequence[Run]) -> str:
    """The page as HTML; of the same runs it is always the same."""
    makers = (
        _overview,
        results.results,
        settings.configuration,
        curves.losses_and_metrics,
        pictures.pictures,
        pictures.classes,
        pictures.explanations,
        speed.speed,
        settings.environment,
    )
    sections = [made for make in makers if (made := make(runs))]
    style = resources.files("mmjax.report").joinpath("style.css").read_text("utf-8")
    title = " · ".join(run.name for run in runs)
    links = [tag("li", tag("a", each.title, href=f"#{each.key}")) for each in sections]
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=_policy(style)),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("link", rel="icon", href="data:,"),
        tag("title", title),
        tag("style", Markup(style)),
    )
    body = tag(
        "body",
        tag("header", tag("p", "mmjax report", class_="brand"), tag("h1", title)),
        tag("nav", tag("ul", links), aria_label="Contents"),
        tag("main", map(_shown, sections)),
    )
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _policy(style: str) -> str:
    """A Content-Security-Policy that allows this style, pictures inside the page, and nothing else."""
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def _shown(each: Section) -> Markup:
    heading = tag("h2", each.title, id=f"{each.key}-title")
    return tag("section", heading, each.content, id=each.key, aria_labelledby=f"{each.key}-title")


def _overview(runs: Sequence[Run]) -> Section:
    rows = [
        row("state", [_state(run) for run in runs]),
        row("steps", [_steps(run) for run in runs]),
        row("checkpoints", [", ".join(f"{step:,}" for step in run.checkpoints) or "none" for run in runs]),
        row("best checkpoint", [_best(run) for run in runs]),
        row("last metrics", [_when(run.last_time) for run in runs]),
        row("folder", [run.path for run in runs]),
    ]
    return section(runs, "runs", "Runs", table("Runs", ["", *run_titles(runs)], rows))


def _state(run: Run) -> str:
    if run.result:
        seconds = run.result.get("seconds")
        return "finished" + (f" in {seconds:,.0f} s" if type(seconds) in (int, float) else "")
    return "not finished: interrupted, or still running" if run.metrics else "without any metrics"


def _steps(run: Run) -> str:
    train = run.config.get("train")
    planned = train.get("steps") if isinstance(train, dict) else None
    return f"{run.step:,}" + (f" of {planned:,}" if type(planned) is int and planned else "")


def _best(run: Run) -> str:
    """The checkpoint that mmjax.evaluate marked, or else the best by `train.best_metric` of those that are there."""
    if type(run.best.get("step")) is int:
        values = [f"{name} {number(v)}" for name, v in run.best.items() if name != "step" and type(v) in (int, float)]
        return f"step {run.best['step']:,}" + (f": {', '.join(values)}" if values else "")
    train = run.config.get("train")
    name, mode = (train.get("best_metric"), train.get("best_mode")) if isinstance(train, dict) else (None, None)
    if not name:
        return "train.best_metric is not set"
    series = run.metrics[name].finite() if name in run.metrics else None
    kept = [(v, s) for s, v in zip(*series, strict=True) if s in run.checkpoints] if series else []
    if not kept:
        return f"no checkpoint has {name}"
    value, step = (min if mode == "min" else max)(kept)
    return f"step {step:,}: {name} {number(float(value))}"


def _when(seconds: float | None) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else "–"
    except (OverflowError, ValueError, OSError):
        return "–"
