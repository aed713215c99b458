"""From a network to an ONNX graph, and the proof that both say the same.

Standard operators of opset 20 alone, any batch and any width, so that every runtime takes the file. Knows networks and
graphs; not artifacts or manifests. Graphs of less precision are made in `precisions`, and checked here.

Shape suffixes: B requests, S tokens, F numbers.
"""

from __future__ import annotations

import contextlib
import io
import logging
import math
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mope.backends.network import MopeNetwork
from mope.backends.onnx_backend import EMBEDDING, GATE, HEADS, INPUTS
from mope.backends.onnx_scan import check_graph
from mope.backends.static_encoder import StaticEncoder
from mope.errors import ArtifactError, ExportError
from mope.extras import require

OPSET = 20
MAX_BATCH = 256
# of probabilities, and of embeddings relative to their largest entry. A MiniLM in fp16 differs by 1e-3, an encoder
# of more layers by a multiple of that; what int8 costs is seen on real rows alone
TOLERANCES = {"fp32": 1e-4, "fp16": 2e-2, "int8": math.inf, "qdq": math.inf}


class _Outputs(nn.Module):
    """A network whose outputs are those that it has, without None."""

    def __init__(self, network: MopeNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids_BS: Tensor, attention_mask_BS: Tensor, numbers_BF: Tensor, llm_B: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = self.network(input_ids_BS, attention_mask_BS, numbers_BF, llm_B)
        return tuple(output for output in outputs if output is not None)


def output_names(network: MopeNetwork) -> list[str]:
    """Names of a graph's outputs, in order."""
    return [*([GATE] if network.gate is not None else []), *([HEADS] if len(network.heads) else []), EMBEDDING]


def sample_inputs(network: MopeNetwork, lengths: Sequence[int], seed: int = 0) -> tuple[Tensor, ...]:
    """Random token ids of the given lengths, padded, with mask, numbers and target LLMs."""
    rng = torch.Generator().manual_seed(seed)
    mask_BS = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    vocabulary, num_llms = network.encoder.config.vocab_size, network.llm.num_embeddings
    ids_BS = torch.randint(0, vocabulary, mask_BS.shape, generator=rng) * mask_BS
    numbers_BF = network.number_mean + 3 * torch.randn(len(lengths), len(network.number_mean), generator=rng)
    return ids_BS, mask_BS, numbers_BF, torch.randint(0, num_llms, (len(lengths),), generator=rng)


def write_graph(network: MopeNetwork, path: Path, max_tokens: int) -> None:
    """Write a network as one ONNX file.

    Args:
        network: changed to plain attention, which gives the graph that every parser takes; give one of its own.
        path: of the file.
        max_tokens: widest input, in tokens.
    """
    require("onnxscript", "mope-export")
    encoder = network.eval().encoder
    if not isinstance(encoder, StaticEncoder):
        encoder.set_attn_implementation("eager")
    batch, tokens = torch.export.Dim("batch", min=1, max=MAX_BATCH), torch.export.Dim("tokens", min=2, max=max_tokens)
    with hushed():
        torch.onnx.export(
            _Outputs(network),
            sample_inputs(network, (7, 4, 9)),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=list(INPUTS),
            output_names=output_names(network),
            external_data=False,
            dynamic_shapes={
                "input_ids_BS": {0: batch, 1: tokens},
                "attention_mask_BS": {0: batch, 1: tokens},
                "numbers_BF": {0: batch},
                "llm_B": {0: batch},
            },
        )
    _strip(path)


def _strip(path: Path) -> None:
    """Take the exporter's notes out of a graph: they hold stack traces with the paths of this machine."""
    onnx = require("onnx", "mope-export")
    model = onnx.load(path, load_external_data=False)
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
    onnx.save(model, path)


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Without the exporter's own progress, and the words of exporter and quantiser on what nobody needs here."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx._internal.exporter._registration")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def check_form(path: Path, network: MopeNetwork) -> None:
    """Check a graph by ONNX's own checker, and its operators, opset, names, types and axes.

    Raises:
        ExportError: something is not as it should be.
    """
    onnx = require("onnx", "mope-export")
    model = onnx.load(path, load_external_data=False)
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(f"{path.name}: {error}") from error
    foreign = sorted({node.domain for node in model.graph.node} - {"", "ai.onnx"})
    if foreign:
        raise ExportError(f"{path.name} has operators of {', '.join(foreign)}; expected standard ones alone")
    try:
        check_graph(path.read_bytes(), path.name)  # as it is checked where it is loaded
    except ArtifactError as error:
        raise ExportError(str(error)) from error
    opsets = [opset.version for opset in model.opset_import if opset.domain in ("", "ai.onnx")]
    if opsets != [OPSET]:
        raise ExportError(f"{path.name} has opset {opsets}; expected {OPSET}")
    found = {tensor.name: _form(tensor) for tensor in (*model.graph.input, *model.graph.output)}
    expected = _forms(network)
    if list(found) != list(expected):
        raise ExportError(f"{path.name} has the tensors {', '.join(found)}; expected {', '.join(expected)}")
    for name, form in found.items():
        if form != expected[name]:
            raise ExportError(f"{path.name}: {name} is {form}; expected {expected[name]}")


def _form(tensor: Any) -> str:
    """Element type and axes of a graph's input or output, such as `FLOAT (batch, 52)`."""
    onnx = require("onnx", "mope-export")
    kind = tensor.type.tensor_type
    axes = ", ".join(axis.dim_param or str(axis.dim_value) for axis in kind.shape.dim)
    return f"{onnx.TensorProto.DataType.Name(kind.elem_type)} ({axes})"


def _forms(network: MopeNetwork) -> dict[str, str]:
    """What `_form` should say of each input and output of a network's graph; float32 outside in every precision."""
    with torch.inference_mode():
        outputs = _Outputs(network.eval())(*sample_inputs(network, (2,)))
    text = "INT64 (batch, tokens)"
    inputs = (text, text, f"FLOAT (batch, {len(network.number_mean)})", "INT64 (batch)")
    sizes = (", ".join(map(str, output.shape[1:])) for output in outputs)
    return {
        **dict(zip(INPUTS, inputs, strict=True)),
        **{name: f"FLOAT (batch, {size})" for name, size in zip(output_names(network), sizes, strict=True)},
    }


def check_values(path: Path, network: MopeNetwork, max_tokens: int, tolerance: float) -> float:
    """Compare a graph in ONNX Runtime with the network in PyTorch, over lengths, batches and padding.

    Args:
        path: the graph.
        network: what it was made of, untouched by `write_graph`.
        max_tokens: widest input.
        tolerance: largest difference allowed, of `TOLERANCES`.

    Returns:
        The largest difference of a probability, or of an embedding's entry relative to the largest one.

    Raises:
        ExportError: it is above the tolerance, or not a number, or the shapes differ.
    """
    runtime = require("onnxruntime", "mope-export")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    widths = sorted({2, 3, 8, max_tokens // 4, max_tokens // 2, max_tokens})
    cases = [*([width] for width in widths), widths, [max_tokens] * 3, [2] * 33]
    worst = 0.0
    for seed, lengths in enumerate(cases):
        inputs = sample_inputs(network, lengths, seed)
        with torch.inference_mode():
            expected = _Outputs(network.eval())(*inputs)
        found = session.run(None, {name: value.numpy() for name, value in zip(INPUTS, inputs, strict=True)})
        for name, one, other in zip(output_names(network), expected, found, strict=True):
            if other.shape != one.shape:
                raise ExportError(f"{path.name}: {name} has shape {other.shape}; expected {tuple(one.shape)}")
            difference = _difference(name, one, torch.from_numpy(other))
            if not difference <= tolerance:
                raise ExportError(
                    f"{path.name}: {name} differs from PyTorch by {difference:.2g} on inputs of {lengths} tokens; "
                    f"at most {tolerance:g} is allowed"
                )
            worst = max(worst, difference)
    return worst


def _difference(name: str, one: Tensor, other: Tensor) -> float:
    if name == EMBEDDING:
        return float((one - other).abs().max() / one.abs().max().clamp(min=1e-12))
    return float(np.abs(torch.softmax(one, -1).numpy() - torch.softmax(other, -1).numpy()).max())
