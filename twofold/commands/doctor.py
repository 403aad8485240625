"""`twofold doctor`: what this machine offers, what is missing, and what that costs."""

from __future__ import annotations

import importlib.metadata
import platform as python_platform
from collections.abc import Iterator

from ..kernels import native
from ..platforms import Compiler, Platform, current, find_compiler
from .bytes import human

NEEDED = (
    "torch",
    "numpy",
    "safetensors",
    "tokenizers",
    "llguidance",
    "jinja2",
    "starlette",
    "uvicorn",
    "httptools",
    "uvloop",
    "llguidance",
    "msgspec",
    "prometheus-client",
    "psutil",
    "rich",
)

# What Twofold runs without, and what going without costs.
USEFUL = {
    "transformers": "`twofold bench throughput` has no peer to measure against, and the parity tests cannot run",
    "openai": "the end-to-end tests of the API cannot run; the server itself does not need it",
}


def doctor() -> int:
    machine, compiler, versions = current(), find_compiler(), installed()
    for name, value in facts(machine, compiler, versions):
        print(f"{name:<20}{value}")
    found = list(missing(machine, compiler, versions))
    print("\nmissing" if found else "\nnothing is missing")
    for what, cost in found:
        print(f"  {what}: {cost}")
    return 0


def installed() -> dict[str, str | None]:
    """Versions of the packages that matter, None for those that are not installed."""
    versions: dict[str, str | None] = {}
    for name in (*NEEDED, *USEFUL):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def facts(machine: Platform, compiler: Compiler | None, versions: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """Name and value of each thing that was found."""
    memory = machine.memory
    yield "platform", f"{machine.name} ({python_platform.system()} {python_platform.machine()})"
    yield "processor", f"{machine.processor}, {machine.cores} cores for this process"
    yield "instructions", f"{' '.join(machine.instructions) or 'unknown'}; torch uses {machine.capability}"
    yield "memory", f"{human(memory.total)} for this process, {human(memory.available)} free; limit: {memory.limit}"
    yield "accelerators", ", ".join(machine.accelerators) or "none"
    yield "compiler", f"{compiler.version} ({compiler.path})" if compiler else "none"
    library, why = native.state()
    yield "cpu kernels", f"built for {library.isa} ({library.path})" if library else f"none: {why}"
    yield "python", python_platform.python_version()
    for name, version in versions.items():
        if version is not None:
            yield name, version


def missing(machine: Platform, compiler: Compiler | None, versions: dict[str, str | None]) -> Iterator[tuple[str, str]]:
    """Each thing that is not here, and what that costs."""
    for name in NEEDED:
        if versions[name] is None:
            yield name, "Twofold does not run without it; `make setup` installs it"
    for name, cost in USEFUL.items():
        if versions[name] is None:
            yield name, cost
    if compiler is None:
        yield "a C++ compiler", "kernels of your own cannot be built, nor Twofold's anew; install g++ or clang++"
    if native.library() is None:
        yield "CPU kernels", native.COST
    if machine.instructions and not {"avx2", "asimd"} & set(machine.instructions):
        yield "AVX2", "torch falls back to scalar code: several times slower"
    if not {"avx512_bf16", "amx_bf16", "bf16"} & set(machine.instructions):
        yield "bf16 instructions", "--dtype bfloat16 halves the memory of weights but computes slower than float32"
    if machine.accelerators:
        yield "kernels for the accelerator", "this version computes on the CPU; the device stays idle"
    if machine.memory.available < 2**30:
        yield "free memory", f"only {human(machine.memory.available)} left: `twofold plan` says which model fits"
    if machine.cores == 1:
        yield "a second core", "the server and the model's process share one core: latency suffers under load"
