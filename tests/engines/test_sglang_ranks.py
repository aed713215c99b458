"""Two tensor-parallel ranks, each with a scheduler and a hook of its own: they must agree on every step.

If they do not, nothing fails: the ranks compute on different requests and the answers are wrong. So the answers are
compared with those of the server without the hook, and a hook that disagrees on purpose shows that this is noticed.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.engines.tiny_sglang import Ask, Outcome, ask_all, missing, serve

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

TWO_RANKS = (
    "--tp-size",
    "2",
    "--max-running-requests",
    "3",
    "--max-total-tokens",
    "400",
    "--chunked-prefill-size",
    "32",
)
VARIABLES = {"SGLANG_CPU_OMP_THREADS_BIND": "0|1"}
OPTIONS = {"identity": "header", "predictor": "none"}


def load() -> list[Ask]:
    rng = random.Random(0)
    return [
        Ask(
            f"client-{rng.randrange(3)}",
            tuple(rng.randrange(10, 500) for _ in range(rng.choice((6, 20, 50)))),
            parameters={"max_new_tokens": rng.randint(4, 24), "temperature": 0},
        )
        for _ in range(16)
    ]


def answers(folder: Path, policy: str, variables: dict[str, str] | None = None) -> tuple[list[Outcome], dict, str]:
    options = OPTIONS if policy != "fcfs" else None
    with serve(folder, policy, options, TWO_RANKS, {**VARIABLES, **(variables or {})}) as server:
        return ask_all(server, load()), server.state(), server.printed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang-ranks")


@pytest.fixture(scope="module")
def stock(folder: Path) -> list[tuple[int, ...]]:
    return [one.output for one in answers(folder, "fcfs")[0]]


def test_ranks_agree(folder: Path, stock: list[tuple[int, ...]]) -> None:
    outcomes, state, printed = answers(folder, "equinox")
    assert [one.output for one in outcomes] == stock
    assert state["on"]
    assert {client["client"] for client in state["clients"]} == {"client-0", "client-1", "client-2"}
    ends = [one.end_s for one in outcomes]
    assert ends != sorted(ends)  # the order was not that of arrival
    assert printed.count("mope is on: policy equinox") == 1


def test_ranks_give_up_alike(folder: Path, stock: list[tuple[int, ...]]) -> None:
    outcomes, state, printed = answers(folder, "equinox", {"MOPE_TEST_FAULT": "order-raises"})
    assert [one.output for one in outcomes] == stock
    assert not state["on"]
    assert printed.count("mope has failed and is off") == 2  # once on each rank


def test_ranks_that_disagree_would_be_noticed(folder: Path, stock: list[tuple[int, ...]]) -> None:
    """Wrong answers, or ranks that wait for each other's numbers until the server ends."""
    variables = {**VARIABLES, "MOPE_TEST_FAULT": "ranks-disagree"}
    with serve(folder, "equinox", OPTIONS, TWO_RANKS, variables) as server:
        outcomes = ask_all(server, load())
    assert [one.output for one in outcomes] != stock
