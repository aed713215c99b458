"""A Hub id: what is fetched from a Hugging Face Hub, here one on this machine, and that its cache is loaded from."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from mope.packaged import PREDICTORS

SOURCE = PREDICTORS / "chat-micro"
REVISION = "a" * 40
OTHERS = {
    "pytorch_model.bin": b"\x80\x04pickle",
    "huge.bin": b"0" * 2_000_000,
    "run_me.py": b"print('x')",
    "sub/config.json": b"{}",
    "onnx/model.int8.onnx.data": b"weights",
    "onnx/other.onnx": b"graph",
    "tensorrt/manifest.json": b"{}",
    "tensorrt/model.fp16.engine": b"code",
}


class Hub(BaseHTTPRequestHandler):
    """Answers as the Hub does for one repository."""

    files: dict[str, bytes]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = urllib.parse.unquote(self.path.partition("?")[0])
        if path.startswith("/api/models/me/mine"):
            if "/tree/" in path:
                found: object = [
                    {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                    for name, content in self.files.items()
                ]
            else:
                siblings = [{"rfilename": name} for name in self.files]
                found = {"id": "me/mine", "modelId": "me/mine", "sha": REVISION, "siblings": siblings}
            headers, body = {"content-type": "application/json"}, json.dumps(found).encode()
        else:
            body = self.files.get(path.partition(f"/resolve/{REVISION}/")[2], b"")
            headers = {"etag": f'"{hashlib.sha1(body).hexdigest()}"', "x-repo-commit": REVISION}
        self.send_response(200 if body else 404)
        for name, said in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, said)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def address() -> Iterator[str]:
    own = {str(path.relative_to(SOURCE)): path.read_bytes() for path in SOURCE.rglob("*") if path.is_file()}
    handler = type("OneRepository", (Hub,), {"files": {**own, **OTHERS}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


def test_nothing_but_a_predictor_s_files_is_fetched_and_its_cache_is_loaded(address: str, tmp_path: Path) -> None:
    code = f"""
from mope import LengthPredictor
predictor = LengthPredictor.from_pretrained("me/mine")
print(predictor.predict("hello").median, predictor.backend.name)
predictor.save_pretrained({str(tmp_path / "saved")!r})
"""
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "onnx"
    (snapshot,) = (tmp_path / "home").rglob(f"snapshots/{REVISION}")
    fetched = {str(path.relative_to(snapshot)) for path in snapshot.rglob("*") if not path.is_dir()}
    own = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*") if path.is_file()}
    assert fetched == own
    assert any(path.is_symlink() for path in snapshot.iterdir())  # as the cache keeps files, so that links are tested
    saved = {str(path.relative_to(tmp_path / "saved")) for path in (tmp_path / "saved").rglob("*") if path.is_file()}
    assert saved == own
