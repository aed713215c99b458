"""Predictors that come with the package, by name, and what to say of a name that is none of theirs.

Knows where they and the recipes of `mope-train` lie; what is inside a saved predictor is in `mope.artifact`.
"""

from __future__ import annotations

from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path

PREDICTORS = Path(__file__).parent / "predictors"


def names() -> list[str]:
    """Names of the packaged predictors, in alphabetical order."""
    return sorted(path.parent.name for path in PREDICTORS.glob("*/files.json"))


def recipes() -> list[str]:
    """Names of the recipes of `mope-train`, in alphabetical order; their files are looked for, nothing is imported."""
    training = find_spec("mope.training")
    folders = (training.submodule_search_locations if training else None) or ()
    return sorted({path.stem for folder in folders for path in Path(folder, "recipes").glob("*.yaml")})


def folder_of(name: str) -> Path | None:
    """The folder of a packaged predictor, None if there is none of that name."""
    return PREDICTORS / name if name in names() else None


def located(name_or_path: str | Path) -> Path:
    """The path itself if something lies there, else the packaged predictor's folder of that name, else the path."""
    path = Path(name_or_path).expanduser()
    return path if path.exists() else folder_of(str(name_or_path)) or path


def is_packaged(folder: Path) -> bool:
    """Whether a folder is that of a packaged predictor, by whatever path."""
    return folder.resolve().parent == PREDICTORS.resolve()


def shown(folder: Path) -> str:
    """What a user types for a folder: the name of a packaged predictor, else its path."""
    return folder.name if is_packaged(folder) else str(folder)


def unfinished(path: Path) -> str:
    """What to say where a predictor is not there yet because its training was stopped; empty if that is not so."""
    work = path.with_name(f"{path.name}.work") if path.name else path
    if not (work / "run.json").is_file():
        return ""
    return (
        f"{path} is not there yet: {work} holds its unfinished run; if it does not train now, add --resume to the "
        "mope-train command that began it"
    )


def not_found(name: str) -> str:
    """What to say where no predictor is called so: what it may have meant, which ones there are, what to type.

    Args:
        name: a name or path under which nothing lies.
    """
    if told := unfinished(Path(name).expanduser()):
        return told
    come = f"packaged are {' and '.join(names())}"
    own_recipe = "mope-train --recipe {} --output DIR"
    if name in recipes():
        return f"no saved predictor at {name}; it is a recipe: {own_recipe.format(name)} makes it; {come}"
    typed = name.lower().replace("_", "-")
    near = get_close_matches(typed, [*names(), *recipes()], n=1)
    if not near:
        return f"no saved predictor at {name}; mope-train DATA --output {name} makes one; {come}"
    advice = "" if near[0] in names() else f" {own_recipe.format(near[0])} makes it"
    return f"no saved predictor at {name}; {come}; did you mean {near[0]}?{advice}"
