"""A clean environment serves: `python tests/check_serving.py ARTIFACT` where `pip install 'mope-llm[onnx]'` was all.

Loads an exported predictor with its weights left out, predicts for real text, and fails if torch is there, if the
process needs more than 200 MB, or if loading takes more than half a second (the best of three, in fresh processes).
Standard library alone at the top, so that importing mope is part of what is timed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec

MAX_MB, MAX_LOAD_S = 200.0, 0.5
CHILD = """
import json, sys, time
started = time.perf_counter()
from mope import LengthPredictor
imported = time.perf_counter()
predictor = LengthPredictor.from_pretrained(sys.argv[1])
loaded = time.perf_counter()
history = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello! " * 9}]
later = {"prompt": "In one sentence?", "history": history, "max_tokens": 64}
prompts = ["Explain TCP slow start.", later, "\\U0001f600" * 999]
medians = [predictor.predict_batch([prompt])[0].median for prompt in prompts]
with open("/proc/self/status") as status:
    kilobytes = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
print(json.dumps({
    "backend": predictor.backend.name, "reason": predictor.backend_reason, "medians": medians,
    "import_s": imported - started, "load_s": loaded - imported, "rss_mb": kilobytes * 1024 / 1e6,
    "torch": "torch" in sys.modules,
}))
"""


def main(artifact: str) -> int:
    """Check, and print what was measured."""
    if find_spec("torch") or find_spec("transformers"):
        print("error: torch or transformers is installed; this check is for an environment without", file=sys.stderr)
        return 1
    command = [sys.executable, "-c", CHILD, artifact]
    runs = [json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout) for _ in range(3)]
    found = min(runs, key=lambda run: run["load_s"])
    print(json.dumps(found, indent=2))
    assert found["backend"] == "onnx", found
    assert all(1 <= median < 100_000 for median in found["medians"]), found
    assert found["rss_mb"] <= MAX_MB, f"{found['rss_mb']:.0f} MB resident; at most {MAX_MB:.0f}"
    assert found["load_s"] <= MAX_LOAD_S, f"loading took {found['load_s']:.2f} s; at most {MAX_LOAD_S}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
