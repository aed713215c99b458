"""The SGLang hook's door: what is registered, how options come in, what its doctor says. Without SGLang."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from contextlib import AbstractContextManager
from enum import Enum
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from web import answering

from mope.cli import main
from mope.errors import ConfigError
from mope.serving_hooks.options import HookOptions
from mope.serving_hooks.sglang import commands, compat, hooks, plugin, settings


class HookType(Enum):
    """As SGLang's."""

    BEFORE = "before"
    AFTER = "after"
    AROUND = "around"


# targets as a release has them: the parameters of each after `self`
FITTING = {
    "add_cli_args": "parser",
    "_validate_and_adjust_policy": "policy, tree_cache",
    "init_schedule_policy": "",
    "calc_priority": "waiting_queue, running_batch=None, processed_tokens=0",
    "_add_request_to_queue": "req, is_retracted=False",
    "add_one_req": "req, has_chunked_req, truncation_align_size",
    "process_batch_result": "batch, result",
    "retract_decode": "server_args",
    "can_schedule_lora_req": "req, running_loras",
    "_get_running_request_total_token_offset": "req",
    "_get_decode_retraction_order": "reqs, server_args",
    "generate_request": "obj, request=None",
    "__init__": "server_args, port_args",
    "get_internal_state": "recv_req",
}


@pytest.fixture
def sglang(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts modules with SGLang's names and our idea of its functions in place; call it with what differs."""

    def install(**changes: str | None) -> list[tuple[str, Any, HookType]]:
        parameters = {**FITTING, **changes}
        registered: list[tuple[str, Any, HookType]] = []
        registry = SimpleNamespace(register=lambda *found: registered.append(found), _patched=set())
        found: dict[str, ModuleType] = {}

        def module(name: str) -> ModuleType:
            if name not in found:
                found[name] = ModuleType(name)
                found[name].__path__ = []  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, name, found[name])
                parent, _, last = name.rpartition(".")
                if parent:
                    setattr(module(parent), last, found[name])
            return found[name]

        module("sglang.srt.plugins.hook_registry").__dict__.update(HookRegistry=registry, HookType=HookType)
        for hook in hooks.HOOKS:
            where, kind, name = hook.target.rsplit(".", 2)
            owner = module(where).__dict__.setdefault(kind, type(kind, (), {}))
            if parameters[name] is not None:
                setattr(owner, name, eval(f"lambda self, {parameters[name]}: None"))
        monkeypatch.setattr(plugin, "_process_title", lambda: "python")
        return registered

    return install


def test_all_hooks_are_registered_where_all_fit(sglang: Any, caplog: pytest.LogCaptureFixture) -> None:
    registered = sglang()
    plugin.register()
    assert [target for target, _, _ in registered] == [hook.target for hook in hooks.HOOKS]
    assert caplog.records == []


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"calc_priority": "queue"}, "calc_priority takes (queue), expected (waiting_queue, ...)"),
        ({"add_one_req": None}, "add_one_req cannot be found (AttributeError"),
    ],
)
def test_nothing_is_registered_where_a_hook_that_is_needed_does_not_fit(
    sglang: Any, caplog: pytest.LogCaptureFixture, changed: dict[str, str | None], told: str
) -> None:
    registered = sglang(**changed)
    plugin.register()
    assert registered == []
    assert len(caplog.records) == 1
    assert told in caplog.text


def test_an_sglang_that_cannot_be_imported_is_told_of_once(
    sglang: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    sglang()
    assert compat.probe() == []
    monkeypatch.setattr(hooks.pkgutil, "resolve_name", lambda target: __import__("no_kernels"))
    said = f"{len(hooks.HOOKS)} functions cannot be found (ModuleNotFoundError: No module named 'no_kernels')"
    assert compat.probe() == [said]
    plugin.register()
    assert caplog.text.count("no_kernels") == 1
    monkeypatch.undo()
    sglang(add_one_req=None, retract_decode=None)
    assert len(compat.probe()) == 2
    monkeypatch.setattr(compat, "entry_points", lambda group: [])
    assert "install mope-llm anew" in compat.probe()[0]


def test_it_goes_without_a_hook_that_is_not_needed(sglang: Any, caplog: pytest.LogCaptureFixture) -> None:
    registered = sglang(_get_decode_retraction_order=None)
    plugin.register()
    assert len(registered) == len(hooks.HOOKS) - 1
    assert caplog.records == []  # nobody has asked for it yet


def test_a_target_is_found_by_its_former_name(sglang: Any, caplog: pytest.LogCaptureFixture) -> None:
    """As in 0.5.14 and 0.5.17."""
    registered = sglang(can_schedule_lora_req=None)
    former = "sglang.srt.managers.scheduler.Scheduler._can_schedule_lora_req"
    owner = sys.modules["sglang.srt.managers.scheduler"].Scheduler
    owner._can_schedule_lora_req = lambda self, req, running_loras: True
    assert compat.probe() == []
    plugin.register()
    assert former in [target for target, _, _ in registered]
    assert len(registered) == len(hooks.HOOKS)
    sys.modules["sglang.srt.plugins.hook_registry"].HookRegistry._patched.update(target for target, _, _ in registered)
    assert hooks.applied() == list(hooks.HOOKS)
    owner._can_schedule_lora_req = lambda self, other: True
    assert len(compat.probe()) == 1


def test_processes_without_a_target_are_left_alone(sglang: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    registered = sglang()
    monkeypatch.setattr(plugin, "_process_title", lambda: "sglang::detokenizer")
    plugin.register()
    assert registered == []


# -- options


@pytest.fixture
def parser(monkeypatch: pytest.MonkeyPatch) -> argparse.ArgumentParser:
    monkeypatch.delenv(settings.VARIABLE, raising=False)
    found = argparse.ArgumentParser()
    found.add_argument("--schedule-policy", choices=["fcfs", "lpm"], default="fcfs")
    settings.add_arguments(None, found)
    settings.add_arguments(None, found)  # a second parser, or the same one again
    return found


def test_options_of_the_command_line_reach_other_processes(parser: argparse.ArgumentParser) -> None:
    chosen = parser.parse_args(["--schedule-policy", "equinox", "--mope-config", '{"identity": "header"}'])
    assert chosen == argparse.Namespace(schedule_policy="equinox")  # which SGLang makes its own arguments of
    assert settings.read_options("equinox").identity == "header"
    assert settings.read_options("vtc").policy == "vtc"


def test_options_may_stand_in_a_file(parser: argparse.ArgumentParser, tmp_path: Any) -> None:
    file = tmp_path / "mope.json"
    file.write_text('{"predictor": "none"}', encoding="utf-8")
    parser.parse_args(["--mope-config", str(file)])
    assert settings.read_options("equinox").predictor == "none"


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ('{"identiti": "header"}', "did you mean 'identity'"),
        ("[1]", "neither JSON"),
        ("{", "no JSON"),
        ("nowhere.json", "neither JSON"),
        ("a\0b", "neither JSON"),
        ('{"weights":' + "[" * 100_000, "no JSON"),
        ('{"mope": {"policy": "vtc"}}', "expected the object inside it"),
    ],
)
def test_options_that_cannot_be_used_end_the_command(
    parser: argparse.ArgumentParser, capsys: pytest.CaptureFixture[str], given: str, told: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--mope-config", given])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"[1", "file {file}: no JSON"),
        (b"[1]", "file {file}: a JSON list"),
        (b'{"namespace": "\xe9"}', "file {file}: no JSON in UTF-8"),
        (b'{"mope": {}}', "file {file}: got the key"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(tmp_path: Any, content: bytes, told: str) -> None:
    file = tmp_path / "m.json"
    file.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        settings.parse(str(file), "--mope-config")
    assert told.format(file=str(file)[:80]) in str(caught.value)


def test_a_file_may_begin_with_a_byte_order_mark(tmp_path: Any) -> None:
    file = tmp_path / "mope.json"
    file.write_text('{"policy": "vtc"}', encoding="utf-8-sig")
    assert settings.parse(str(file), "--mope-config").policy == "vtc"


def test_two_policies_are_one_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(settings.VARIABLE, '{"policy": "vtc"}')
    assert settings.read_options("vtc").policy == "vtc"
    with pytest.raises(
        ConfigError, match=r"--mope-config \(or MOPE_OPTIONS\) says policy 'vtc' and --schedule-policy 'equinox'"
    ):
        settings.read_options("equinox")


# -- the doctor


def mistakes(command: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[tuple[str, str]]:
    for name in ("SGLANG_PLUGINS", settings.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    words = command.split()
    try:
        chosen: HookOptions | None = commands.options(commands.flags(words))
    except ConfigError:
        chosen = None
    return [(finding.status, finding.text) for finding in commands.mistakes(words, chosen)]


def test_a_good_command_is_called_good(monkeypatch: pytest.MonkeyPatch) -> None:
    command = "sglang serve --model-path M --schedule-policy=equinox --mope-config "
    found = mistakes(command + '{"identity":"header"}', monkeypatch)
    assert found == [("ok", "policy equinox, clients by header, predictor chat-small")]
    words = commands.START.replace("\\\n", " ").split("'")
    assert json.loads(words[1]) == {"api_keys": "keys.json", "metrics_port": 9477}
    found = mistakes(words[0] + words[1].replace(" ", ""), monkeypatch)
    assert [status for status, _ in found] == ["note", "ok"]
    assert "refuses nobody" in found[0][1]


@pytest.mark.parametrize(
    ("command", "variables", "status", "told"),
    [
        ("--schedule-policy lpm", {}, "failed", "nothing of mope is on"),
        ("--schedule-policy vtc --enable-priority-scheduling", {}, "failed", "leave it out"),
        ("--schedule-policy vtc", {"SGLANG_PLUGINS": "other"}, "failed", "keeps mope from being loaded"),
        ("--schedule-policy vtc --tokenizer-worker-num 4", {}, "warning", "no request has a client"),
        ("--schedule-policy vtc --max-queued-requests 9", {}, "warning", "locks the others out"),
        ("--schedule-policy vtc", {}, "warning", "all callers are one client"),
        ("--schedule-policy vtc --api-key K", {}, "warning", "this one key alone"),
        ('--schedule-policy vtc --api-key K --mope-config {"api_keys":"k"}', {}, "warning", "api_keys is of no use"),
        ("--schedule-policy vtc --dp-size 2", {}, "note", "books of its own"),
        ("--shedule-policy vtc", {}, "warning", "did you mean --schedule-policy?"),
        ("--schedule-policy vtc --api-keys K", {}, "warning", "did you mean --api-key?"),
        ("--schedule-policy vtc --mope-conf {}", {}, "warning", "did you mean --mope-config?"),
    ],
)
def test_mistakes_are_told(
    monkeypatch: pytest.MonkeyPatch, command: str, variables: dict[str, str], status: str, told: str
) -> None:
    assert any(found == status and told in text for found, text in mistakes(command, monkeypatch, **variables))


@pytest.mark.parametrize("policy", ["", "--schedule-policy vtc ", "--schedule-policy lpm "])
def test_a_file_of_flags_is_not_guessed_at(monkeypatch: pytest.MonkeyPatch, policy: str) -> None:
    command = f'sglang serve --config server.yaml {policy}--mope-config {{"identity":"header"}}'
    found = mistakes(command, monkeypatch)
    assert "--config server.yaml: the doctor does not read this file" in found[0][1]
    after = {"": [], "--schedule-policy vtc ": ["ok"], "--schedule-policy lpm ": ["failed"]}[policy]
    assert [status for status, _ in found] == ["warning", *after]


@pytest.mark.parametrize("flag", ["--tp-size", "--ep-size", "--detokenizer-worker-num", "--mem-fraction-static"])
def test_other_flags_of_sglang_are_not_complained_of(monkeypatch: pytest.MonkeyPatch, flag: str) -> None:
    command = 'sglang serve --schedule-policy vtc --mope-config {"identity":"header"} '
    assert [status for status, _ in mistakes(f"{command}{flag} 2", monkeypatch)] == ["ok"]


def serving(states: Any, key: str | None = None) -> AbstractContextManager[str]:
    """A server with SGLang's `/server_info`, which may want a key."""
    return answering({"/server_info": (200, json.dumps({"internal_states": states}))}, key)


ON = {"policy": "vtc", "on": True, "failure": None, "waiting": 2, "running": 3, "front_end": "hooked"}
PREDICTS = {"predictor": "chat-small", "predicts": True, "predictions": {"made": 7, "late": 2, "failed": 0}}


@pytest.mark.parametrize(
    ("states", "status", "told"),
    [
        ([{"mope": ON}], "ok", "policy vtc, 3 running, 2 waiting; front end: hooked"),
        ([{"mope": {**ON, **PREDICTS}}], "ok", "hooked; predictor chat-small, 7 predictions made, 2 not"),
        ([{"mope": {**ON, **PREDICTS, "predictions": {}}}], "ok", "0 predictions made, 0 not"),
        (
            [{"mope": {**ON, **PREDICTS, "predictions": {"made": 1e999, "late": "x"}}}],
            "ok",
            "0 predictions made, 0 not",
        ),
        ([{"mope": {**ON, **PREDICTS, "predicts": False}}], "warning", "no predictor runs"),
        ([{"mope": {**ON, **PREDICTS, "predicts": False, "predictor": "none"}}], "ok", "predictor none, 7 predictions"),
        (
            [{"mope": {**ON, **PREDICTS, "predictions": {"made": 0, "late": 5}}}],
            "warning",
            "all came after the deadline",
        ),
        ([{"mope": {**ON, **PREDICTS, "predictions": {"late": 1, "failed": 4}}}], "warning", "1 late, 4 failed"),
        ([{"mope": {**ON, "predictor": "chat-small"}}], "ok", "does not say whether its predictor runs"),
        ([{"mope": {**ON, "front_end": "SGLang loads no plugins in it"}}], "warning", "loads no plugins in it"),
        ([{"mope": {**ON, "on": False, "failure": "KeyError"}}], "failed", "has failed and is off: KeyError"),
        ([{}], "failed", "no policy of mope's is on"),
        ({"mope": ON}, "failed", "no policy of mope's is on"),
        (7, "failed", "does not answer as SGLang's does"),
    ],
)
def test_a_server_that_runs_is_asked(states: Any, status: str, told: str) -> None:
    with serving(states) as url:
        (found,) = commands.running(url)
    assert found.status == status
    assert told in found.text


def test_each_replica_is_told_of() -> None:
    with serving([{"mope": ON}, {}]) as url:
        first, second = commands.running(url)
    assert (first.status, second.status) == ("ok", "failed")
    assert "replica 1" in second.text


def test_a_server_that_does_not_answer_is_told_of() -> None:
    with serving([]) as url:
        pass
    (found,) = commands.running(url)
    assert found.status == "failed"
    assert "does not answer" in found.text


def test_the_doctor_asks_a_server_with_its_key(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mope.packaged.names", lambda: [])
    monkeypatch.setattr(compat, "installed", lambda: None)  # where a server is asked, it may run elsewhere
    with serving([{"mope": ON}], key="K") as url:
        ask = ["doctor", "sglang", "--url", url]
        assert main([*ask, "--api-key", "K"]) == 0
        assert "policy vtc, 3 running" in capsys.readouterr().out
        assert main(ask) == 1
        assert "wants a key (HTTP 401): give it with --api-key" in capsys.readouterr().out
        assert main([*ask, "--api-key", "L"]) == 1
        assert "wants another key" in capsys.readouterr().out
        command = ["--schedule-policy", "vtc", "--api-key", "K", "--mope-config", '{"predictor": "none"}']
        assert main([*ask, "--", *command]) == 0
        assert "policy vtc, 3 running" in capsys.readouterr().out
        assert main([*ask, "--api-key", "K", "--metrics-port", url.rpartition(":")[2]]) == 1
        assert "/metrics does not answer" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("release", "standing"),
    [
        (None, "not installed"),
        ("0.5.10", "older than 0.5.11, which is the oldest that can work"),
        (compat.TESTED[-1], "tested"),
        (f"{compat.TESTED[0]}.post1", "tested"),
        ("0.5.12", "before the tested ones"),
        ("0.5.18", "between tested ones"),
        ("0.6.0", "newer than the tested ones"),
    ],
)
def test_releases_stand_as_they_were_tested(release: str | None, standing: str) -> None:
    assert compat.standing(release) == standing


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"tokenizer_worker_num": 1}, None),
        ({"tokenizer_worker_num": 2}, "--tokenizer-worker-num 2"),
        ({"use_ray": True}, "--use-ray"),
        ({"smg_grpc_mode": True}, "--smg-grpc-mode"),
    ],
)
def test_front_ends_without_plugins_are_known(arguments: dict[str, Any], told: str | None) -> None:
    found = compat.bypassed_front(SimpleNamespace(**arguments))
    assert found is None if told is None else told in str(found)


README = (Path(hooks.__file__).parent / "README.md").read_text(encoding="utf-8")
SHELL = [
    line
    for block in re.findall(r"^```bash\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]


@pytest.mark.parametrize("command", [line for line in SHELL if "sglang.launch_server" in line])
def test_each_command_of_the_readme_is_right(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SGLANG_PLUGINS", settings.VARIABLE):
        monkeypatch.delenv(name, raising=False)
    words = shlex.split(command)
    found = commands.mistakes(words, commands.options(commands.flags(words)))
    assert {finding.status for finding in found} <= {"ok", "note"}, found


def test_options_that_the_readme_names_exist() -> None:
    named = re.findall(r'"(\w+)": ("[\w-]+"|true|\d+)', README)
    assert {"predicted_admission", "victims", "identity", "metrics_port"} <= {name for name, _ in named}
    for name, value in named:
        HookOptions.model_validate({name: json.loads(value)})


def test_the_readme_says_what_is_so() -> None:
    readme = README
    assert sum("sglang.launch_server" in line for line in SHELL) == 2
    listed = re.search(r"<!-- releases -->\n(.*?)\n<!-- /releases -->", readme, re.DOTALL)
    assert listed is not None
    assert listed.group(1) == ", ".join(compat.TESTED)
    assert commands.START in readme
    assert f"{len(hooks.HOOKS)} of {len(hooks.HOOKS)} hooks" in readme
    for name in compat.POLICIES:
        assert f"`{name}`" in readme
