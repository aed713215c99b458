"""The password of a store: where it may stand, and that nothing shows it."""

from __future__ import annotations

import json
import logging
import traceback
from pathlib import Path
from typing import Any

import pytest

from mope.errors import ConfigError, StoreError, UserError
from mope.fairness.redis_store import RedisServer
from mope.fairness.stores import StoreConfig, address, has_password, shown
from mope.serving_hooks import checks
from mope.serving_hooks.options import PASSWORD_SHOWN, HookOptions
from mope.serving_hooks.steward import Steward
from mope.serving_hooks.vllm import commands

SECRET = "s3cr3t-passw0rd"
ADDRESS = f"redis://user:{SECRET}@127.0.0.1:1/0"


@pytest.fixture
def connected(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses that a client was made for."""
    redis, addresses = pytest.importorskip("redis"), []
    monkeypatch.setattr(redis.Redis, "from_url", lambda url, **options: addresses.append(url))
    return addresses


def test_an_address_comes_from_a_variable_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connected: list[str]
) -> None:
    monkeypatch.setenv("MOPE_STORE", f" {ADDRESS}\n")
    file = tmp_path / "store"
    file.write_text(f"{ADDRESS}\n")
    for url in ("env:MOPE_STORE", f"file:{file}", ADDRESS):
        assert address(StoreConfig(url=url).url) == ADDRESS
    RedisServer(StoreConfig(url="env:MOPE_STORE"))
    assert connected == [ADDRESS]


def test_a_file_is_read_at_each_connection(tmp_path: Path, connected: list[str]) -> None:
    """So a password can be changed while servers run."""
    file = tmp_path / "store"
    for password in ("first", "second"):
        file.write_text(f"redis://:{password}@127.0.0.1:1/0")
        RedisServer(StoreConfig(url=f"file:{file}"))
        assert connected[-1] == f"redis://:{password}@127.0.0.1:1/0"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "can't be read (No such file"),
        ("", "is empty"),
        (SECRET, "holds no address"),
        (f"http://{SECRET}", "holds no address"),
        (b"\xff\xfe", "it is no text"),
    ],
)
def test_a_file_without_an_address_is_a_line_without_what_it_holds(tmp_path: Path, content: Any, told: str) -> None:
    file = tmp_path / "store"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(StoreError) as caught:
        Steward(HookOptions(store=f"file:{file}"))
    text = "".join(traceback.format_exception(caught.value))
    assert told in str(caught.value)
    assert "redis://USER:PASSWORD@HOST:PORT/DB" in str(caught.value)
    assert SECRET not in text


@pytest.mark.parametrize(
    ("store", "told"),
    [
        ("env:MOPE_NOT_THERE", "no such variable"),
        (f"env:{ADDRESS}", "the name of an environment variable"),
        ("env:", "the name of an environment variable"),
        ("file:", "the path of a file"),
        (f"reds://user:{SECRET}@host/0", "begins with 'reds'"),
        (f"{SECRET}@host", "no scheme that is known"),
        (f"{SECRET}:{SECRET}@host", "no scheme that is known"),
        (SECRET, "no scheme that is known"),
        (f"redis://user:{SECRET}/#x@host:12:13/0", None),
        ([ADDRESS], "store"),
        ({"url": ADDRESS}, "store"),
    ],
)
def test_a_mistake_shows_no_password(store: Any, told: str | None, caplog: pytest.LogCaptureFixture) -> None:
    """Not even in the traceback that an engine prints."""
    if told is not None:
        with pytest.raises(UserError) as caught:
            Steward(HookOptions.read({"store": store}, "--additional-config, mope"))
        assert told in str(caught.value)
        text = "".join(traceback.format_exception(caught.value))
    else:
        steward = Steward(HookOptions(store=store))
        steward.store.close(0.2)
        text = steward.store.stats().last_error
    assert SECRET not in text + caplog.text


def test_options_do_not_show_their_store() -> None:
    options = HookOptions(store=ADDRESS)
    assert SECRET not in repr(options) + str(options)
    with pytest.raises(ConfigError) as caught:
        HookOptions.read({"store": ADDRESS, "policy": "fair"}, "here")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize(
    ("url", "has"),
    [
        (ADDRESS, True),
        ("rediss://:x@host", True),
        ("redis://host/0?password=x", True),
        ("unix:///socket?db=0&password=x", True),
        ("redis://host:6379/0", False),
        ("redis://user@host:6379/0", False),
        ("redis://[::1]:6379/0", False),
        ("unix:///socket", False),
        ("env:MOPE_STORE", False),
        ("file:/a:b@c", False),
        ("memory", False),
    ],
)
def test_which_addresses_hold_a_password(url: str, has: bool) -> None:
    assert has_password(url) == has


def test_a_password_in_the_options_works_and_is_warned_of(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOPE_STORE", ADDRESS)
    for store, warns in ((ADDRESS, True), ("env:MOPE_STORE", False)):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mope"):
            steward = Steward(HookOptions(store=store))
            steward.store.close(0.2)
        assert (PASSWORD_SHOWN in caplog.text) == warns
        assert SECRET not in caplog.text
        assert SECRET not in steward.store.stats().last_error
        found = checks.options(HookOptions(store=store))
        assert (PASSWORD_SHOWN in [finding.text for finding in found]) == warns
        assert SECRET not in str(found)


def test_the_doctor_says_what_a_store_lacks() -> None:
    (finding,) = checks.options(HookOptions(store="env:MOPE_NOT_THERE"))
    assert (finding.status, "no such variable" in finding.text) == ("warning", True)
    (finding,) = checks.options(HookOptions(store="http://host"))
    assert (finding.status, "redis://HOST:PORT/DB" in finding.text) == ("failed", True)


def test_a_command_that_is_wrong_shows_no_password() -> None:
    words = ["vllm", "serve", "m", "--additional-config", json.dumps({"mope": {"store": ADDRESS, "polcy": "vtc"}})]
    with pytest.raises(ConfigError) as caught:
        commands.options(commands.flags(words))
    assert SECRET not in str(caught.value)


def test_what_is_shown_of_where_an_address_stands() -> None:
    assert shown("env:MOPE_STORE") == "env:MOPE_STORE"
    assert shown(ADDRESS) == "redis://127.0.0.1:1/0"
