"""Predictors that come with the package, by name.

Knows where they lie; what is inside a saved predictor is in `mope.artifact`.
"""

from __future__ import annotations

from pathlib import Path

PREDICTORS = Path(__file__).parent / "predictors"


def names() -> list[str]:
    """Names of the packaged predictors, in alphabetical order."""
    return sorted(path.parent.name for path in PREDICTORS.glob("*/files.json"))


def folder_of(name: str) -> Path | None:
    """The folder of a packaged predictor, None if there is none of that name."""
    return PREDICTORS / name if name in names() else None


def located(name_or_path: str | Path) -> Path:
    """The path itself if something lies there, else the packaged predictor's folder of that name, else the path."""
    path = Path(name_or_path).expanduser()
    return path if path.exists() else folder_of(str(name_or_path)) or path


def shown(folder: Path) -> str:
    """What a user types for a folder: the name of a packaged predictor, else its path."""
    return folder.name if folder.parent == PREDICTORS else str(folder)
