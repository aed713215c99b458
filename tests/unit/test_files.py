"""Outputs: whole or not at all, and never over an input or a saved predictor."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest

from mope import cli
from mope.console import run
from mope.errors import ConfigError
from mope.files import check_output_file, make_output_folder, replaced, write_text

REQUEST = '{"prompt": "Explain TCP slow start."}\n'


@pytest.mark.parametrize("kind", ["same", "relative", "link", "hard link", "folder link"])
def test_predictions_do_not_replace_their_input(
    kind: str, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(REQUEST)
    output = tmp_path / "out.jsonl"
    if kind == "same":
        output = source
    elif kind == "relative":
        monkeypatch.chdir(tmp_path)
        output = Path("..", tmp_path.name, "in.jsonl")
    elif kind == "link":
        output.symlink_to(source)
    elif kind == "hard link":
        os.link(source, output)
    else:
        (tmp_path / "folder").symlink_to(tmp_path)
        output = tmp_path / "folder" / "in.jsonl"
    assert cli.main(["predict", str(tiny), "--input", str(source), "--output", str(output)]) == 2
    assert "is the file that --input reads, which would be lost" in capsys.readouterr().err
    assert source.read_text() == REQUEST


def test_predictions_do_not_replace_a_file_of_a_predictor(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = shutil.copytree(tiny, tmp_path / "copy")
    (tmp_path / "in.jsonl").write_text(REQUEST)
    before = (copy / "config.json").read_bytes()
    arguments = ["predict", str(copy), "--input", str(tmp_path / "in.jsonl"), "--output", str(copy / "config.json")]
    assert cli.main(arguments) == 2
    assert "is a file of the saved predictor" in capsys.readouterr().err
    assert (copy / "config.json").read_bytes() == before
    with pytest.raises(ConfigError, match="is a saved predictor, whose own results would be lost"):
        make_output_folder(copy, names=("metrics.json",))


def test_a_link_stays_and_a_device_is_written_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "new"
    write_text(Path(os.devnull), "nothing")
    assert not Path(os.devnull).is_file()


def test_what_was_there_stays_if_the_writing_fails(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fails() -> None:
        with replaced(path) as beside:
            beside.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert path.read_text() == "old"
    assert [found.name for found in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(
    ("output", "told"), [(".", "is a folder; expected a file"), ("nowhere/out.jsonl", "type first: mkdir -p")]
)
def test_an_output_that_cannot_be_is_told_before_the_work(output: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        check_output_file(tmp_path / output)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_disk_that_takes_nothing_is_one_line(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MOPE_CACHE", str(tmp_path))

    def fails(_: list[str]) -> int:
        raise OSError(number, os.strerror(number), str(tmp_path / "rows"))

    assert run(fails, []) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: {tmp_path / 'rows'}: ")
    assert "MOPE_CACHE names another folder" in told
    assert told.count("\n") == 1
