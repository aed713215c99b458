"""Pictures of a workload: how far apart clients' service drifts, and who waits how long for a first token.

Knows outcomes of replays; does not replay. Imports matplotlib, which is optional.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mope.figures import MOPE_BLUE, OTHERS, figure_to
from mope.serving_hooks.replay.compare import Compared
from mope.serving_hooks.replay.metrics import delivered, served
from mope.serving_hooks.replay.run import Outcome

COLOURS = (MOPE_BLUE, *OTHERS)
MAX_LINES = 8  # clients with a colour of their own: those that sent most
NUM_MOMENTS = 400


def draw(compared: Compared, folder: Path) -> list[Path]:
    """Both pictures of one workload, first seed.

    Args:
        compared: the workload, with its outcomes.
        folder: gets `NAME-service.png` and `NAME-ttft.png`.
    """
    paths = [folder / f"{compared.workload.name}-{what}.png" for what in ("service", "ttft")]
    _service(compared, paths[0])
    _waiting(compared, paths[1])
    return paths


def _busiest(outcomes: Mapping[str, Outcome]) -> list[str]:
    first = next(iter(outcomes.values()))
    names = [record.arrival.client for record in first.records]
    return sorted(set(names), key=lambda name: (-names.count(name), name))[:MAX_LINES]


def _service(compared: Compared, path: Path) -> None:
    """Weighted tokens that each client has had, over time: one panel for each policy."""
    shown = _busiest(compared.outcomes)
    with figure_to(path, 3.6 * len(compared.outcomes) + 0.6, 3.4) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(compared.outcomes), sharex=True, sharey=True))
        for axes, (variant, outcome) in zip(panels, compared.outcomes.items(), strict=True):
            moments = np.linspace(0, compared.duration_s * 1.05, NUM_MOMENTS)
            names = sorted({record.arrival.client for record in outcome.records})
            service_CT = delivered(served(outcome.records, names, compared.workload.weights), moments)
            for number, name in enumerate(shown):
                axes.plot(
                    moments, service_CT[names.index(name)] / 1000, color=COLOURS[number % len(COLOURS)], label=name
                )
            axes.axvline(compared.duration_s, color="#333333", linewidth=0.8, linestyle=":")
            axes.set(title=variant, xlabel="virtual seconds (dotted: last arrival)")
        panels[0].set_ylabel("service delivered, 1,000 weighted tokens")
        panels[0].legend(loc="upper left")


def _waiting(compared: Compared, path: Path) -> None:
    """Share of requests that had their first token after so many seconds: one panel for each of the busiest clients."""
    shown = _busiest(compared.outcomes)[:4]
    with figure_to(path, 3.2 * len(shown) + 0.6, 3.4) as figure:
        panels = np.atleast_1d(figure.subplots(1, len(shown), sharey=True))
        for axes, client in zip(panels, shown, strict=True):
            for number, (variant, outcome) in enumerate(compared.outcomes.items()):
                seconds = np.sort(
                    [
                        record.first_token_s - record.arrival.arrival_s
                        for record in outcome.records
                        if record.arrival.client == client
                    ]
                )
                colour = COLOURS[number % len(COLOURS)]
                axes.step(
                    seconds, np.arange(1, len(seconds) + 1) / len(seconds), where="post", color=colour, label=variant
                )
            axes.set(xscale="log", ylim=(0, 1.02), title=client, xlabel="seconds to the first token, log scale")
        panels[0].set_ylabel("share of its requests")
        panels[0].legend(loc="best")
