"""A real SGLang server on the CPU: a Llama of two layers with random weights, and what asks it for answers.

Nothing is downloaded; a server is ready in half a minute. Needs SGLang, and the mope under test installed beside it so
that its entry point is found. `sglang_shims` stand in for what a machine without CUDA lacks.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

from tests.ports import free_port

ROOT = Path(__file__).resolve().parents[2]
SHIMS = Path(__file__).parent / "sglang_shims"
VOCABULARY = 512
READY_S = 1800.0
KEY = "a-key-of-the-server"


def missing() -> str | None:
    """The reason to skip; None if SGLang is here and would find the plugin."""
    try:
        version("sglang")
    except PackageNotFoundError:
        return "sglang is not installed"
    if not any(found.name == "mope" for found in entry_points(group="sglang.srt.plugins")):
        return "mope is installed without its entry point for SGLang"
    return None


def make_model(folder: Path) -> Path:
    """Writes a model and its tokenizer; the weights are the same each time."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{number}" for number in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
    )
    wrapped.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    wrapped.save_pretrained(folder)
    return folder


def environment(further: Mapping[str, str] | None = None) -> dict[str, str]:
    """Variables of a process that runs SGLang here."""
    path = os.pathsep.join(filter(None, [str(SHIMS), os.environ.get("PYTHONPATH", "")]))
    return {
        **os.environ,
        "PYTHONPATH": path,
        "SGLANG_USE_CPU_ENGINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **(further or {}),
    }


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: where it listens, without a path.
        log: file with all that it has printed.
        process: its first process.
    """

    url: str
    log: Path
    process: subprocess.Popen[bytes]

    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def send(self, path: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
        """Sends JSON, or asks for what is there; the status and the JSON or text that comes back."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"content-type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, _json_or_text(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _json_or_text(error.read())

    def state(self) -> dict[str, Any]:
        """What `/server_info` says of mope on the first rank."""
        status, found = self.send("/server_info")
        if status == 404:
            status, found = self.send("/get_server_info")
        state: dict[str, Any] = found["internal_states"][0].get("mope", {})
        return state


def _json_or_text(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


@contextmanager
def serve(
    folder: Path,
    policy: str,
    options: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    ready_s: float = READY_S,
) -> Iterator[Server]:
    """Runs a server until the block ends, however it ends.

    Args:
        folder: for the model and the log.
        policy: `--schedule-policy`.
        options: of mope.
        arguments: further ones of the server; the last one wins.
        variables: further ones of its environment.
        ready_s: how long it may take to answer, in seconds.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message holds the end of its log.
    """
    server = start(folder, policy, options, arguments, variables)
    try:
        _wait(server, ready_s)
        yield server
    finally:
        end(server.process)


def start(
    folder: Path,
    policy: str,
    options: Mapping[str, Any] | None = None,
    arguments: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> Server:
    """Starts a server, or a node of one, and waits for nothing; whoever calls it ends it. Arguments as for `serve`."""
    model = folder / "model"
    if not model.exists():  # where the stand-ins are, without which transformers cannot be imported here
        maker = [sys.executable, "-m", "tests.engines.tiny_sglang", str(model)]
        subprocess.run(maker, env=environment(), cwd=ROOT, check=True)
    port = free_port()
    log = folder / f"server-{port}.log"
    command = [
        *(sys.executable, "-m", "sglang.launch_server", "--model-path", str(model), "--served-model-name", "tiny"),
        *("--device", "cpu", "--attention-backend", "torch_native", "--sampling-backend", "pytorch"),
        *("--grammar-backend", "none", "--disable-cuda-graph", "--mem-fraction-static", "0.2", "--random-seed", "1"),
        *("--dtype", "float32"),  # so that a batch's size does not decide between tokens that are nearly as likely
        *("--max-total-tokens", "8192", "--max-running-requests", "4", "--host", "127.0.0.1", "--port", str(port)),
        *("--schedule-policy", policy, "--skip-server-warmup"),
        *(("--mope-config", json.dumps(options)) if options is not None else ()),
        *arguments,
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment(variables),
            start_new_session=True,  # so that its own processes end with it
        )
    return Server(f"http://127.0.0.1:{port}", log, process)


def _wait(server: Server, ready_s: float) -> None:
    end = time.monotonic() + ready_s
    while time.monotonic() < end:
        if server.process.poll() is not None:
            raise RuntimeError(f"SGLang ended with status {server.process.returncode}:\n{server.printed()[-6000:]}")
        try:
            with urllib.request.urlopen(server.url + "/model_info", timeout=5):
                return
        except urllib.error.HTTPError as error:
            if error.code in (401, 404):
                return
            time.sleep(0.5)
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"SGLang did not answer within {ready_s:.0f} s:\n{server.printed()[-6000:]}")


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends what `start` started, and its own processes."""
    for number, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # what the server left behind
    process.wait()


# -- what asks


@dataclass(frozen=True)
class Ask:
    """One request of a load.

    Attributes:
        client: told in the header `x-client-id`.
        prompt: token ids.
        at_s: when it is sent, from the beginning.
        parameters: SGLang's `sampling_params`.
        give_up_s: after how long it is abandoned; None to wait for its end.
    """

    client: str
    prompt: tuple[int, ...]
    at_s: float = 0.0
    parameters: Mapping[str, Any] = field(default_factory=dict)
    give_up_s: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What came of it.

    Attributes:
        ask: the request.
        ttft_s: seconds to its first token; None if there was none.
        end_s: when it ended, from the beginning of the load.
        output: token ids.
        tokens: what SGLang counted.
        cached_tokens: of its prompt, found in the prefix cache.
        retractions: times that it lost its place.
        reason: why it ended; "lost" if the connection broke; None if it was abandoned.
    """

    ask: Ask
    ttft_s: float | None
    end_s: float
    output: tuple[int, ...] = ()
    tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    reason: str | None = None


def ask_all(server: Server, asks: Sequence[Ask], headers: Mapping[str, str] | None = None) -> list[Outcome]:
    """Sends all of them at their times, and waits until each has ended; outcomes in the same order."""
    return asyncio.run(_ask_all(server, asks, headers or {}))


async def _ask_all(server: Server, asks: Sequence[Ask], headers: Mapping[str, str]) -> list[Outcome]:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        start = time.monotonic()
        return list(await asyncio.gather(*(_ask(session, server.url, one, start, headers) for one in asks)))


async def _ask(session: Any, url: str, ask: Ask, start: float, headers: Mapping[str, str]) -> Outcome:
    import aiohttp

    await asyncio.sleep(max(0.0, start + ask.at_s - time.monotonic()))
    sent = time.monotonic()
    first: float | None = None
    last: dict[str, Any] = {}
    output: list[int] = []
    body = {"input_ids": list(ask.prompt), "sampling_params": dict(ask.parameters), "stream": True}

    async def read() -> None:
        nonlocal first, last
        async with session.post(f"{url}/generate", json=body, headers={"x-client-id": ask.client, **headers}) as answer:
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue
                last = json.loads(line[6:])
                if last.get("output_ids"):
                    first = time.monotonic() - sent if first is None else first
                    output[:] = last["output_ids"]

    try:
        await asyncio.wait_for(read(), ask.give_up_s)
    except aiohttp.ClientError:
        return Outcome(ask, first, time.monotonic() - start, tuple(output), reason="lost")
    except (asyncio.TimeoutError, TimeoutError):
        return Outcome(ask, first, time.monotonic() - start, tuple(output))
    meta = last.get("meta_info", {})
    reason = meta.get("finish_reason") or {}
    return Outcome(
        ask,
        first,
        time.monotonic() - start,
        tuple(output),
        int(meta.get("completion_tokens", 0)),
        int(meta.get("cached_tokens", 0)),
        int(meta.get("num_retractions", 0) or 0),
        reason.get("type", "error") if reason or "error" in last else None,
    )


if __name__ == "__main__":
    make_model(Path(sys.argv[1]))
