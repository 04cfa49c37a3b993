"""What the pages say is what the programs take."""

import re
import shlex

import pytest

from mmjax import cli
from mmjax import config as configs
from mmjax.validation import validate
from tests.programs import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands():
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE):
            for line in filter(None, block.splitlines()):
                yield pytest.param(line, id=f"{page.name}: {line}")


@pytest.mark.parametrize("line", list(commands()))
def test_every_command_names_what_exists(line):
    for command in line.split("&&"):
        words = shlex.split(command)
        if words[0] == "python" and words[1] == "-m":
            assert (ROOT / (words[2].replace(".", "/") + ".py")).exists(), words[2]
        elif words[0] == "python":
            assert (ROOT / words[1]).exists(), words[1]
        else:
            assert words[0] in ("pip", "pytest", "tensorboard") or (ROOT / words[0]).exists(), words[0]
        recipe = [word for word in words if word.startswith("--config=")]
        overrides = [word[len("--config.") :] for word in words if word.startswith("--config.")]
        if recipe:
            config = cli.load_recipe(str(ROOT / recipe[0].removeprefix("--config=")))
            for override in overrides:
                configs.check_key(config, override.partition("=")[0])
            validate(config, 1)


def test_every_setting_is_explained():
    page = (ROOT / "docs" / "configs.md").read_text()
    parts = [configs.default(), configs.stream(), configs.component()]
    parts += [configs.objective(kind=kind) for kind in configs.OBJECTIVES]
    kinds = configs.ENCODERS, configs.PARTS, configs.HEADS, configs.EVALUATORS
    parts += [make() for known in kinds for make in known.values()]
    for part in parts:
        for key, _ in configs.flatten(part):
            name = key.rpartition(".")[2]
            assert re.search(rf"`([\w.]+\.)?{name}`", page), f"docs/configs.md does not explain {key}"


def test_links_and_pictures_exist():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} -> {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_example_in_python_can_be_read(page):
    content = page.read_text()
    inside = re.findall(r"^.*[^\s`].*```.*$", content, re.MULTILINE)
    assert not inside, f"a block ends within a line: {inside[0]}"
    for block in re.findall(r"^```python\n(.*?)^```", content, re.DOTALL | re.MULTILINE):
        compile(block, page.name, "exec")
