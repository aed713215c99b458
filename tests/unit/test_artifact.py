"""The saved folder: written whole or not at all, and every kind of damage named."""

import errno
import hashlib
import json
import shutil
from pathlib import Path

import make_tiny_artifact
import numpy as np
import pytest

from mope import artifact
from mope.config import FORMAT_VERSION
from mope.errors import ArtifactError
from mope.predictor import LengthPredictor
from mope.sealed import Sealed

FILES = {"config.json", "model.safetensors", "tokenizer.json", "router.json", "lookup.safetensors", "calibration.json"}
FOR_PEOPLE = {"files.json", "metrics.json", "README.md"}


@pytest.fixture
def copy(tiny, tmp_path):
    return Path(shutil.copytree(tiny, tmp_path / "copy"))


def rewrite(folder, name, change):
    """Change a JSON file of an artifact and seal it again."""
    content = json.loads((folder / name).read_text())
    change(content)
    artifact.write_json(folder / name, content)
    artifact.seal(folder)


def sealed(folder):
    """What is in a folder, under a list of its hashes."""
    (folder / "config.json").touch()
    artifact.seal(folder)
    return Sealed(folder)


def test_the_committed_artifact_is_small_and_complete(tiny):
    assert {path.name for path in tiny.iterdir()} == FILES | FOR_PEOPLE
    assert sum(path.stat().st_size for path in tiny.iterdir()) < 100_000
    assert set(json.loads((tiny / "files.json").read_text())) == FILES


def test_the_committed_artifact_is_what_its_script_makes(tiny, tiny_encoder):
    hint = f"tests/data/tiny is out of date; run: {make_tiny_artifact.COMMAND}"
    made = make_tiny_artifact.make_predictor(tiny_encoder)
    saved = LengthPredictor.from_pretrained(tiny)
    assert made.config.model_dump(mode="json") == saved.config.model_dump(mode="json"), hint
    prompts = list(make_tiny_artifact.PROMPTS)
    pairs = zip(made.predict_batch(prompts), saved.predict_batch(prompts), strict=True)
    for new, old in pairs:
        assert new.cumulative == pytest.approx(old.cumulative, abs=1e-3), hint


def test_the_tokenizer_hash_of_the_config_is_that_of_the_file(tiny):
    config = json.loads((tiny / "config.json").read_text())
    assert config["tokenizer_sha256"] == hashlib.sha256((tiny / "tokenizer.json").read_bytes()).hexdigest()


def test_nothing_in_it_is_a_pickle(tiny, tiny_separate):
    for path in (*tiny.iterdir(), *tiny_separate.iterdir()):
        assert path.suffix in (".json", ".safetensors", ".md")
        content = path.read_bytes()
        if path.suffix == ".safetensors":  # eight bytes of length, then JSON
            content = content[8 : 8 + int.from_bytes(content[:8], "little")]
        if path.suffix != ".md":
            assert isinstance(json.loads(content), dict)


def test_a_saved_folder_can_be_read_by_everyone(predictor, tmp_path):
    saved = predictor.save_pretrained(tmp_path / "saved")
    assert {path.stat().st_mode & 0o777 for path in saved.rglob("*") if path.is_file()} == {0o644}
    assert saved.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=f"lacks {name}, which"):
        artifact.check(copy)


@pytest.mark.parametrize("name", sorted(FILES))
def test_a_changed_byte_is_found_and_the_file_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(ArtifactError, match=f"{name} is not the file that was saved"):
        LengthPredictor.from_pretrained(copy)


def test_a_file_cut_short_is_found(copy):
    with (copy / "model.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(ArtifactError, match=r"model\.safetensors is not the file"):
        artifact.check(copy)


@pytest.mark.parametrize(
    ("version", "advice"),
    [
        (FORMAT_VERSION + 1, "update mope"),
        (1, "train or convert it anew"),
        (0, "train or convert it anew"),
        (None, "train"),
        ("2.0", "train"),
    ],
)
def test_another_format_version_says_what_to_do(copy, version, advice):
    rewrite(copy, "config.json", lambda config: config.update(format_version=version))
    expected = f"format version {version}; this mope reads version {FORMAT_VERSION}: {advice}"
    with pytest.raises(ArtifactError, match=expected):
        artifact.check(copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"colour": "red"}, "colour: Extra inputs are not permitted"),
        ({"num_experts": 9}, "num_experts: Input should be less than or equal to 8"),
        ({"design": "both"}, "design: Input should be 'shared' or 'separate'"),
        ({"special_ids": [2, 3, 10**6]}, "special_ids: no predictor has such numbers"),
        ({"boundaries": [250.5, 45.5]}, "boundaries: no predictor has such numbers"),
        ({"boundaries": [45.5]}, "boundaries: no predictor has such numbers"),
        ({"tail_shares": [0.5, 0.4, 0.3, 0.2]}, "tail_shares: no predictor has such numbers"),
        ({"unknown_llms": {"": []}}, "unknown_llms: no predictor has such numbers"),
        ({"number_mean": [1e300] * 3}, "number_mean: no predictor has such numbers"),
        ({"max_prompt_tokens": 0}, "max_prompt_tokens: Input should be greater than or equal to 1"),
        ({"encoder_config": {"model_type": "bert"}}, "encoder_config: expected a vocab_size"),
    ],
)
def test_a_config_that_does_not_fit_is_named(copy, change, message):
    rewrite(copy, "config.json", lambda config: config.update(change))
    with pytest.raises(ArtifactError, match=message):
        artifact.check(copy)


def test_a_missing_field_is_named(copy):
    rewrite(copy, "config.json", lambda config: config.pop("edges"))
    with pytest.raises(ArtifactError, match="edges: Field required"):
        artifact.check(copy)


def test_other_features_than_this_version_computes_are_refused(copy):
    def rename(config):
        config["number_names"][3] = "log_phase_of_the_moon"

    rewrite(copy, "config.json", rename)
    with pytest.raises(ArtifactError, match="does not compute: log_phase_of_the_moon; update mope"):
        LengthPredictor.from_pretrained(copy)


@pytest.mark.parametrize(
    "listing", ["[]", '{"a.json": {}}', '{"config.json": 3}', '{"config.json": {"bytes": 1}}', "{", ""]
)
def test_a_broken_list_of_files_is_one_line(copy, listing):
    (copy / "files.json").write_text(listing)
    with pytest.raises(ArtifactError) as caught:
        artifact.check(copy)
    assert "\n" not in str(caught.value)


def test_foreign_folders_and_none_say_what_to_type(tmp_path):
    with pytest.raises(ArtifactError, match=r"mope-train DATA --output .* makes one"):
        artifact.check(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match=r"has no files\.json: not a predictor saved by mope"):
        artifact.check(tmp_path)


def test_config_dumps_and_reloads_to_the_same_bytes(tiny, tmp_path):
    config = artifact.check(tiny)
    artifact.write_json(tmp_path / "config.json", config.model_dump(mode="json"))
    assert (tmp_path / "config.json").read_bytes() == (tiny / "config.json").read_bytes()


def test_saving_twice_gives_the_same_bytes(predictor, tmp_path):
    first, second = predictor.save_pretrained(tmp_path / "a"), predictor.save_pretrained(tmp_path / "b")
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes()


def test_router_and_calibration_are_read_as_they_were_written(predictor, tmp_path):
    artifact.write_router(tmp_path, predictor.router)
    router = artifact.read_router(sealed(tmp_path), 3)
    assert router.parts == predictor.router.parts
    assert router.rules == predictor.router.rules
    assert np.array_equal(router.lookup.embeddings_MH, predictor.router.lookup.embeddings_MH)
    assert np.array_equal(router.lookup.buckets_M, predictor.router.lookup.buckets_M)
    for key, (weights, bias) in predictor.router.combiners.items():
        assert np.array_equal(router.combiners[key][0], weights)
        assert np.array_equal(router.combiners[key][1], bias)
    fallback = np.array([0.0, 0.1, 1 / 3, 1.0])
    artifact.write_calibration(tmp_path, predictor.calibration, fallback)
    calibration, restored = artifact.read_calibration(sealed(tmp_path), 4)
    assert np.array_equal(calibration.later_turn, predictor.calibration.later_turn)
    assert np.array_equal(restored, fallback)


def test_a_router_without_a_lookup_has_no_file_for_it(predictor, tmp_path):
    from dataclasses import replace

    artifact.write_router(tmp_path, replace(predictor.router, lookup=None, parts=("gate",)))
    assert not (tmp_path / "lookup.safetensors").exists()
    assert artifact.read_router(sealed(tmp_path), 3).lookup is None


def test_a_folder_that_is_no_predictor_is_not_replaced(predictor, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ArtifactError, match="exists and is not a saved predictor"):
        predictor.save_pretrained(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ArtifactError, match="exists and is not a saved predictor"):
        predictor.save_pretrained(tmp_path / "file")
    assert {path.name for path in tmp_path.iterdir()} == {"thesis.txt", "file"}


def test_an_empty_folder_and_an_old_predictor_are_replaced(predictor, tmp_path):
    (tmp_path / "saved").mkdir()
    predictor.save_pretrained(tmp_path / "saved")
    predictor.save_pretrained(tmp_path / "saved")
    assert {path.name for path in (tmp_path / "saved").iterdir()} == FILES | FOR_PEOPLE
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]


def test_files_of_others_beside_a_predictor_are_not_lost(predictor, tmp_path):
    predictor.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "plots" / "thesis.txt").parent.mkdir(exist_ok=True)
    (tmp_path / "saved" / "plots" / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ArtifactError, match=r"files that are not of the predictor.*plots/thesis\.txt; move them"):
            predictor.save_pretrained(tmp_path / "saved", overwrite=overwrite)
    assert (tmp_path / "saved" / "plots" / "thesis.txt").read_text() == "years of work"


def test_another_predictor_is_replaced_only_when_told_so(predictor, tiny, tmp_path):
    """Its own folder may be saved into again; another one, which may have learned, may not, also through a link."""
    saved = predictor.save_pretrained(tmp_path / "saved")
    (tmp_path / "link").symlink_to(saved)
    predictor.save_pretrained(saved)
    again = type(predictor).from_pretrained(saved, backend="torch")
    again.save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    stranger = type(predictor).from_pretrained(tiny, backend="torch")
    before = (saved / "files.json").stat().st_ino
    for folder in (saved, tmp_path / "link"):
        with pytest.raises(ArtifactError, match=r"is a saved predictor, which would be lost; .*overwrite=True"):
            stranger.save_pretrained(folder)
    assert (saved / "files.json").stat().st_ino == before
    stranger.save_pretrained(saved, overwrite=True)
    assert (saved / "files.json").stat().st_ino != before


def test_engines_stay_when_a_predictor_is_saved_into_its_own_folder(predictor, tmp_path):
    saved = predictor.save_pretrained(tmp_path / "saved")
    (saved / "tensorrt").mkdir()
    (saved / "tensorrt" / "model.plan").write_bytes(b"minutes of work")
    predictor.save_pretrained(saved)
    assert (saved / "tensorrt" / "model.plan").read_bytes() == b"minutes of work"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device")]),
        RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line_and_what_was_there_stays(predictor, tmp_path, monkeypatch, error):
    saved = predictor.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()}

    def full(folder):
        raise error

    monkeypatch.setattr(predictor.backend, "save", full)
    with pytest.raises(ArtifactError, match=r"saved can't be written: no space left on the disk") as caught:
        predictor.save_pretrained(saved)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name: path.read_bytes() for path in saved.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_what_was_there(predictor, tmp_path, monkeypatch, error):
    saved = predictor.save_pretrained(tmp_path / "saved")
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(folder):
        (folder / "model.safetensors").write_bytes(b"half")
        raise error

    monkeypatch.setattr(predictor.backend, "save", fail)
    for name in ("saved", "new"):
        with pytest.raises(error):
            predictor.save_pretrained(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["saved"]
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_json_is_strict(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        artifact.write_json(tmp_path / "a.json", {"loss": float("nan")})
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"b\.json can't be read"):
        artifact.read_json(tmp_path / "b.json")
