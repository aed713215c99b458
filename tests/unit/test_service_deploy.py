"""What the service's how-to, Dockerfile, compose file and Deployment name is there: commands, flags, files, ports."""

from __future__ import annotations

import asyncio
import json
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from mope.budgets import Budget, read_budgets
from mope.serving_hooks import report
from mope.serving_hooks.service import cli
from mope.serving_hooks.service.config import ServeConfig

ROOT = Path(__file__).resolve().parents[2]
SERVICE = ROOT / "serving_hooks" / "service"
DEPLOY = SERVICE / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
HOW_TO = (SERVICE / "README.md").read_text(encoding="utf-8")
PORT = ServeConfig().port
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yml").read_text(encoding="utf-8"))
KUBERNETES: list[dict[str, Any]] = list(yaml.safe_load_all((DEPLOY / "kubernetes.yml").read_text(encoding="utf-8")))
CONTAINER: dict[str, Any] = KUBERNETES[0]["spec"]["template"]["spec"]["containers"][0]


def instruction(name: str) -> str:
    (found,) = re.findall(rf"^{name} (.*)$", DOCKERFILE, flags=re.MULTILINE)
    return str(found)


COMMANDS = [
    json.loads(instruction("CMD")),
    COMPOSE["services"]["mope"]["command"],
    CONTAINER["args"],
    *(
        shlex.split(line)[shlex.split(line).index("serve") + 1 :]
        for block in re.findall(r"^```bash\n(.*?)^```$", HOW_TO, flags=re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
        if re.match(r"(\w+=\S+ )?mope serve ", line)
    ),
]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_each_command_can_be_used(words: list[str]) -> None:
    artifact, config = cli.parse(words)
    assert (ROOT / "mope" / "predictors" / artifact).is_dir()
    assert config.port == PORT


def test_flags_that_the_how_to_names_are_flags() -> None:
    of_report = {option for action in report._parser()._actions for option in action.option_strings}
    known = {f"--{name.replace('_', '-')}" for name in ServeConfig.model_fields} | {"--url"} | of_report
    assert set(re.findall(r"--[a-z][a-z-]+", HOW_TO)) <= known
    assert f"127.0.0.1:{PORT}" in HOW_TO


def test_containers_listen_where_they_are_asked() -> None:
    assert json.loads(instruction("ENTRYPOINT")) == ["mope", "serve"]
    assert int(instruction("EXPOSE")) == PORT == CONTAINER["ports"][0]["containerPort"]
    assert COMPOSE["services"]["mope"]["ports"] == [f"127.0.0.1:{PORT}:{PORT}"]
    prometheus = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = prometheus["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"mope:{PORT}"]}]
    assert f"127.0.0.1:{PORT}/ready" in DOCKERFILE
    for words in COMMANDS[:3]:
        assert cli.parse(words)[1].host == "0.0.0.0"


def test_containers_are_not_root_and_write_to_their_volume_alone() -> None:
    user = int(instruction("USER"))
    assert user > 0
    assert f"--uid {user}" in DOCKERFILE
    assert KUBERNETES[0]["spec"]["template"]["spec"]["securityContext"]["runAsUser"] == user
    mounts = {mount["mountPath"] for mount in CONTAINER["volumeMounts"]}
    for words in COMMANDS[:3]:
        learned = cli.parse(words)[1].learned
        assert learned is not None
        assert str(learned.parent) == instruction("VOLUME")
        assert str(learned.parent) in mounts


def test_files_that_are_copied_or_mounted_are_there() -> None:
    for line in re.findall(r"^COPY (?!--from)(.*)$", DOCKERFILE, flags=re.MULTILINE):
        for name in line.split()[:-1]:
            assert (ROOT / name).exists(), name
    assert COMPOSE["services"]["mope"]["build"]["dockerfile"] == str((DEPLOY / "Dockerfile").relative_to(ROOT))
    assert (DEPLOY / COMPOSE["services"]["mope"]["build"]["context"]).resolve() == ROOT
    for container in COMPOSE["services"].values():
        for volume in container["volumes"]:
            source = volume.partition(":")[0]
            assert (DEPLOY / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume
    (provider,) = yaml.safe_load((DEPLOY / "grafana-dashboards.yml").read_text(encoding="utf-8"))["providers"]
    assert any(provider["options"]["path"] in volume for volume in COMPOSE["services"]["grafana"]["volumes"])
    for link in re.findall(r"\]\(([^)#]+)\)", HOW_TO):
        assert (SERVICE / link).exists(), link


def test_one_key_is_enough_for_prometheus_and_the_service() -> None:
    assert ServeConfig().api_key_env in COMPOSE["services"]["mope"]["environment"]
    assert CONTAINER["env"][0]["name"] == ServeConfig().api_key_env
    assert COMPOSE["configs"]["key"]["content"] == "${MOPE_API_KEYS}"


def test_the_client_of_the_how_to_runs_without_a_service(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("httpx2")
    first, second = re.findall(r"^```python\n(.*?)^```$", HOW_TO, flags=re.MULTILINE | re.DOTALL)
    block = f"{first}\n{second}".replace(str(PORT), "9").replace("deadline_s=0.2", "deadline_s=5.0")
    namespace: dict[str, Any] = {}
    exec("async def run():\n" + textwrap.indent(f"{block}\nreturn reservation", "    "), namespace)
    reservation = asyncio.run(namespace["run"]())
    assert "fallback:unreachable" in capsys.readouterr().out
    assert (reservation.allowed, reservation.source) == (True, "fallback:unreachable")


def test_the_budgets_of_the_how_to_and_of_the_compose_file_can_be_read(tmp_path: Path) -> None:
    (shown,) = re.findall(r"echo '(.*)' > budgets.json", HOW_TO)
    for text in (shown, COMPOSE["configs"]["budgets"]["content"]):
        (tmp_path / "budgets.json").write_text(text, encoding="utf-8")
        default = read_budgets(tmp_path / "budgets.json").default
        assert default is not None
        assert default.window_s == 60
    rows = dict(re.findall(r"^\| `(\w+)`[^|]*\|([^|]*)\|", HOW_TO, flags=re.MULTILINE))
    assert set(rows) == set(Budget.model_fields) - {"response_weight"}  # which shares a row
    for name, default in rows.items():
        if default.strip():
            assert default.strip("` ") == str(Budget.model_fields[name].default)


def test_the_gateways_how_to_names_what_the_hook_reads() -> None:
    folder = ROOT / "serving_hooks" / "gateways"
    how_to, source = ((folder / name).read_text(encoding="utf-8") for name in ("README.md", "litellm.py"))
    how_to = how_to[how_to.index("\n## LiteLLM") : how_to.index("\n## Ray Serve")]
    rows = re.findall(r"^\| `(MOPE_\w+)` \|[ `]*([^|` ]*)[ `]*\|", how_to, flags=re.MULTILINE)
    assert dict(rows) == {
        "MOPE_URL": f"http://127.0.0.1:{PORT}",
        "MOPE_API_KEY": "",
        "MOPE_DEADLINE_MS": "1000",
        "MOPE_DOWN": "allow",
    }
    for name, default in rows:
        assert f'"{name}"' in source
        assert default in source
    assert "mope.serving_hooks.gateways.litellm.hook" in how_to
    assert re.search(r"^hook = MopeHook\(\)$", source, flags=re.MULTILINE)
    (version,) = re.findall(r"litellm\[proxy\]==([\d.]+)", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert f"LiteLLM {version} " in how_to
