"""What a predictor's folder may hold: regular files under known names; the bytes that were hashed are used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mope import LengthPredictor, artifact, sealed
from mope.cli import main
from mope.errors import ArtifactError
from mope.packaged import PREDICTORS
from mope.sealed import MOST_BYTES, Sealed, cleaned

EVIL = "\x1b]0;pwned\x07\x1b[2Jevil.json"
needs_fifo = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no FIFOs")


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A packaged predictor, which has ONNX graphs."""
    return Path(shutil.copytree(PREDICTORS / "chat-micro", tmp_path / "copy"))


def change(path: Path, how: Callable[[Any], Any]) -> None:
    """Change a JSON file; what `how` returns, or the changed content."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(how(content) or content))


def fingerprint(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def error_of(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        LengthPredictor.from_pretrained(folder)
    message = str(caught.value)
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    "name",
    ["/dev/zero", "../secret.json", "onnx/manifest.json", "README.md", ".", "", "config.json/", EVIL, "a\nb.json"],
)
def test_a_list_names_files_of_a_predictor_alone(copy: Path, name: str) -> None:
    (copy.parent / "secret.json").write_text("TOP SECRET")
    change(copy / "files.json", lambda listed: {**listed, name: fingerprint(copy.parent / "secret.json")})
    assert "which is no file of a predictor" in error_of(copy)


@pytest.mark.parametrize("name", ["tokenizer.json", "router.json", "calibration.json"])
def test_what_is_not_listed_is_not_loaded(copy: Path, name: str) -> None:
    change(copy / "files.json", lambda listed: {key: value for key, value in listed.items() if key != name})
    assert f"files.json does not list {name}" in error_of(copy)


def test_what_was_learned_is_loaded_only_if_it_is_listed(copy: Path, tmp_path: Path) -> None:
    taught = LengthPredictor.from_pretrained(copy)
    for tokens in (500, 600, 700):
        taught.observe(taught.predict("hello", target_llm="gpt-4"), tokens)
    saved = taught.save_pretrained(tmp_path / "taught")
    assert LengthPredictor.from_pretrained(saved).recalibrator.to_json() == taught.recalibrator.to_json()
    shutil.copyfile(saved / "recalibration.json", copy / "recalibration.json")
    assert "recalibration.json is not listed in files.json" in error_of(copy)
    with (saved / "recalibration.json").open("a") as file:
        file.write(" ")
    assert "recalibration.json is not the file that was saved" in error_of(saved)


@needs_fifo
@pytest.mark.parametrize(
    "name",
    ["files.json", "config.json", "tokenizer.json", "recalibration.json", "onnx/manifest.json", "onnx/model.int8.onnx"],
)
@pytest.mark.parametrize("kind", ["fifo", "folder", "socket", "link out", "link to a device", "circle"])
def test_what_is_no_regular_file_is_refused_at_once(copy: Path, name: str, kind: str) -> None:
    path = copy / name
    path.unlink(missing_ok=True)
    if name == "recalibration.json":
        change(copy / "files.json", lambda listed: {**listed, name: listed["config.json"]})
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        server = socket.socket(socket.AF_UNIX)
        before = Path.cwd()
        os.chdir(path.parent)  # the address of a socket is short
        server.bind(path.name)
        os.chdir(before)
        server.close()
    else:
        target = {
            "link out": PREDICTORS / "chat-micro" / "config.json",
            "link to a device": "/dev/zero",
            "circle": path,
        }
        path.symlink_to(target[kind])
    assert error_of(copy)


def test_links_inside_the_folder_are_followed(copy: Path) -> None:
    (copy / "data").mkdir()
    for path in [path for path in copy.iterdir() if path.is_file()]:
        path.rename(copy / "data" / path.name)
        path.symlink_to(Path("data", path.name))
    assert LengthPredictor.from_pretrained(copy).predict("hello").source == "model"


def test_the_folder_itself_may_be_a_link(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "current").symlink_to(copy)
    assert LengthPredictor.from_pretrained(tmp_path / "current").predict("hello").source == "model"


def cached(source: Path, cache: Path, revision: str = "a" * 40) -> Path:
    """A predictor as the Hugging Face cache keeps it: links in a snapshot, to blobs beside the snapshots."""
    repository = cache / "models--me--mine"
    snapshot = repository / "snapshots" / revision
    (repository / "blobs").mkdir(parents=True)
    for path in [path for path in source.rglob("*") if path.is_file()]:
        name = path.relative_to(source)
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        shutil.copyfile(path, blob)
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).symlink_to(os.path.relpath(blob, (snapshot / name).parent))
    return snapshot


def test_a_cache_of_hugging_face_is_loaded_and_copied_from(copy: Path, tmp_path: Path) -> None:
    snapshot = cached(copy, tmp_path / "hub")
    predictor = LengthPredictor.from_pretrained(snapshot)
    assert predictor.backend.name == "onnx"
    again = predictor.save_pretrained(tmp_path / "again")
    for path in copy.rglob("*"):
        if path.is_file() and path.suffix != ".json":
            assert not (again / path.relative_to(copy)).is_symlink()
            assert (again / path.relative_to(copy)).read_bytes() == path.read_bytes()


def test_a_link_out_of_the_repository_s_cache_is_refused(copy: Path, tmp_path: Path) -> None:
    snapshot = cached(copy, tmp_path / "hub")
    other = tmp_path / "hub" / "models--you--yours" / "blobs"
    other.mkdir(parents=True)
    shutil.copyfile(copy / "router.json", other / "router")
    (snapshot / "router.json").unlink()
    (snapshot / "router.json").symlink_to(other / "router")
    assert "router.json is a link that leads out of its folder" in error_of(snapshot)


def test_saving_copies_nothing_that_a_link_points_at(
    copy: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "key.png").write_text("PRIVATE KEY")
    (copy / "README.md").unlink()
    (copy / "README.md").symlink_to(secrets / "key.png")
    (copy / "plots").symlink_to(secrets)
    (copy / "onnx" / "extra").symlink_to(secrets / "key.png")
    (copy / "onnx" / "note.txt").write_text("not a graph")
    saved = LengthPredictor.from_pretrained(copy).save_pretrained(tmp_path / "saved")
    assert not [path for path in saved.rglob("*") if path.is_symlink()]
    assert "PRIVATE KEY" not in [path.read_text(errors="replace") for path in saved.rglob("*") if path.is_file()]
    assert {path.name for path in saved.iterdir()} == {
        "calibration.json", "config.json", "files.json", "metrics.json", "onnx", "plots", "provenance.json",
        "router.json", "tokenizer.json",
    }  # fmt: skip
    assert {path.name for path in (saved / "onnx").iterdir()} == {"manifest.json", "model.int8.onnx"}
    assert "left out of the copy" in caplog.text


def test_sealing_changes_no_rights_of_what_a_link_points_at(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "key").write_text("PRIVATE KEY")
    (tmp_path / "key").chmod(0o600)
    (copy / "key").symlink_to(tmp_path / "key")
    artifact.seal(copy)
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600


@pytest.mark.parametrize("name", ["files.json", "config.json", "onnx/manifest.json", "tokenizer.json"])
def test_sizes_are_bounded_before_anything_is_read(copy: Path, name: str) -> None:
    with (copy / name).open("r+b") as file:
        file.truncate(2**40)  # a sparse file of a terabyte
    assert "at most" in error_of(copy)


def test_a_size_that_is_not_the_listed_one_is_not_even_hashed(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change(copy / "files.json", lambda listed: {**listed, "model.safetensors": {"bytes": 5, "sha256": "0" * 64}})
    with (copy / "model.safetensors").open("wb") as file:
        file.truncate(2**32)
    monkeypatch.setattr(sealed, "sha256_of", lambda *_: pytest.fail("4 GB are hashed"))
    with pytest.raises(ArtifactError, match="is not the file that was saved"):
        Sealed(copy).verify("model.safetensors")


def test_the_bytes_that_were_hashed_are_those_that_are_used(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that changes between its hash and its use was once used as changed: now it is read once."""
    read: list[str] = []
    read_bytes = sealed.read_bytes

    def counted(folder: Path, name: str, most_bytes: int) -> bytes:
        read.append(name)
        content = read_bytes(folder, name, most_bytes)
        if name.endswith(("tokenizer.json", "router.json", "calibration.json", ".onnx")):
            (folder / name).write_bytes(b"replaced as soon as it was read")
        return content

    monkeypatch.setattr(sealed, "read_bytes", counted)
    monkeypatch.setattr("mope.backends.onnx_backend.read_bytes", counted)
    assert LengthPredictor.from_pretrained(copy).predict("hello").source == "model"
    assert {"tokenizer.json", "router.json", "calibration.json", "onnx/model.int8.onnx"} <= set(read)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\0", b"\xff\xfe", b'{"a":' + b"9" * 5000 + b"}", b"NaN", b""])
@pytest.mark.parametrize("name", ["files.json", "config.json", "router.json", "calibration.json", "onnx/manifest.json"])
def test_what_is_no_json_is_one_line(copy: Path, name: str, content: bytes) -> None:
    (copy / name).write_bytes(content)
    if "/" not in name and name != "files.json":
        artifact.seal(copy)
    assert error_of(copy)


def test_escape_sequences_do_not_reach_the_terminal(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(copy / "files.json", lambda listed: {**listed, EVIL: {"bytes": 1, "sha256": "0"}})
    assert main(["predict", str(copy), "hi"]) == 2
    assert "\x1b" not in capsys.readouterr().err
    assert cleaned(EVIL) == "\\x1b]0;pwned\\x07\\x1b[2Jevil.json"
    assert cleaned("x" * 300, 20) == "x" * 17 + "..."


@pytest.mark.parametrize(
    "field", [{EVIL: 1}, {"format_version": EVIL}, {"preset": EVIL}, {"target_llms": [EVIL]}, {"design": EVIL}]
)
def test_escape_sequences_of_a_config_are_refused_and_cleaned(copy: Path, field: dict[str, Any]) -> None:
    change(copy / "config.json", lambda config: {**config, **field})
    artifact.seal(copy)
    assert "\x1b" not in error_of(copy)


def test_the_limits_are_far_above_what_predictors_have() -> None:
    for folder in PREDICTORS.iterdir():
        for name, entry in json.loads((folder / "files.json").read_text()).items():
            assert entry["bytes"] * 30 < MOST_BYTES[name]
