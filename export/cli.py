"""`mope-export` (and `mope export`): a trained predictor for other runtimes.

Knows flags; the work is in `mope.export.run`, imported only when it starts.
"""

from __future__ import annotations

import json
from pathlib import Path

from mope import console as terminal
from mope.flags import Parser

TARGETS = ("onnx",)


def main(argv: list[str] | None = None, *, prog: str = "mope-export") -> int:
    """Run the command and return its exit status."""
    return terminal.run(lambda arguments: _export(arguments, prog), argv)


def _export(argv: list[str], prog: str) -> int:
    parser = Parser(
        prog,
        "Export a saved predictor: the graphs are checked against PyTorch and put into its folder onnx/.\n"
        'LengthPredictor.from_pretrained(ARTIFACT, backend="onnx") then runs without torch.',
        "ARTIFACT --to onnx [options]",
        f"{prog} runs/demo --to onnx",
    )
    parser.add_argument("artifact", metavar="ARTIFACT", type=Path, help="folder of a saved predictor")
    parser.add_argument("--to", required=True, choices=TARGETS, help="onnx: float32, standard operators of opset 20")
    parser.add_argument("--json", action="store_true", help="print the manifest as JSON on stdout")
    arguments = parser.parse_args(argv)

    from mope.export.run import export_onnx

    manifest = export_onnx(arguments.artifact)
    if arguments.json:
        print(json.dumps(manifest, indent=2))
    for graph in manifest["graphs"]:
        terminal.console().print(
            f"{arguments.artifact}/onnx/{graph['file']}: {graph['bytes'] / 1e6:.1f} MB, opset {graph['opset']}, "
            f"differs from PyTorch by at most {graph['max_difference']:.1g}",
            highlight=False,
            soft_wrap=True,
        )
    return 0
