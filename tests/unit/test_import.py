"""A serving process imports mope: it must be quick and bring none of what only training needs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parents[2] / "mope"
OTHERS = ("mope.training", "mope.export", "mope.serving_hooks")
MAX_IMPORT_S = 0.3
HEAVY = ("torch", "transformers", "onnxruntime", "sklearn", "lightning", "datasets", "pandas")
PROBE = """
import json, sys, time
started = time.process_time()
{statement}
seconds = time.process_time() - started
print(json.dumps({{"seconds": seconds, "modules": sorted({{name.partition(".")[0] for name in sys.modules}})}}))
"""
STATEMENTS = ("import mope", "from mope import LengthPredictor", "import mope.cli")


def imported(statement: str) -> tuple[float, set[str]]:
    """CPU seconds of a statement in a fresh interpreter, and the top-level modules that are loaded after it."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE.format(statement=statement)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    return result["seconds"], set(result["modules"])


@pytest.mark.parametrize("statement", STATEMENTS)
def test_importing_loads_nothing_heavy(statement: str) -> None:
    _, modules = imported(statement)
    assert "mope" in modules
    assert sorted(modules.intersection(HEAVY)) == []


def test_import_is_quick() -> None:
    tries = (imported("import mope")[0] for _ in range(10))
    assert any(seconds < MAX_IMPORT_S for seconds in tries), f"import mope takes more than {MAX_IMPORT_S} s of CPU time"


def imports(tree: ast.AST) -> set[str]:
    """Names of the modules that a piece of code imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


@pytest.mark.parametrize("file", sorted(RUNTIME.rglob("*.py")), ids=lambda file: str(file.relative_to(RUNTIME)))
def test_the_runtime_imports_nothing_of_training_export_or_hooks(file: Path) -> None:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    if file.name == "cli.py":  # hands commands over, inside the function that is called
        code: list[ast.stmt] = [part for part in tree.body if not isinstance(part, ast.FunctionDef | ast.ClassDef)]
        tree = ast.Module(body=code, type_ignores=[])
    assert [name for name in imports(tree) if f"{name}.".startswith(tuple(f"{other}." for other in OTHERS))] == []
