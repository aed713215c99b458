"""A packaged predictor in NVIDIA's real Triton, with its Python back end, asked as `export/TRITON.md` says.

Run by `make triton`, in an environment that has Triton's server.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytriton = pytest.importorskip("pytriton")
sys.path.append(str(Path(__file__).resolve().parents[1]))

import tritonclient.http  # noqa: E402
from google.protobuf import text_format  # noqa: E402
from ports import free_port  # noqa: E402
from tritonclient.grpc import model_config_pb2  # noqa: E402
from tritonclient.utils import InferenceServerException  # noqa: E402

from mope import LengthPredictor  # noqa: E402
from mope.export.cli import main  # noqa: E402

START_S = 120.0
SERVER = Path(pytriton.__file__).parent / "tritonserver"
LIBRARIES = SERVER.parents[1] / "nvidia_pytriton.libs"
BODY = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("triton") / "models"
    assert main(["chat-micro", "--to", "triton", "--output", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def address(repository: Path) -> Iterator[str]:
    """Of a Triton that serves the repository, with the packages of this environment."""
    config_path = repository / "chat-micro" / "config.pbtxt"
    config = text_format.Parse(config_path.read_text(encoding="utf-8"), model_config_pb2.ModelConfig())
    config.parameters["EXECUTION_ENV_PATH"].string_value = sys.prefix
    config_path.write_text(text_format.MessageToString(config), encoding="utf-8")
    backends = shutil.copytree(SERVER / "backends", repository.parent / "backends")
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    shutil.copy(SERVER / "python_backend_stubs" / version / "triton_python_backend_stub", backends / "python")
    port = free_port()
    command = [SERVER / "bin" / "tritonserver", f"--model-repository={repository}", f"--backend-directory={backends}"]
    command += ["--http-address=127.0.0.1", f"--http-port={port}", "--allow-grpc=false", "--allow-metrics=false"]
    log_path = repository.parent / "triton.log"
    with log_path.open("w") as log:
        server = subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "LD_LIBRARY_PATH": str(LIBRARIES)}
        )
    try:
        client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{port}")
        until = time.monotonic() + START_S
        while not is_ready(client):
            if server.poll() is not None or time.monotonic() > until:
                pytest.fail(log_path.read_text()[-4000:])
            time.sleep(0.2)
        yield f"127.0.0.1:{port}"
        assert server.poll() is None, log_path.read_text()[-4000:]
    finally:
        server.terminate()
        server.wait(60)


def is_ready(client: Any) -> bool:
    try:
        return bool(client.is_model_ready("chat-micro"))
    except OSError:
        return False


def ask(address: str, name: str, *rows: str) -> Any:
    given = tritonclient.http.InferInput(name, [len(rows), 1], "BYTES")
    given.set_data_from_numpy(np.array([[row] for row in rows], dtype=np.object_))
    return tritonclient.http.InferenceServerClient(address).infer("chat-micro", [given])


def test_the_python_of_the_page_runs(address: str, repository: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```$", (repository / "README.md").read_text(), flags=re.M | re.S)
    said: dict[str, Any] = {}
    exec(code.replace("localhost:8000", address), said)
    expected = LengthPredictor.from_pretrained("chat-micro", backend="onnx").predict_batch(said["bodies"])
    np.testing.assert_allclose(said["answer"].as_numpy("MEDIAN")[:, 0], [one.median for one in expected], rtol=1e-3)
    levels = [0.1, 0.5, 0.9, 0.99]
    quantiles = [one.quantiles(levels) for one in expected]
    np.testing.assert_allclose(said["answer"].as_numpy("QUANTILES"), quantiles, rtol=1e-3)


def test_the_curl_of_the_page_is_answered(address: str, repository: Path) -> None:
    (url, body) = re.findall(
        r"curl -s localhost:8000(\S+) -d '(.*?)'$", (repository / "README.md").read_text(), re.S | re.M
    )[0]
    connection = http.client.HTTPConnection(address)
    connection.request("POST", url, body)
    outputs = {one["name"]: one for one in json.loads(connection.getresponse().read())["outputs"]}
    assert outputs["SOURCE"]["data"] == ["model"]
    assert outputs["QUANTILES"]["shape"] == [1, 4]


def test_many_at_once_are_answered_and_only_the_unreadable_are_refused(address: str) -> None:
    def one(number: int) -> Any:
        try:
            answer = ask(address, "REQUEST", "{" if number % 5 == 0 else json.dumps(BODY))
        except InferenceServerException as error:
            return error.status(), error.message()
        return answer.as_numpy("MEDIAN").tolist(), answer.as_numpy("SOURCE").tolist()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(one, range(100)))
    refused, answered = answers[::5], [answer for number, answer in enumerate(answers) if number % 5]
    assert {status for status, _ in refused} == {"400"}
    assert all("REQUEST a JSON object" in message for _, message in refused)
    assert all(answer == answered[0] for answer in answered)
    assert answered[0][1] == [[b"model"]]
    assert 0 < answered[0][0][0][0] <= BODY["max_tokens"]
