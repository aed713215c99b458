"""Lets SGLang's wheels run on a machine without CUDA: put this folder on PYTHONPATH, so that its processes have it too.

What is missing there is a torchvision that can be imported, Triton, and the kernels of `sgl_kernel`. SGLang takes its
plain PyTorch paths for all that a small Llama needs (`SGLANG_USE_CPU_ENGINE=1`), so names that can be imported are
enough. Prepares an import just before it happens; finds no module by itself. Brings the faults that a test asks for.
"""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace


class _Prepare(MetaPathFinder):
    """Called for each import first; always leaves it to the others."""

    looking = False

    def find_spec(self, name, path=None, target=None):
        if self.looking:
            return None
        if name == "torchvision":
            _declare_operators()
        elif name == "mope.serving_hooks.sglang.hooks" and os.environ.get("MOPE_TEST_FAULT"):
            import faults

            faults.bring(os.environ["MOPE_TEST_FAULT"])
        elif name == "sglang" and name not in sys.modules:
            self.looking = True
            try:
                if find_spec("triton") is None:
                    _stand_in_for_triton()
            finally:
                self.looking = False
        return None


def _declare_operators():
    """The operators that torchvision's own library would have brought, which needs CUDA."""
    import torch

    if not hasattr(torch, "_declared_for_torchvision"):
        library = torch.library.Library("torchvision", "DEF")
        for operator in ("nms", "qnms"):
            library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        torch._declared_for_torchvision = library  # it would go away with the object


def _stand_in_for_triton():
    """SGLang's own stand-in for Triton, which it uses on macOS alone."""
    import torch

    # releases before 0.5.20 have none: then that of a newer one further down the path
    places = (Path(folder) / "sglang" / "_platform_stubs.py" for folder in sys.path)
    stand_ins = next((place for place in places if place.exists()), None)
    if stand_ins is None:
        return
    spec = spec_from_file_location("_sglang_platform_stand_ins", stand_ins)
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)
    module.platform = SimpleNamespace(machine=lambda: "arm64")
    module._patch_non_blocking = lambda: None
    platform, available = sys.platform, torch.backends.mps.is_available
    sys.platform, torch.backends.mps.is_available = "darwin", lambda: True
    try:
        module.install_platform_stubs()
    finally:
        sys.platform, torch.backends.mps.is_available = platform, available


sys.meta_path.insert(0, _Prepare())
