"""Draws `overview.png`: what a prediction looks like, and what fair scheduling does for a light client.

The left side asks the packaged `chat-small`; the right side reads the figures of the replay that it names.

    python docs/figures/overview.py
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from mope import LengthPredictor

ROOT = Path(__file__).resolve().parents[2]
REPLAY = ROOT / "model_cards" / "results" / "2026-11-26-replay-vllm" / "replay.md"
PROMPTS = {
    "Is water wet? Yes or no.": "#55a868",
    "Explain TCP slow start.": "#1f5fa8",
    "Write an essay on Rome.": "#dd7727",
}
POLICIES = {"fcfs": "first come,\nfirst served", "equinox": "shared fairly\n(policy equinox)"}


def light_client_s(policy: str) -> float:
    """Seconds that the light client waits for its first token on average, from the replay's table."""
    row = re.search(rf"^\| {policy}(?:, noisy)?: light \|.*$", REPLAY.read_text(encoding="utf-8"), re.MULTILINE)
    assert row is not None
    return float(row[0].split("|")[7].split("±")[0])


def main() -> None:
    """Write the picture beside this file."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 3.2), width_ratios=(1.5, 1))
    predictor = LengthPredictor.from_pretrained("chat-small")
    levels = np.linspace(0.005, 0.995, 199)
    for prompt, color in PROMPTS.items():
        tokens = np.asarray(predictor.predict(prompt, target_llm="gpt-4").quantiles(levels))
        left.plot(tokens, 100 * levels, color=color, label=prompt)
    left.set(xscale="log", xlim=(1, 3000), ylim=(0, 100))
    left.set(xlabel="tokens of the answer", ylabel="% of such answers are shorter", title="What mope predicts")
    left.legend(frameon=False, loc="upper left")
    names = list(POLICIES.values())
    seconds = [light_client_s(policy) for policy in POLICIES]
    bars = right.barh(names, seconds, color=["#999999", "#1f5fa8"], height=0.55)
    right.bar_label(bars, [f" {second:g} s" for second in seconds])
    right.set(
        xlim=(0, 1.2 * max(seconds)), xlabel="mean seconds to its first token", title="A light client next to a flood"
    )
    right.invert_yaxis()
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
