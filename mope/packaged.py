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
