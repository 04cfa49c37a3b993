"""Imports point one way."""

import ast
import subprocess
import sys
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "mmjax"
PROGRAMS = {"main", "evaluate", "prepare", "convert", "embed", "export"}
FORBIDDEN = {
    "interop": {"training", "evaluators", "api"},
    "sharding": {"models", "objectives", "data", "training", "evaluators", "api", "config", "interop"},
    "models": {"data", "objectives", "training", "evaluators", "api", "interop"},
    "objectives": {"data", "training", "evaluators", "api", "interop"},
    "data": {"models", "objectives", "training", "evaluators", "api", "sharding", "interop"},
    "evaluators": {"models", "objectives", "training", "sharding"},
    "report": {"models", "objectives", "data", "training", "evaluators", "sharding", "api"},
}


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mmjax"):
            parts = node.module.split(".")
            yield from [parts[1]] if len(parts) > 1 else [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("mmjax."))


def test_imports_point_one_way():
    for path in PACKAGE.rglob("*.py"):
        part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        programs = PROGRAMS if part in ("evaluate", "report") else PROGRAMS | {"report"}
        wrong = set(imports(path)) & (FORBIDDEN.get(part, set()) | programs)
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {wrong}"


def test_importing_the_package_is_light():
    code = "import sys, mmjax; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
