"""How every picture of mope looks: colours, style, and a figure that saves itself.

Knows matplotlib, which is optional; does not know what is drawn.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mope.files import replaced

MOPE_BLUE = "#1f5fa8"
OTHERS = ("#d9772b", "#4a9a6f", "#a0629a", "#8a8f98", "#b5a03c", "#5fb3c4", "#c2606b", "#6b6f76")
STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555555",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


@contextmanager
def figure_to(path: Path, width: float, height: float, **style: Any) -> Iterator[Figure]:
    """A figure outside pyplot's global state (no display, nothing to close), saved when the block ends well.

    Args:
        path: PNG to write; its folder is made.
        width: inches.
        height: inches.
        **style: what differs from `STYLE`.
    """
    with mpl.rc_context(STYLE | style):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(path) as whole:
            figure.savefig(whole, metadata={"Software": None})
