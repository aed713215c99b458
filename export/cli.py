"""`mope-export` (and `mope export`): a trained predictor for other runtimes.

Knows flags and what is said of a result; the work is in `mope.export.run`, imported only when it starts.
"""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

from mope import artifact, packaged
from mope import console as terminal
from mope.backends.onnx_backend import ONNX_FOLDER, PRECISIONS, Precision, export_target
from mope.errors import ConfigError
from mope.extras import require
from mope.flags import NONE, Parser

TARGETS: dict[str, Precision] = {export_target(precision): precision for precision in PRECISIONS}
TENSORRT, TRITON = "tensorrt", "triton"

DETAILS = f"""\
Export a saved predictor to ONNX, into its folder {ONNX_FOLDER}/, beside what was exported before.

  onnx         float32, the reference; every runtime takes it
  onnx-fp16    the encoder in float16: half the file, for GPUs
  onnx-int8    int8 weights and activations: a quarter of the file, about twice as fast on CPUs
  onnx-qdq     int8 with ranges calibrated on training rows, for TensorRT
  tensorrt     TensorRT engines for the NVIDIA GPU of this machine, into the folder tensorrt/
  triton       a model repository for NVIDIA Triton, into the new folder --output; exports a graph if there is none

Each graph is checked before it appears: its form, its values against PyTorch, and the whole predictor on test rows of
the data that it was trained on. A precision that adds more than 1 % to the mean absolute error is refused. If anything
fails, nothing changes. LengthPredictor.from_pretrained(ARTIFACT, backend="onnx") then runs without torch."""
EXAMPLE = """\
{prog} runs/demo --to onnx-int8
{prog} runs/demo --to onnx-int8 --output serving/demo
{prog} runs/mine --to onnx-fp16 --data chats.jsonl --max-test-rows 500
{prog} runs/mine --to onnx --data none --json
{prog} runs/mine --to tensorrt --precision fp16
{prog} chat-small --to triton --output models"""


def main(argv: list[str] | None = None, *, prog: str = "mope-export") -> int:
    """Run the command and return its exit status."""
    return terminal.run(lambda arguments: _export(arguments, prog), argv)


def _export(argv: list[str], prog: str) -> int:
    parser = Parser(prog, DETAILS, "ARTIFACT --to FORMAT [options]", EXAMPLE.format(prog=prog))
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder of a saved predictor")
    formats = (*TARGETS, TENSORRT, TRITON)
    parser.add_argument("--to", required=True, choices=formats, metavar="FORMAT", help=", ".join(formats))
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FOLDER",
        help="write a copy for serving there, without the weights that PyTorch needs, and leave ARTIFACT as it is; for "
        "triton the model repository, a new folder",
    )
    parser.add_argument(
        "--data",
        metavar="SOURCE",
        help="data set whose test rows are predicted, as mope-train takes it (default: what the predictor was trained "
        f"on); {NONE}: measure neither quality nor latency",
    )
    parser.add_argument(
        "--max-test-rows",
        type=int,
        default=1000,
        metavar="N",
        help="test rows to predict at most, drawn at random (default: 1000)",
    )
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON on stdout")
    engines = parser.add_argument_group("TensorRT engines")
    engines.add_argument(
        "--precision",
        choices=("fp32", "fp16", "qdq"),
        help="graphs that the engines are built from, exported first if they are not there (default: fp16)",
    )
    engines.add_argument(
        "--hardware-compatibility",
        choices=("none", "ampere_plus"),
        help="ampere_plus: engines that run on other GPUs since Ampere, too, somewhat slower (default: none)",
    )
    engines.add_argument(
        "--version-compatible", action="store_true", help="engines that later versions of TensorRT can run"
    )
    triton = parser.add_argument_group("Triton model repository")
    triton.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where Triton runs the model; cuda: on each GPU, in fp16 (default: cpu)",
    )
    arguments = parser.parse_args(argv)
    if arguments.max_test_rows < 2:
        raise ConfigError(f"--max-test-rows: got {arguments.max_test_rows}; expected at least 2")

    for target, flags in (
        (TENSORRT, ("precision", "hardware_compatibility", "version_compatible")),
        (TRITON, ("device",)),
    ):
        for flag in flags:
            if arguments.to != target and getattr(arguments, flag):
                raise ConfigError(f"--{flag.replace('_', '-')} goes with --to {target}; got --to {arguments.to}")

    arguments.artifact = packaged.located(arguments.artifact)
    if arguments.to == TRITON:
        return _export_repository(arguments)
    if arguments.to != TENSORRT:
        artifact.check_weights(arguments.artifact, artifact.check(arguments.artifact), prog)
    require("torch", "mope-export")
    if arguments.to == TENSORRT:
        return _export_engines(arguments)

    from mope.export.run import export_onnx

    precision = TARGETS[arguments.to]
    manifest = export_onnx(
        arguments.artifact,
        precision,
        data=arguments.data,
        max_test_rows=arguments.max_test_rows,
        output=arguments.output,
    )
    if arguments.json:
        print(json.dumps(manifest, indent=2))
    for line in summary(arguments.output or arguments.artifact, manifest, precision):
        terminal.console().print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def _export_engines(arguments: Namespace) -> int:
    from mope.export.run import export_engines

    if arguments.output is not None:
        raise ConfigError("--output goes with ONNX graphs; engines belong to one GPU: they are built beside them")
    manifest = export_engines(
        arguments.artifact,
        arguments.precision or "fp16",
        data=arguments.data,
        max_test_rows=arguments.max_test_rows,
        hardware_compatibility=arguments.hardware_compatibility or "none",
        version_compatible=arguments.version_compatible,
    )
    if arguments.json:
        print(json.dumps(manifest, indent=2))
    for engine in manifest["engines"]:
        terminal.console().print(
            f"{arguments.artifact / TENSORRT / engine['file']}: {engine['bytes'] / 1e6:.1f} MB", highlight=False
        )
    return 0


def _export_repository(arguments: Namespace) -> int:
    from mope.export.triton import export_triton

    if arguments.output is None:
        raise ConfigError(f"--to {TRITON} writes a model repository; say where: --output FOLDER")
    manifest = export_triton(
        arguments.artifact,
        arguments.output,
        device=arguments.device or "cpu",
        data=arguments.data,
        max_test_rows=arguments.max_test_rows,
    )
    if arguments.json:
        print(json.dumps(manifest, indent=2))
    readme = arguments.output / "README.md"
    line = f"{readme} says how to start Triton: tritonserver --model-repository={arguments.output}"
    terminal.console().print(line, highlight=False, markup=False, soft_wrap=True)
    return 0


def summary(folder: Path, manifest: dict[str, Any], precision: Precision) -> list[str]:
    """What an export made and measured, in a few lines."""
    lines = [
        f"{folder / ONNX_FOLDER / graph['file']}: {graph['bytes'] / 1e6:.1f} MB, opset {graph['opset']}, differs from "
        f"PyTorch by at most {graph['max_difference']:.1g} on random inputs"
        for graph in manifest["graphs"]
        if graph["precision"] == precision
    ]
    if quality := manifest["quality"][precision]:
        cost = quality["mae"] / quality["mae_fp32"] - 1 if quality["mae_fp32"] else 0.0
        lines.append(
            f"on {quality['num_rows']:,} test rows of {quality['data']} (PyTorch in brackets): mean absolute error "
            f"{quality['mae']:.2f} tokens ({quality['mae_fp32']:.2f}; {cost:+.2%}), Kendall's tau {quality['tau']:.4f} "
            f"({quality['tau_fp32']:.4f}), {quality['coverage_90']:.1%} up to the 90 % quantile "
            f"({quality['coverage_90_fp32']:.1%}), {quality['same_expert']:.1%} routed alike"
        )
    if latency := manifest["latency"][precision]:
        times = ", ".join(f"{name} {latency[f'{name}_ms']:.2f} ms" for name in ("p50", "p90", "p99"))
        lines.append(
            f"latency of a request, tokenising included: {times} ({latency['num_requests']} test requests one by one, "
            f"{latency['num_threads']} thread, {latency['cpu'] or 'unknown CPU'})"
        )
    return lines
