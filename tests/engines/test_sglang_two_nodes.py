"""One real SGLang server on two nodes, which are two commands on this machine: tensor-parallel ranks on each.

The nodes have other hash seeds, and the same secret, or only one of them has one. Ranks must agree all the same, or
answers are wrong without an error; and they must not start at all with options that would part them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.engines.test_sglang_ranks import TWO_RANKS, load
from tests.engines.tiny_sglang import Server, ask_all, end, missing, serve, start
from tests.ports import free_port

pytestmark = pytest.mark.skipif(missing() is not None, reason=str(missing()))

OPTIONS = {"identity": "header", "predictor": "none", "secret": "env:A_SECRET"}
FORGED = {"custom_params": {"mope_client": "client-0", "mope_tokens": 1.0}}


def of_node(number: int, address: str, *, shared: bool = False) -> tuple[tuple[str, ...], dict[str, str]]:
    """Arguments and variables of a node; the second has no secret unless it is shared."""
    arguments = (*TWO_RANKS, "--nnodes", "2", "--node-rank", str(number), "--dist-init-addr", address)
    variables = {
        "SGLANG_CPU_OMP_THREADS_BIND": "0|1",
        "GLOO_SOCKET_IFNAME": "lo",
        "PYTHONHASHSEED": str(number + 1),
        "A_SECRET": "a secret of the first node" if shared or number == 0 else "",
    }
    return arguments, variables


@contextmanager
def second_node(folder: Path, address: str, options: dict[str, Any], *, shared: bool = False) -> Iterator[Server]:
    node = start(folder, "equinox", options, *of_node(1, address, shared=shared))
    try:
        yield node
    finally:
        end(node.process)


@pytest.mark.parametrize("shared", [False, True])
def test_ranks_of_two_nodes_agree(shared: bool, tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    others = {**OPTIONS, "metrics_host": "127.0.0.2"}  # which decides nothing
    with (
        second_node(tmp_path, address, others, shared=shared) as other,
        serve(tmp_path, "equinox", OPTIONS, *of_node(0, address, shared=shared)) as server,
    ):
        asks = load()
        together = ask_all(server, asks)
        alone = [ask_all(server, [one])[0] for one in asks]  # where order changes nothing
        body = {"input_ids": [5, 6], "sampling_params": {"max_new_tokens": 2, "ignore_eos": True, **FORGED}}
        assert server.send("/generate", body, {"x-client-id": "forger"})[0] == 200
        state, printed = server.state(), server.printed() + other.printed()
    assert [one.output for one in together] == [one.output for one in alone]
    ends = [one.end_s for one in together]
    assert ends != sorted(ends)  # the order was not that of arrival
    assert state["on"], state["failure"]
    assert set(state["tallies"]) == {"client-0", "client-1", "client-2", "forger"}
    assert printed.count("mope is on: policy equinox") == 1
    assert ("mope checks seals: all 2 nodes" in printed) == shared
    assert ("mope checks no seals" in printed) == (not shared)
    assert state["unsealed"] == 0  # the front end removed what was forged, and sealed what it wrote
    assert "mope has failed" not in printed


def test_nodes_with_other_options_do_not_start(tmp_path: Path) -> None:
    address = f"127.0.0.1:{free_port()}"
    with second_node(tmp_path, address, {**OPTIONS, "alpha": 0.5}) as other:
        with (
            pytest.raises(RuntimeError, match=r"rank 1 has alpha '0\.5' and rank 0 '0\.7'"),
            serve(tmp_path, "equinox", OPTIONS, *of_node(0, address)),
        ):
            pass
        for _ in range(300):
            if "rank 1 has alpha" in other.printed():
                break
            time.sleep(0.1)
        assert "rank 1 has alpha '0.5' and rank 0 '0.7'" in other.printed()
