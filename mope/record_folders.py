"""Which local files a path, a folder or a glob names; of a folder those of a split: plain files, a copy of a Hub data
set, or what `save_to_disk` wrote.

Split names are those that `datasets` finds in names of files and folders.
"""

from __future__ import annotations

import glob
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath
from typing import Any

from mope.errors import DataError
from mope.record_files import ARROW_SUFFIXES, KNOWN_SUFFIXES, is_known

TRAIN = "train"
# as `datasets.data_files.SPLIT_KEYWORDS` has them; a test compares
KEYWORDS = {
    TRAIN: ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_EDGE = "[-._ 0-9]"
_PATTERNS = {
    split: re.compile(rf"(?:^|{_EDGE})(?:{'|'.join(words)})(?:{_EDGE}|$)") for split, words in KEYWORDS.items()
}
_SHARD = re.compile(r"(\w+(?:\.\w+)*)-\d{5}-of-\d{5}")
_STATE, _SPLITS = "state.json", "dataset_dict.json"
# of the Hub and of `datasets`, and no data
_NO_DATA = frozenset({"dataset_info.json", "dataset_infos.json", "config.json", _STATE, _SPLITS})


MAX_NAMED = 5  # files that a warning names


def local_files(source: str, split: str) -> tuple[tuple[Path, ...], tuple[str, ...]] | None:
    """The files that a source names, in order, and the names of files of other splits.

    Args:
        source: path of a file or folder, or a glob; a file may have any suffix.
        split: see `data_files`.

    Returns:
        None: there is no such path, and it is no glob.

    Raises:
        DataError: a glob that matches nothing or unknown files, or a folder as `data_files` raises.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return data_files(path, split)
    if path.exists():
        return (path,), ()
    if not glob.has_magic(source):
        return None
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if Path(name).is_file())
    if not found:
        raise DataError(f"no file matches {source!r}; expected files ending in {KNOWN_SUFFIXES}")
    return tuple(known_suffix(name) for name in found), ()


def known_suffix(path: Path) -> Path:
    """The path itself.

    Raises:
        DataError: its suffix is not known.
    """
    if not is_known(path.name):
        raise DataError(f"{path.name} has an unknown suffix; expected one of {KNOWN_SUFFIXES}")
    return path


def left_out_warning(names: Sequence[str]) -> str:
    """What to say of files of other splits."""
    listed = ", ".join(names[:MAX_NAMED]) + (", ..." if len(names) > MAX_NAMED else "")
    return (
        f"files of other splits were left out ({len(names):,}): {listed}; to read them give a path, a glob, or "
        "--hub-split"
    )


def data_files(folder: Path, split: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a split in a folder, in order, and the names of those that belong to other splits.

    Args:
        folder: is looked through with all folders in it, hidden ones left out.
        split: files without a split in their names are of `train`.

    Raises:
        DataError: nothing of that split, or files of `datasets` that can't be read.
    """
    if (folder / _SPLITS).is_file():
        return _saved_splits(folder, split)
    mine: list[Path] = []
    others: list[tuple[str, str]] = []
    saved: dict[Path, list[Path] | None] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and is_known(path.name)):
        inside = path.relative_to(folder)
        if any(part.startswith(".") for part in inside.parts):
            continue
        if path.parent not in saved:
            is_saved = (path.parent / _STATE).is_file() and any(path.parent.glob("*.arrow"))
            saved[path.parent] = _saved_files(path.parent) if is_saved else None
        listed = saved[path.parent]
        if path not in listed if listed is not None else path.name in _NO_DATA:
            continue
        name = split_of(inside, split)
        if name == split:
            mine.append(path)
        else:
            others.append((name, inside.as_posix()))
    if mine:
        return tuple(mine), tuple(name for _, name in others)
    if others:
        there = ", ".join(sorted({name for name, _ in others}))
        raise DataError(
            f"folder {str(folder)!r} holds no files of the split {split!r}, but such of {there}: type --hub-split "
            f"{others[0][0]}, or give a glob such as {str(folder / '*')!r}"
        )
    raise DataError(f"folder {str(folder)!r} holds no data; expected files ending in {KNOWN_SUFFIXES}")


def split_of(path: PurePath, asked: str = TRAIN) -> str:
    """The split that the names of a file and of its folders stand for; `train` if none.

    Args:
        path: relative to the folder of the data set.
        asked: a split of another name, such as `train_sft`, which names of shards may have.
    """
    if asked not in KEYWORDS and (shard := _SHARD.match(path.name)) and shard[1] == asked:
        return asked
    for parts in (path.parts[:-1], path.parts[-1:]):  # folders go before files
        for split, pattern in _PATTERNS.items():  # train first: `datasets` reads what has two names for both
            if any(pattern.search(part) for part in parts):
                return split
    return TRAIN


def _saved_splits(folder: Path, split: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """The files of a split of a saved `DatasetDict`."""
    listed = _read(folder / _SPLITS).get("splits")
    splits = [name for name in listed if isinstance(name, str)] if isinstance(listed, list) else []
    if split not in splits:
        there = ", ".join(splits) or "none"
        raise DataError(
            f"folder {str(folder)!r} holds no split {split!r}; there are {there}"
            + (f": type --hub-split {splits[0]}" if splits else "")
        )
    others = [f"{name}/" for name in splits if name != split]
    return tuple(_saved_files(folder / split)), tuple(others)


def _saved_files(folder: Path) -> list[Path]:
    """The files of a saved `Dataset`; others that lie beside them are caches."""
    listed = _read(folder / _STATE).get("_data_files")
    names = [one.get("filename") for one in listed if isinstance(one, Mapping)] if isinstance(listed, list) else []
    files = [folder / name for name in names if isinstance(name, str) and PurePath(name).name == name]
    missing = next((file.name for file in files if not file.is_file()), None)
    if missing is not None or not files or any(file.suffix not in ARROW_SUFFIXES for file in files):
        raise DataError(
            f"{folder / _STATE} names {missing or 'no Arrow file'}, which is not there: save the data set anew with "
            "save_to_disk, or give the .arrow files by a glob"
        )
    return files


def _read(path: Path) -> Mapping[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path} can't be read ({error}): save the data set anew with save_to_disk") from error
    return content if isinstance(content, Mapping) else {}
