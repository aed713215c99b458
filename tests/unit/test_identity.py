"""Who a client is: what the operator trusts says so, and nothing that a caller may choose."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mope.errors import ConfigError
from mope.fairness.clients import client_path
from mope.serving_hooks import identity as module
from mope.serving_hooks.identity import ApiKeys, Identity
from mope.serving_hooks.options import HookOptions

KEY, OTHER = "sk-alice-0123456789", "sk-bob-9876543210"
LOGGER = logging.getLogger("test.identity")


def sha256(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


def bearer(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"host", b"here"), (b"authorization", f"Bearer {key}".encode())]


def made(*server_keys: str, secret: bytes = b"a secret", **options: Any) -> Identity:
    return Identity(HookOptions(**options), secret=secret, logger=LOGGER, server_keys=server_keys)


def named(key: str, secret: bytes = b"a secret") -> str:
    return f"key-{hashlib.blake2b(key.encode(), key=secret, digest_size=8, person=b'mope client').hexdigest()}"


def key_file(folder: Path, content: Any) -> Path:
    path = folder / "keys.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_keys_of_the_file_name_clients(tmp_path: Path) -> None:
    identity = made(api_keys=key_file(tmp_path, {KEY: "acme/alice", f"sha256:{sha256(OTHER).upper()}": "bob"}))
    assert identity.client(bearer(KEY), {}) == "acme/alice"
    assert identity.client(bearer(OTHER), {}) == "bob"
    assert KEY not in str(identity.__dict__) + str(vars(identity.keys))  # hashes alone are kept


def test_a_file_of_keys_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    path = key_file(tmp_path, "\ufeff" + json.dumps({KEY: "alice"}))
    assert made(api_keys=path).client(bearer(KEY), {}) == "alice"


@pytest.mark.parametrize(("keys", "client"), [((OTHER, "sk-3"), named(OTHER)), (("sk-3",), None), ((), None)])
def test_a_key_outside_the_file_counts_if_it_is_the_servers(
    tmp_path: Path, keys: tuple[str, ...], client: str | None
) -> None:
    for path in (None, key_file(tmp_path, {KEY: "alice"})):
        assert made(*keys, api_keys=path).client(bearer(OTHER), {}) == client


@given(keys=st.lists(st.text(st.characters(codec="latin-1"), min_size=1), max_size=5))
def test_made_up_keys_mint_no_clients(keys: list[str]) -> None:
    identity = made(KEY)
    found = {identity.client(bearer_of(key), {}) for key in keys if key != KEY}
    assert found <= {None}
    assert not any(identity.admits(bearer_of(key)) for key in keys if key != KEY)


def bearer_of(key: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", b"Bearer " + key.encode("latin-1"))]


def test_what_is_to_be_worked_for(tmp_path: Path) -> None:
    path = key_file(tmp_path, {KEY: "alice"})
    assert made().admits([])  # nobody asks for keys
    identity = made("sk-server", api_keys=path)
    for headers, admitted in (
        (bearer("sk-server"), True),
        (bearer(KEY), True),
        ([(b"x-api-key", KEY.encode())], True),
        ([(b"x-api-key", b"sk-server")], False),  # which vLLM does not look at
        (bearer("sk-other"), False),
        ([], False),
    ):
        assert identity.admits(headers) == admitted
    assert not made("sk-server", identity="header").admits([(b"x-client-id", b"alice")])


def test_names_of_keys_tell_nothing_without_the_secret() -> None:
    names = {made(KEY, secret=secret).client(bearer(KEY), {}) for secret in (b"one", b"two", b"")}
    assert len(names) == 3
    assert all(name and len(name) == len("key-") + 16 and sha256(KEY)[:6] not in name for name in names)
    assert made(KEY).client(bearer(KEY), {}) == made(KEY).client(bearer(KEY), {})


@pytest.mark.parametrize(
    "header", ["x-api-key", "Cookie", "proxy-authorization", "Authorization", "api-key", "x-auth-token", "x-auth-key"]
)
def test_a_header_that_holds_a_secret_names_nobody_by_it(header: str) -> None:
    identity = made(identity="header", client_header=header)
    value = f"Bearer {KEY}" if header == "Authorization" else KEY
    client = identity.client([(header.lower().encode(), value.encode())], {})
    assert client == named(KEY)
    assert identity.client([], {}) is None


@pytest.mark.parametrize("header", ["x-client-id", "x-smg-routing-key", "x-tenant", "x-author", "x-auth-request-user"])
def test_a_header_that_holds_a_name_names_by_it(header: str) -> None:
    assert made(identity="header", client_header=header).client([(header.encode(), b"acme/alice")], {}) == "acme/alice"


def test_a_gateway_may_check_keys() -> None:
    identity = made(identity="header", client_header="Authorization")
    assert identity.client(bearer(KEY), {}) == named(KEY)


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"authorization", b"")],
        [(b"authorization", b"Bearer ")],
        [(b"authorization", f"Basic {KEY}".encode())],
        [(b"authorization", KEY.encode())],
        [(b"x-api-key", KEY.encode())],
        [(b"authorization", b"Basic x"), (b"authorization", f"Bearer {KEY}".encode())],  # the first one counts
    ],
)
def test_without_a_key_nobody(headers: list[tuple[bytes, bytes]]) -> None:
    assert made(KEY).client([*headers, (b"x-client-id", b"alice")], {"user": "alice"}) is None


def test_a_key_as_anthropics_clients_send_it_counts_if_the_file_knows_it(tmp_path: Path) -> None:
    identity = made(OTHER, api_keys=key_file(tmp_path, {KEY: "alice"}))
    assert identity.client([(b"x-api-key", KEY.encode())], {}) == "alice"
    assert identity.client([(b"x-api-key", OTHER.encode())], {}) is None
    assert identity.client([*bearer(OTHER), (b"x-api-key", OTHER.encode())], {}) == named(OTHER)


@given(user=st.text(), header=st.binary(), source=st.sampled_from(["api-key", "none"]))
def test_what_a_caller_may_choose_says_nothing(user: str, header: bytes, source: Any) -> None:
    identity = made(KEY, identity=source)
    plain = identity.client(bearer(KEY), {})
    chosen = [*bearer(KEY), (b"x-client-id", header), (b"x-user", header), (b"x-request-id", header)]
    assert identity.client(chosen, {"user": user, "vllm_xargs": {"mope_client": user}}) == plain


def test_the_header_of_a_gateway() -> None:
    identity = made(identity="header", client_header="X-Tenant")
    assert identity.client([(b"x-tenant", " acme/älice ".encode())], {"user": "eve"}) == "acme/älice"
    assert identity.client([(b"x-tenant", b"one"), (b"x-tenant", b"one")], {}) == "one"
    assert identity.client([(b"x-tenant", b"one"), (b"X-Tenant", b"two")], {}) is None  # one of them is forged
    assert identity.client([(b"x-client-id", b"eve"), *bearer(KEY)], {"user": "eve"}) is None


def test_the_user_of_a_gateway() -> None:
    identity = made(identity="user")
    assert identity.reads_body
    assert identity.client([(b"x-client-id", b"eve")], {"user": "acme/alice"}) == "acme/alice"
    for user in (None, 3, "", " ", "//", {"user": "x"}):
        assert identity.client([], {"user": user}) is None


@given(name=st.text())
def test_any_name_becomes_a_short_path_that_can_be_sent(name: str) -> None:
    client = made(identity="user").client([], {"user": name})
    if client is not None:
        assert client.encode()
        assert len(client) <= 4 * 256 + 3
        assert "/".join(client_path(client)) == client


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "no JSON, .+ in line 1"),
        ("[1]", "expected one object"),
        ('"x"', "expected one object"),
        ("3", "expected one object"),
        ({KEY: 3}, "entry 1: its client is int"),
        ({KEY: "a", OTHER: " / "}, "entry 2: its client is str"),
        ({" ": "a"}, "entry 1: the key is empty"),
        ({"sha256:12": "a"}, "entry 1: expected 64 .+ got 2 signs"),
        ({KEY: "a", f"sha256:{sha256(KEY)}": "b"}, "entry 2: this key stands there twice"),
        (f'{{"{KEY}": "a", "{KEY}": "b"}}', "entry 2: this key stands there twice"),
        ("[" * 100_000, "no JSON"),
    ],
)
def test_a_file_that_cannot_be_used_is_told_of_without_its_keys(tmp_path: Path, content: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as raised:
        made(api_keys=key_file(tmp_path, content))
    assert KEY not in str(raised.value)
    assert OTHER not in str(raised.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"api_keys .*keys\.json: No such file"):
        made(api_keys=tmp_path / "keys.json")
    (tmp_path / "keys.json").write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(ConfigError, match="no JSON"):
        made(api_keys=tmp_path / "keys.json")


def test_a_changed_file_is_read_anew_and_a_broken_one_is_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = key_file(tmp_path, {KEY: "alice"})
    keys = ApiKeys(path)

    def change(content: str, time_s: int) -> None:
        path.write_text(content, encoding="utf-8")
        os.utime(path, (time_s, time_s))
        keys.refresh(LOGGER)
        keys.refresh(LOGGER)

    with caplog.at_level(logging.INFO, logger="test.identity"):
        keys.refresh(LOGGER)
        assert caplog.records == []
        change(json.dumps({KEY: "alice", OTHER: "bob"}), 1)
        assert (keys.client(sha256(OTHER)), len(keys)) == ("bob", 2)
        change(f'{{"{KEY}": ', 2)
        assert keys.client(sha256(OTHER)) == "bob"
        path.unlink()
        keys.refresh(LOGGER)
        keys.refresh(LOGGER)
        assert keys.client(sha256(OTHER)) == "bob"
        change(json.dumps({KEY: "carol"}), 3)
        assert (keys.client(sha256(KEY)), keys.client(sha256(OTHER))) == ("carol", None)
    levels = [record.levelname for record in caplog.records]
    assert levels == ["INFO", "ERROR", "ERROR", "INFO"]
    assert KEY not in caplog.text


def test_the_file_is_looked_at_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    identity = made(api_keys=key_file(tmp_path, {}))
    assert [identity.due(), identity.due()] == [True, False]
    now += 0.9
    assert not identity.due()
    now += 0.2
    assert [identity.due(), identity.due()] == [True, False]
    assert not made(KEY).due()  # without a file there is nothing to look at


def test_it_says_what_it_does(tmp_path: Path) -> None:
    path = key_file(tmp_path, {KEY: "alice"})
    assert str(made(KEY, OTHER)) == "API key, no file of keys, 2 of the server, all others anonymous"
    assert str(made(api_keys=path)).endswith("0 of the server, all others anonymous")
    assert str(made(identity="header", client_header="cookie")) == "header cookie, named by a hash"
    assert f"1 keys of {path}" in str(made(api_keys=path))
    assert str(made(identity="header")) == "header x-client-id"
    assert (str(made(identity="user")), str(made(identity="none"))) == ("user", "none")
