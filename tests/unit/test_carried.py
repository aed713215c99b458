"""What reaches the scheduler is what this server's front end wrote, whatever callers put there."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.serving_hooks.carried import SEAL, Carried, seals

TEXTS = st.none() | st.text()
NUMBERS = st.none() | st.floats(allow_nan=False) | st.integers(-(2**60), 2**60)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
FULL = Carried("acme/alice", 120.5, 300.0, "AAAAAA==", "llama|llama|small||1||0")


@given(st.builds(Carried, TEXTS, NUMBERS, NUMBERS, TEXTS, TEXTS))
def test_what_is_written_is_read(said: Carried) -> None:
    told = {**said.write(), "theirs": 1}
    assert all(isinstance(value, str | int | float) for value in told.values())
    assert Carried.read(told) == said
    if "\ud800" not in str(said):
        assert Carried.read(json.loads(json.dumps(told))) == said


@given(key=st.sampled_from([*FULL.write()]), value=JSON)
def test_no_value_can_be_changed(key: str, value: Any) -> None:
    told = FULL.write()
    changed = {**told, key: value}
    if not (type(value) is type(told[key]) and value == told[key]):
        assert Carried.read(changed) == Carried()
    del changed[key]
    assert Carried.read(changed) == Carried()


@given(first=st.text(max_size=6), second=st.text(max_size=6), cut=st.integers(0, 6))
def test_texts_cannot_run_into_each_other(first: str, second: str, cut: int) -> None:
    told = Carried(first, raw=second).write()
    whole = first + second
    moved = {**told, "mope_client": whole[:cut], "mope_raw": whole[cut:]}
    assert Carried.read(moved) == (Carried(first, raw=second) if moved == told else Carried())


@given(JSON)
def test_whatever_a_caller_writes_is_dropped(value: Any) -> None:
    assert Carried.read(value) == Carried()
    assert Carried.read({"mope_client": value, "mope_tokens": value, SEAL: value}) == Carried()


def test_another_secret_makes_no_seal() -> None:
    told = FULL.write()
    seals.use(b"another")
    assert Carried.read(told) == Carried()
    assert Carried.read(FULL.write()) == FULL


def test_it_is_counted_and_told_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seals, "num_refused", 0)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            Carried.read({"mope_client": "victim"})
        Carried.read({"theirs": 1})
        Carried.read(None)
        Carried.read(FULL.write())
    assert seals.num_refused == 3
    assert len(caplog.records) == 1
    assert "did not seal" in caplog.text


def test_where_no_seal_can_be_asked_for_types_still_are() -> None:
    assert Carried.read({"mope_client": "a", "mope_tokens": 5}, sealed=False) == Carried("a", 5.0)
    for odd in ({"mope_client": 3}, {"mope_tokens": "x"}, {"mope_tokens": 10**400}, {"mope_raw": []}):
        assert Carried.read(odd, sealed=False) == Carried()
