"""Copies of saved predictors for serving: all that a prediction needs, without the weights that PyTorch needs.

Needs neither torch nor onnx.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mope import artifact
from mope.artifact import weight_files
from mope.backends.onnx_backend import ONNX_FOLDER
from mope.config import PredictorConfig
from mope.errors import ConfigError
from mope.sealed import LISTING, NEEDED, Sealed

PICTURE = re.compile(r"^!\[.*\]\(plots/.*\)\n+", re.MULTILINE)  # of the card; copies for serving have no plots


@contextmanager
def lean_copy(folder: Path, config: PredictorConfig, output: Path) -> Iterator[Path]:
    """The folder `onnx/` of a copy without weights, which appears when the block ends without an error.

    Args:
        folder: of the saved predictor.
        config: of the saved predictor.
        output: folder of the copy; an earlier copy of the same predictor is replaced.

    Yields:
        An empty folder for the copy's graphs and their manifest.

    Raises:
        ConfigError: weights lie where the copy should go.
        ArtifactError: the copy of another predictor lies there.
    """
    weights = weight_files(config)
    if any((output / name).exists() for name in weights):
        raise ConfigError(f"--output {output} is a predictor with weights, which would be lost; choose another folder")
    saved = Sealed(folder)
    source_of = dict.fromkeys((name for name in saved.files if name not in weights), saved)
    if is_same := (output / LISTING).exists():
        there = Sealed(output)
        is_same = all(there.files.get(name) == saved.files[name] for name in NEEDED)
        if is_same and artifact.LEARNED in there:  # what the copy learned while it served
            source_of[artifact.LEARNED] = there
    hint = "it was exported from another predictor: choose another folder, or remove it"
    with artifact.writing(output, overwrite=is_same, hint=hint) as temporary:
        for name, source in source_of.items():
            source.verify(name, copy_to=temporary / name)
        artifact.copy_for_people(folder, temporary, plots=False)
        if (card := temporary / "README.md").exists():
            card.write_text(PICTURE.sub("", card.read_text(encoding="utf-8")), encoding="utf-8")
        (temporary / ONNX_FOLDER).mkdir()
        yield temporary / ONNX_FOLDER
