"""What vLLM says of itself: options, keys, names and processes, wherever a release keeps them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from mope.serving_hooks import vllm as hooks
from mope.serving_hooks.vllm.settings import hook_options, llm_names, num_api_servers, server_keys


def test_options_are_found_where_they_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    given_ = {"mope": {"identity": "none"}, "other": 1}
    config = SimpleNamespace(additional_config=given_)
    assert hook_options(config).identity == "none"
    assert hook_options(None, config).identity == "none"
    assert hook_options(None, SimpleNamespace(additional_config=json.dumps(given_))).identity == "none"
    monkeypatch.setenv("MOPE_OPTIONS", '{"identity": "user"}')
    assert hook_options(SimpleNamespace(additional_config={}), None).identity == "user"
    assert hook_options(config).identity == "none"
    monkeypatch.setenv("MOPE_OPTIONS", "{")
    with pytest.raises(ValueError, match="MOPE_OPTIONS is no JSON"):
        hook_options(None)
    monkeypatch.delenv("MOPE_OPTIONS")
    assert hook_options(None).identity == "api-key"


def test_keys_are_found_where_vllm_finds_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    for given_, keys in (
        (None, ()),
        ([], ()),
        (["a", None, ""], ("a",)),
        ("sk-1", ("sk-1",)),
        (("a", "b"), ("a", "b")),
    ):
        assert server_keys(SimpleNamespace(api_key=given_)) == keys
    assert server_keys(None) == ()
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert server_keys(SimpleNamespace(api_key=[])) == ("of the environment",)
    assert server_keys(SimpleNamespace(api_key=["a"])) == ("a",)


def test_names_and_processes() -> None:
    arguments = SimpleNamespace(model="org/llama", served_model_name=["a", "b"], api_server_count=None)
    assert llm_names(None, arguments) == ("org/llama", "a")
    assert num_api_servers(None, arguments) == 1
    assert num_api_servers(SimpleNamespace(parallel_config=SimpleNamespace(_api_process_count=4)), arguments) == 4


def test_importing_the_package_imports_no_engine() -> None:
    code = (
        "import sys, mope.serving_hooks.vllm as hooks; names = dir(hooks); "
        "heavy = {'vllm', 'torch', 'fastapi', 'starlette', 'numpy'} & set(sys.modules); "
        "assert 'Middleware' in names, names; assert not heavy, heavy; hooks.Middleware; "
        "assert not {'vllm', 'torch', 'fastapi', 'starlette'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with pytest.raises(AttributeError, match="no attribute 'Other'"):
        hooks.Other  # noqa: B018
