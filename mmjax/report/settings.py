"""The sections of the configuration and of the environment."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

from mmjax.config import flatten
from mmjax.report.markup import Markup, breakable, details, join, row, table, tag
from mmjax.report.read import Run
from mmjax.report.section import Section, nothing, run_titles, section

# What one asks first of a run.
_MAIN = re.compile(
    r"seed|model\.(encoders\.\w+|fusion|decoder)\.(variant|width|depth|image_size|length|vocab_size|pooling)"
    r"|objectives\.[^.]+\.(kind|weight)|streams\.[^.]+\.(source|split|batch_size)"
    r"|optimizer\.(name|learning_rate|schedule|warmup|weight_decay|grad_clip_norm)|train\.(steps|examples|epochs|ema_decay)"
)


def configuration(runs: Sequence[Run]) -> Section:
    """What the runs were told: of one its main settings, of several the differences; all of it on demand."""
    configs = [dict(flatten(run.config)) for run in runs]
    keys = list(dict.fromkeys(key for config in configs for key in config))
    missing = [nothing(f"{run.name}: there is no config.json that can be read.") for run in runs if not run.config]
    if not keys:
        return section(runs, "configuration", "Configuration", missing)
    head = run_titles(runs)
    # A run without a record differs from nobody, here and below.
    differing = [key for key in keys if _differs([config.get(key) for config in configs if config])]
    everything = details(
        f"The whole configuration: {len(keys)} settings",
        table("The whole configuration", ["setting", *head], _rows(keys, configs, set(differing))),
    )
    if len(runs) == 1:
        main = [key for key in keys if _MAIN.fullmatch(key) and configs[0][key] not in (0, "", None)]
        first = table("The main settings", ["setting", *head], _rows(main, configs, set()))
    elif differing:
        hint = tag("p", f"Settings that differ: {len(differing)} of {len(keys)}.", class_="hint")
        shown = [_with_parts(config, configs, differing) for config in configs]
        rows = _rows(dict.fromkeys(key for each in shown for key in each), shown, set())
        first = join(hint, table("Settings that differ", ["setting", *head], rows))
    else:
        first = tag("p", "All runs have the same configuration.")
    return section(runs, "configuration", "Configuration", missing, first, everything)


def environment(runs: Sequence[Run]) -> Section:
    """Where the runs' latest sessions ran."""
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    missing = [
        nothing(f"{run.name}: there is no environment.json that can be read; the trainer writes it when it starts.")
        for run in runs
        if not run.environment
    ]
    found = [run.environment for run in runs]
    differing = {key for key in keys if _differs([each.get(key) for each in found if each])}
    made = table("Environment", ["", *run_titles(runs)], _rows(keys, found, differing)) if keys else None
    return section(runs, "environment", "Environment", missing, made)


def _with_parts(config: dict[str, Any], configs: Sequence[dict[str, Any]], keys: Sequence[str]) -> dict[str, Any]:
    """Some settings; those of a part that a run lacks, such as `objectives.captioning`, are one, and told in words."""
    parts = [{".".join(key.split(".")[:2]) for key in each} for each in configs]
    found: dict[str, Any] = {}
    for key in filter(config.__contains__, keys):
        part, rest = ".".join(key.split(".")[:2]), ".".join(key.split(".")[2:])
        if not rest or all(part in each for each in parts):
            found[key] = config[key]
        elif config[key] or part not in found:
            words = f"{rest.replace('_', ' ')} {_text(config[key])}"
            found[part] = f"{found[part]}, {words}" if part in found else words
    return found


def _differs(values: Sequence[Any]) -> bool:
    return any(value != values[0] for value in values)


def _rows(keys: Iterable[str], found: Sequence[dict[str, Any]], marked: set[str]) -> list[Markup]:
    return [
        row(
            breakable(key),
            [_text(each[key]) if key in each else "–" for each in found],
            "differs" if key in marked else None,
        )
        for key in keys
    ]


def _text(value: Any) -> str:
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)
