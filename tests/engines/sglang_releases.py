"""Runs the same tests on several SGLang releases: each a folder of its own that goes first on PYTHONPATH.

    python tests/engines/sglang_releases.py --cache runs/sglang-releases
    python tests/engines/sglang_releases.py --cache runs/sglang-releases --releases 0.5.17 -- -k ranks

Run it with the Python of the environment that `make engines-sglang` makes; what a release needs beside SGLang itself is
taken from there, except what does not fit it. The first call fetches some 250 MB. Knows pip and folders.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/engines/test_sglang_http.py", "-k", "light or speaks")
_TRANSFORMERS = ("transformers==5.12.1", "tokenizers==0.22.2", "huggingface-hub==1.5.0")  # newer ones do not fit it
# of each release: what it needs in another version than the newest
RELEASES: dict[str, tuple[str, ...]] = {"0.5.20": _TRANSFORMERS, "0.5.17": _TRANSFORMERS, "0.5.14": _TRANSFORMERS}


def fetched(cache: Path, release: str) -> Path:
    """The folder of a release, filled on the first call, and when it shall hold something else."""
    folder = cache / release
    packages = [f"sglang=={release}", *RELEASES.get(release, ())]
    held = folder / ".complete"
    if not held.exists() or held.read_text(encoding="utf-8").split() != packages:
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder), "--upgrade"]
        subprocess.run([*command, *packages], check=True)
        held.write_text("\n".join(packages), encoding="utf-8")
    return folder


def main() -> int:
    """Runs the tests on each release; 1 if they fail on any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, required=True, help="folder for the releases")
    parser.add_argument("--releases", default=",".join(RELEASES), help="which ones, separated by commas")
    parser.add_argument("pytest", nargs="*", help="after --: tests and arguments of pytest instead of the usual ones")
    chosen = parser.parse_args()
    failed = []
    for release in chosen.releases.split(","):
        folder = fetched(chosen.cache.resolve(), release)
        path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
        print(f"\n=== SGLang {release}", flush=True)
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(chosen.pytest or TESTS)]
        if subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=False).returncode:
            failed.append(release)
    print(f"failed: {', '.join(failed)}" if failed else "passed on all releases")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
