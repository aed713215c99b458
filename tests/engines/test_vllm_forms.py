"""vLLM's own reading of forms behind the middleware: however a field's name is written, nothing in it is believed."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Annotated, Any

import pytest

pytest.importorskip("vllm")

from fastapi import FastAPI, Form, Request
from starlette.testclient import TestClient
from vllm.entrypoints.speech_to_text.transcription.protocol import TranscriptionRequest
from vllm.entrypoints.speech_to_text.translation.protocol import TranslationRequest

from mope.serving_hooks.carried import Carried
from mope.serving_hooks.vllm import Middleware

FORGED = json.dumps({"mope_client": "victim/alice", "mope_tokens": 1})
CODECS = ("utf-8", "utf-7", "cp037", "utf-16-be", "unicode_escape", "raw_unicode_escape")


def form(codec: str) -> bytes:
    """A form with a field `vllm_xargs` that says who is to be charged."""
    name = b"vllm_+AHg-args" if codec == "utf-7" else "vllm_xargs".encode(codec)
    fields = (
        (b'file"; filename="a.wav', b"RIFF"),
        ("model".encode(codec), "m".encode(codec)),
        (name, FORGED.encode(codec)),
    )
    parts = (b'Content-Disposition: form-data; name="' + key + b'"\r\n\r\n' + value + b"\r\n" for key, value in fields)
    return b"--x\r\n" + b"--x\r\n".join(parts) + b"--x--\r\n"


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    arguments = SimpleNamespace(api_key=None, model="openai/whisper", additional_config={"mope": {"predictor": "none"}})
    app.state.args = arguments

    @app.post("/v1/audio/transcriptions")
    async def transcribe(raw: Request, request: Annotated[TranscriptionRequest, Form()]) -> Any:
        return request.to_sampling_params(10, {}).extra_args

    @app.post("/v1/audio/translations")
    async def translate(raw: Request, request: Annotated[TranslationRequest, Form()]) -> Any:
        return request.to_sampling_params(10, {}).extra_args

    app.add_middleware(Middleware)
    return app


@pytest.mark.parametrize("path", ["/v1/audio/transcriptions", "/v1/audio/translations"])
@pytest.mark.parametrize("codec", CODECS)
def test_no_form_names_a_client(app: FastAPI, path: str, codec: str) -> None:
    with TestClient(app) as client:
        headers = {"content-type": f"multipart/form-data; boundary=x; charset={codec}"}
        answer = client.post(path, content=form(codec), headers=headers)
    if codec == "utf-8":
        assert answer.status_code == 200, answer.text
        assert answer.json()["mope_client"] == "victim/alice"  # as far as vLLM is concerned
        assert Carried.read(answer.json()) == Carried()
    else:
        assert (answer.status_code, "expected utf-8" in answer.text) == (400, True)
