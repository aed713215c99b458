"""Graphs that need more than their own bytes, or run for ever, are refused before ONNX Runtime sees them."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from mope import LengthPredictor
from mope.backends.onnx_scan import check_graph
from mope.errors import ArtifactError
from mope.packaged import PREDICTORS

GRAPH = PREDICTORS / "chat-micro" / "onnx" / "model.int8.onnx"
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def whole() -> onnx.ModelProto:
    return onnx.load(GRAPH)


def value(name: str, shape: list[int] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, FLOAT, shape)


def external(location: str) -> onnx.TensorProto:
    """A tensor whose data lies in another file."""
    tensor = TensorProto(name="outside", data_type=FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, said in (("location", location), ("length", "8")):
        tensor.external_data.add(key=key, value=said)
    return tensor


def body() -> onnx.GraphProto:
    one = helper.make_tensor("one", FLOAT, [1], [1.0])
    return helper.make_graph([helper.make_node("Identity", ["one"], ["o"])], "inner", [], [value("o", [1])], [one])


def as_initializer(model: onnx.ModelProto) -> None:
    model.graph.initializer.append(external("/etc/passwd"))


def as_sparse_initializer(model: onnx.ModelProto) -> None:
    indices = numpy_helper.from_array(np.array([0, 1], np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(external("../../secret.txt"), indices, [5]))


def as_attribute(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Constant", [], ["c"], value=external("weights.bin")))


def as_list_of_tensors(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("many", [external("/dev/zero")]))


def located_elsewhere(model: onnx.ModelProto) -> None:
    del (tensor := external("x")).external_data[:]
    model.graph.initializer.append(tensor)


def named_but_not_located(model: onnx.ModelProto) -> None:
    (tensor := external("x")).data_location = TensorProto.DEFAULT
    model.graph.initializer.append(tensor)


def inside_a_branch(model: onnx.ModelProto) -> None:
    (inner := body()).initializer.append(external("/etc/passwd"))
    model.graph.node.insert(0, helper.make_node("If", ["condition"], ["c"], then_branch=inner, else_branch=body()))


def inside_a_function(model: onnx.ModelProto) -> None:
    nodes = [helper.make_node("Constant", [], ["o"], value=external("/etc/passwd"))]
    model.functions.append(helper.make_function("mine", "F", [], ["o"], nodes, [helper.make_opsetid("", 20)]))


def in_training(model: onnx.ModelProto) -> None:
    model.training_info.add().initialization.initializer.append(external("/etc/passwd"))


def endless(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("Loop", ["trips", "condition"], [], body=body()))


def with_graphs(model: onnx.ModelProto) -> None:
    model.graph.node[0].attribute.append(helper.make_attribute("many", [body()]))


def of_somebody(model: onnx.ModelProto) -> None:
    model.graph.node.insert(0, helper.make_node("EvilOp", [], ["c"], domain="com.evil"))


CHANGES: dict[Callable[[onnx.ModelProto], None], str] = {
    as_initializer: "external data",
    as_sparse_initializer: "external data",
    as_attribute: "external data",
    as_list_of_tensors: "external data",
    located_elsewhere: "external data",
    named_but_not_located: "external data",
    inside_a_branch: "graphs? inside",
    inside_a_function: "functions",
    in_training: "training",
    endless: "graphs? inside",
    with_graphs: "graphs? inside",
    of_somebody: "operators that are not standard ones",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_no_export_has_is_refused(
    whole: onnx.ModelProto, tmp_path: Path, change: Callable[[onnx.ModelProto], None]
) -> None:
    (model := onnx.ModelProto()).CopyFrom(whole)
    change(model)
    with pytest.raises(ArtifactError, match=CHANGES[change]):
        check_graph(model.SerializeToString(), "graph")
    folder = Path(shutil.copytree(GRAPH.parent.parent, tmp_path / "copy"))
    graph, manifest = folder / "onnx" / GRAPH.name, folder / "onnx" / "manifest.json"
    graph.write_bytes(model.SerializeToString())
    said = json.loads(manifest.read_text())
    said["graphs"][0]["sha256"] = hashlib.sha256(graph.read_bytes()).hexdigest()
    manifest.write_text(json.dumps(said))
    with pytest.raises(ArtifactError, match=CHANGES[change]):
        LengthPredictor.from_pretrained(folder)


def test_packaged_graphs_pass() -> None:
    for path in PREDICTORS.glob("*/onnx/*.onnx"):
        check_graph(path.read_bytes(), path.name)


@pytest.mark.parametrize(
    "content",
    [b"", b"\0", b"\xff" * 20, b"PK" + b"\0" * 1000, b"\x08\0\0\0ORTM" + b"\xff" * 500, b"\x3a\x05ab", b"\x0b\x0c"],
)
def test_what_is_no_graph_is_refused(content: bytes) -> None:
    with pytest.raises(ArtifactError, match="is no ONNX graph"):
        check_graph(content, "graph")


def test_any_bytes_are_passed_or_refused_in_one_line(whole: onnx.ModelProto) -> None:
    rng = random.Random(0)
    (small := onnx.ModelProto()).CopyFrom(whole)
    del small.graph.initializer[:]
    content = small.SerializeToString()
    said = set()
    for _ in range(500):
        changed = bytearray(content)
        for _ in range(rng.randrange(1, 10)):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        try:
            check_graph(bytes(changed[: rng.choice([None, rng.randrange(len(changed))])]), "graph")
        except ArtifactError as error:
            said.add(str(error))
    assert "graph is no ONNX graph; copy the whole folder again" in said
    assert all(message.isprintable() for message in said)


def test_external_data_is_found_wherever_a_field_is_put(whole: onnx.ModelProto) -> None:
    """Numbers may be written in more bytes than they need, and messages in parts: neither hides a tensor."""

    def field(number: int, content: bytes, padding: int = 0) -> bytes:
        def varint(value: int, least: int) -> bytes:
            parts = [value & 127]
            while (value := value >> 7) or len(parts) < least:
                parts.append(value & 127)
            return bytes(part | 128 for part in parts[:-1]) + bytes(parts[-1:])

        return varint(number << 3 | 2, padding) + varint(len(content), padding) + content

    tensor = external("/etc/passwd").SerializeToString()
    for padding in (0, 3, 5):
        hidden = field(7, field(5, tensor, padding), padding)
        for content in (whole.SerializeToString() + hidden, hidden + whole.SerializeToString()):
            assert any(one.name == "outside" for one in onnx.load_from_string(content).graph.initializer)
            with pytest.raises(ArtifactError, match="external data"):
                check_graph(content, "graph")
