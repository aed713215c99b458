"""What a card says of the licences of the data."""

from mope.training.data.public_sets import PUBLIC_SETS
from mope.training.licences import data_licences


def test_every_public_set_is_named_with_its_licence():
    lines = data_licences(["sharegpt", "public-lengths"])
    assert "no licence" in lines[0]
    for one in PUBLIC_SETS:
        (line,) = [line for line in lines if line.startswith(f"`{one.name}` ")]
        assert line.endswith(f"; {one.licence}.")
        assert one.repository in line


def test_of_unknown_data_nothing_is_said():
    assert data_licences(["logs.jsonl", "lmsys/lmsys-chat-1m"]) == []


def test_of_a_folder_with_the_name_of_a_set_nothing_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("spiral", "sharegpt", "modern-lengths"):
        (tmp_path / name).mkdir()
        assert data_licences([name]) == []
