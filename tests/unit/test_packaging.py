"""What is listed in pyproject.toml is what lies in the folders and what gets into the wheel."""

from __future__ import annotations

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS: dict[str, str] = SETUPTOOLS["package-dir"]
EXTRAS: dict[str, list[str]] = PYPROJECT["project"]["optional-dependencies"]
PREDICTORS = ROOT / "mope" / "predictors"
PROFILES = ROOT / "mope" / "fairness" / "profiles"
DATA_SUFFIXES = {".yaml", ".gz", ".typed"}
OTHER_DATA = {"mope/serving_hooks/dashboards/mope.json", "mope/export/TRITON.md"}


def package_of(folder: Path) -> str:
    """The import name of a folder: `training/data` is `mope.training.data`."""
    top, *below = folder.relative_to(ROOT).parts
    package = next(name for name, path in FOLDERS.items() if path == top)
    return ".".join([package, *below])


def shipped_files() -> list[Path]:
    """Every source and data file that belongs in the wheel."""
    files = [file for top in FOLDERS.values() for file in (ROOT / top).rglob("*") if file.is_file()]
    return sorted(file for file in files if file.suffix in {".py", *DATA_SUFFIXES})


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from a copy so that nothing an earlier build left behind gets in."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS.values():
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    target = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    built = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(target), str(source)],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return zipfile.ZipFile(next(target.glob("mope_llm-*.whl")))


def test_every_folder_with_code_or_data_is_listed_as_a_package() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted({package_of(file.parent) for file in shipped_files()})


def test_every_package_with_code_has_an_init() -> None:
    code = {file.parent for file in shipped_files() if file.suffix == ".py"}
    assert [str(folder) for folder in code if not (folder / "__init__.py").is_file()] == []


def test_the_wheel_holds_every_source_and_data_file_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    expected = {f"{package_of(file.parent).replace('.', '/')}/{file.name}" for file in shipped_files()}
    predictors = {file.relative_to(ROOT).as_posix() for file in PREDICTORS.rglob("*") if file.is_file()}
    assert any(name.endswith(".onnx") for name in predictors)
    profiles = {file.relative_to(ROOT).as_posix() for file in PROFILES.glob("*.json")}
    assert len(profiles) == 2
    expected |= predictors | profiles
    found = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert found == expected | OTHER_DATA
    assert "mope/py.typed" in found


def test_the_wheel_declares_its_commands(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    declared = configparser.ConfigParser()
    declared.read_string(wheel.read(name).decode())
    assert dict(declared["console_scripts"]) == PYPROJECT["project"]["scripts"]


def test_the_wheel_carries_licence_and_extras(wheel: zipfile.ZipFile) -> None:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = Parser().parsestr(wheel.read(name).decode())
    assert metadata["Name"] == "mope-llm"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert set(metadata.get_all("Provides-Extra") or []) == set(EXTRAS)
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize("command", PYPROJECT["project"]["scripts"])
def test_each_command_loads(command: str) -> None:
    (script,) = entry_points(group="console_scripts", name=command)
    assert callable(script.load())


def test_a_server_installs_no_training_package() -> None:
    base = {canonicalize_name(Requirement(line).name) for line in PYPROJECT["project"]["dependencies"]}
    assert base.isdisjoint({"torch", "transformers", "lightning", "datasets", "scikit-learn", "scipy", "pandas"})


def test_every_dependency_is_pinned_once_for_every_python() -> None:
    pins: dict[str, list[Requirement]] = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    installed = [
        *PYPROJECT["project"]["dependencies"],
        *EXTRAS["train"],
        *EXTRAS["demo"],
        *EXTRAS["profile"],
        *EXTRAS["redis"],
        *EXTRAS["serve"],
        *EXTRAS["client"],
        *EXTRAS["docs"],
        *EXTRAS["dev"],
    ]
    for wanted in map(Requirement, installed):
        if wanted.marker:
            continue
        for python in ("3.10", "3.11", "3.14"):
            named = pins.get(canonicalize_name(wanted.name), [])
            fitting = [pin for pin in named if not pin.marker or pin.marker.evaluate({"python_version": python})]
            assert len(fitting) == 1, f"{wanted.name} needs one pin for Python {python}, constraints.txt has {fitting}"
            (version,) = fitting[0].specifier
            assert version.operator == "=="
            assert wanted.specifier.contains(version.version), f"{fitting[0]} is outside of {wanted}"


def test_make_installs_the_pinned_torch() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (version,) = re.findall(r"^TORCH = torch==(\S+)$", makefile, flags=re.MULTILINE)
    assert f"torch=={version}" in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()


def test_the_version_has_an_entry_in_the_changelog() -> None:
    assert f"[{PYPROJECT['project']['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
