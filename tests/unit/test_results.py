"""What lies in model_cards/: small summaries that the texts cite, and links that lead somewhere."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "model_cards" / "results"
MAX_MB, MAX_PICTURES = 1.5, 2  # of all results, and of each run
FOLDERS = ("docs", "model_cards", "serving_hooks")
TEXTS = sorted([*ROOT.glob("*.md"), *(text for folder in FOLDERS for text in (ROOT / folder).rglob("*.md"))])


def test_results_are_small_and_no_dumps() -> None:
    files = [file for file in RESULTS.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < MAX_MB * 1e6
    assert {file.suffix for file in files} <= {".json", ".md", ".png", ".yaml"}
    pictures = Counter(file.parent for file in files if file.suffix == ".png")
    assert max(pictures.values()) <= MAX_PICTURES


def test_every_result_is_cited() -> None:
    """By its name, or in the log as one of `NAME-{a,b}-more`."""
    texts = "\n".join(text.read_text(encoding="utf-8") for text in TEXTS)
    for group in re.findall(r"[\w.-]*\{[\w,.-]+\}[\w.-]*", texts):
        before, names, after = re.split(r"[{}]", group)
        texts += "".join(f"\n{before}{name}{after}" for name in names.split(","))
    cited = [path.name for path in RESULTS.iterdir() if path.stem in texts]
    assert sorted(path.name for path in RESULTS.iterdir()) == sorted(cited)


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: str(text.relative_to(ROOT)))
def test_links_to_files_lead_somewhere(text: Path) -> None:
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", text.read_text(encoding="utf-8"))
    assert [link for link in links if not (text.parent / link).exists()] == []
