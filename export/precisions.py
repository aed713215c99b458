"""ONNX graphs of less precision than the network was trained in: fp16, dynamic int8, and int8 for TensorRT (QDQ).

What is reduced is the trunk, which is nearly all of the work. Gate and heads stay in float32 everywhere: they are
small, and their softplus and exp are sensitive. Networks of the separate design are treated alike, the gate among
them: in the shared design, gate and look-up read a quantised trunk, too, and a route that flips does so where two
experts are about equally right. What that costs is not guessed but measured, end to end, in `quality`.

Knows networks and graphs; not artifacts, manifests or whether a graph is good enough.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mope.backends.network import MopeNetwork
from mope.backends.onnx_backend import EMBEDDING, INPUTS
from mope.backends.static_encoder import StaticEncoder
from mope.errors import ExportError
from mope.export.graphs import hushed, write_graph
from mope.extras import require
from mope.grid import Array

# one batch as the network reads it: ids (B, S), mask (B, S), numbers (B, F), target LLM (B,)
Inputs = tuple[Array, Array, Array, Array]


def write_fp16(network: MopeNetwork, path: Path, max_tokens: int) -> None:
    """Write a network with its encoder in float16; the mean over tokens, gate, heads and outputs are float32.

    Args:
        network: its encoder is changed to float16; give one of its own.
        path: of the file.
        max_tokens: widest input, in tokens.
    """
    network.encoder.half()
    write_graph(network, path, max_tokens)


def write_int8(network: MopeNetwork, fp32_path: Path, path: Path) -> None:
    """Quantise a float32 graph for CPUs: int8 weights per channel, activations as they come (dynamic).

    The token embedding table, a large part of a small encoder's file, becomes int8, too, with a scale per token. There
    is one scale for the activations of a whole batch, so that a request's numbers depend a little on what it is batched
    with; not so where the trunk is a table, whose filters stay in float32: they are small, and in int8 a request
    alone took as long.

    Args:
        network: what the graph was written from.
        fp32_path: a graph that `write_graph` wrote.
        path: of the file.

    Raises:
        ExportError: the graph has no encoder to quantise.
    """
    onnx = require("onnx", "mope-export")
    quantization = require("onnxruntime.quantization", "mope-export")
    tables, products = _trunk(fp32_path)
    if isinstance(network.encoder, StaticEncoder):
        model = onnx.load(fp32_path, load_external_data=False)
    else:
        with hushed():
            quantization.quantize_dynamic(
                fp32_path,
                path,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
                op_types_to_quantize=["MatMul"],
                nodes_to_quantize=products,
            )
        model = onnx.load(path, load_external_data=False)
    _quantise_tables(model.graph, tables)
    onnx.save(model, path)


def write_qdq(fp32_path: Path, path: Path, calibration: Sequence[Inputs]) -> None:
    """Quantise a float32 graph for TensorRT: pairs of QuantizeLinear and DequantizeLinear, symmetric int8.

    Weights have a scale per channel and stay float32 in the file, behind a pair of their own, since that is what
    TensorRT reads; it does not take the asymmetric uint8 that ONNX Runtime would choose.

    Args:
        fp32_path: a graph that `write_graph` wrote.
        path: of the file.
        calibration: batches of real training rows; they give the ranges of the activations.

    Raises:
        ExportError: the graph has no encoder to quantise.
    """
    quantization = require("onnxruntime.quantization", "mope-export")
    _, products = _trunk(fp32_path)
    if not products:
        raise ExportError(
            f"{fp32_path.name}: its trunk is a table without products, which QDQ would quantise; export as onnx-int8"
        )
    with hushed():
        quantization.quantize_static(
            fp32_path,
            path,
            _reader(quantization, calibration),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QInt8,
            weight_type=quantization.QuantType.QInt8,
            per_channel=True,
            nodes_to_quantize=products,
            extra_options={
                "ActivationSymmetric": True,
                "WeightSymmetric": True,
                "AddQDQPairToWeight": True,
                "QuantizeBias": False,
                # a product's sum is kept as it is: rounding it to 8 bits, too, raised the error by 3 % instead of 0.6 %
                "OpTypesToExcludeOutputQuantization": ["MatMul"],
            },
        )


def _quantise_tables(graph: Any, names: Collection[str]) -> None:
    """Make look-ups in tables of vectors int8, each row by its own largest value; they give float32 as before.

    ONNX Runtime's quantiser has one scale for a whole table, which its few longest rows make coarse for all others.
    """
    onnx = require("onnx", "mope-export")
    nodes = []
    for node in graph.node:
        if node.name not in names:
            nodes.append(node)
            continue
        table = next(tensor for tensor in graph.initializer if tensor.name == node.input[0])
        rows_VD = onnx.numpy_helper.to_array(table)
        scales_V1 = np.abs(rows_VD).max(axis=1, keepdims=True) / 127
        scales_V1[scales_V1 == 0] = 1.0
        rounded_VD = np.round(rows_VD / scales_V1).astype(np.int8)
        out, ids = node.output[0], node.input[1]
        graph.initializer.remove(table)
        for name, values in ((f"{table.name}_quantized", rounded_VD), (f"{table.name}_scale", scales_V1)):
            graph.initializer.append(onnx.numpy_helper.from_array(values, name))
        for op, inputs, output, more in (
            ("Gather", [f"{table.name}_quantized", ids], f"{out}_quantized", {}),
            ("Gather", [f"{table.name}_scale", ids], f"{out}_scale", {}),
            ("Cast", [f"{out}_quantized"], f"{out}_cast", {"to": onnx.TensorProto.FLOAT}),
            ("Mul", [f"{out}_cast", f"{out}_scale"], out, {}),
        ):
            nodes.append(onnx.helper.make_node(op, inputs, [output], name=f"{output}_of_{node.name}", **more))
    del graph.node[:]
    graph.node.extend(nodes)


def _reader(quantization: Any, calibration: Sequence[Inputs]) -> Any:
    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        batches = iter(calibration)

        def get_next(self) -> dict[str, Array] | None:
            batch = next(self.batches, None)
            return None if batch is None else dict(zip(INPUTS, batch, strict=True))

    return Reader()


def _trunk(path: Path) -> tuple[list[str], list[str]]:
    """Names of the encoder's nodes that are worth quantising: token tables, and products with weights.

    A static trunk is a table alone. The encoder is what the text's embedding is computed from; gate and heads are not
    among that.
    """
    onnx = require("onnx", "mope-export")
    graph = onnx.load(path, load_external_data=False).graph
    weights = {tensor.name for tensor in graph.initializer}
    makers = {output: node for node in graph.node for output in node.output}
    encoder: dict[str, Any] = {}
    wanted = [EMBEDDING]
    while wanted:
        node = makers.get(wanted.pop())
        if node is not None and node.name not in encoder:
            encoder[node.name] = node
            wanted += node.input
    tables = [
        name
        for name, node in encoder.items()
        if node.op_type == "Gather" and node.input[0] in weights and node.input[1] == INPUTS[0]
    ]
    products = [name for name, node in encoder.items() if node.op_type == "MatMul" and node.input[1] in weights]
    if not tables:
        raise ExportError(f"{path.name}: no table of token vectors was found to quantise; export in fp32 or fp16")
    return tables, products
