"""Which engines are measured at which precision, and how each is made ready: a table, and what reads it.

    format   ours                  llama.cpp       OpenVINO               vLLM           CTranslate2      transformers
    fp32     fp32, fp32 cache      f32, f32        fp32, f32              fp32           fp32             fp32
    bf16     bf16, bf16 cache      bf16, f16       fp16, f16              bf16           bf16 or fp32     bf16
    int8     int8, int8 cache      q8_0, f16       int8, u8               w8a8, bf16     int8
    int4     int4, int8 cache      q4_0, f16       int4 groups of 32, u8  w4a16, bf16

(weights, cache.) Each stands at what its makers offer for such weights on a CPU. What a peer reads is made from the one
bf16 checkpoint by a script of `peers/`, once, and kept beside it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from turns import PEERS, Runner, plain_environment

from twofold.platforms import instruction_sets

FORMATS = ("fp32", "bf16", "int8", "int4")
BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.0, "int4": 4.5}
"""Bits of a weight of the layers; int4 with a bf16 scale for each 32."""
HEAD_BITS = {"fp32": 32.0, "bf16": 16.0, "int8": 8.0, "int4": 8.0}
DONE = ".complete"


class NotHere(Exception):
    """This engine cannot be measured here at this precision; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One engine at one precision: the converter's `--format` ("" reads the checkpoint itself) and runner's flags.

    `instructions` are those that the engine's build for this precision cannot do without.
    """

    made: str = ""
    flags: tuple[str, ...] = ()
    instructions: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One engine: its runner and converter in `peers/`, and the environments (of peers/build.py) they run in."""

    name: str
    runner: str
    home: str = ""  # "" is this very Python
    maker: str = ""
    maker_home: str = ""
    file: str = ""  # of the converted folder, when the runner wants a file
    preload: str = ""  # a library of the environment that must be there before all others
    quick_flags: tuple[str, ...] = ()
    variants: dict[str, Variant] = field(default_factory=dict)


OURS = Entry(
    name="twofold",
    runner="run_twofold.py",
    variants={
        "fp32": Variant(flags=("--set", "dtype=float32")),
        "bf16": Variant(flags=("--set", "dtype=bfloat16")),
        "int8": Variant(flags=("--set", "quantization=int8", "kv_dtype=int8")),
        "int4": Variant(flags=("--set", "quantization=int4", "kv_dtype=int8")),
    },
)
PEER_ENTRIES = (
    Entry(
        name="llama.cpp",
        runner="run_llama_cpp.py",
        home="llama_cpp",
        maker="make_gguf.py",
        maker_home="llama_cpp",
        file="model.gguf",
        variants={
            "fp32": Variant(made="f32", flags=("--kv", "f32")),
            "bf16": Variant(made="bf16", flags=("--kv", "f16")),
            "int8": Variant(made="q8_0", flags=("--kv", "f16")),
            "int4": Variant(made="q4_0", flags=("--kv", "f16")),
        },
    ),
    Entry(
        name="OpenVINO",
        runner="run_openvino.py",
        home="openvino",
        maker="make_openvino.py",
        maker_home="openvino_export",
        variants={
            "fp32": Variant(made="fp32", flags=("--kv", "f32")),
            "bf16": Variant(made="fp16", flags=("--kv", "f16")),
            "int8": Variant(made="int8", flags=("--kv", "u8")),
            "int4": Variant(made="int4", flags=("--kv", "u8")),
        },
    ),
    Entry(
        name="vLLM",
        runner="run_vllm.py",
        home="vllm",
        maker="make_vllm.py",
        maker_home="vllm",
        preload="lib/libiomp5.so",
        quick_flags=("--eager",),
        variants={
            "fp32": Variant(flags=("--dtype", "float32")),
            "bf16": Variant(flags=("--dtype", "bfloat16")),
            "int8": Variant(made="w8a8", flags=("--dtype", "bfloat16")),
            "int4": Variant(made="w4a16", flags=("--dtype", "bfloat16"), instructions=("avx512f",)),
        },
    ),
    Entry(
        name="CTranslate2",
        runner="run_ctranslate2.py",
        home="ctranslate2",
        maker="make_ctranslate2.py",
        maker_home="ctranslate2",
        variants={
            "fp32": Variant(made="float32", flags=("--compute", "float32")),
            "bf16": Variant(made="bfloat16", flags=("--compute", "bfloat16")),
            "int8": Variant(made="int8", flags=("--compute", "int8_float32")),
        },
    ),
    Entry(
        name="transformers",
        runner="transformers_static.py",
        home="transformers",
        variants={
            "fp32": Variant(flags=("--dtype", "float32")),
            "bf16": Variant(flags=("--dtype", "bfloat16")),
        },
    ),
)


@dataclass(frozen=True, kw_only=True)
class Stand:
    """Where and how all engines of a run are started. `cache_gb` is the KV cache that each may fill, `ours` fields of
    EngineConfig that win over the table's."""

    model: Path
    place: Path
    threads: int
    cache_gb: int
    quick: bool
    ours: tuple[str, ...] = ()

    def prepare(self, entry: Entry, form: str) -> Path:
        """What an engine reads at a precision, converted first when it is not yet.

        Raises:
            NotHere: no environment, no such precision, or the converter refused.
        """
        if form not in entry.variants:
            raise NotHere(f"it has no {form}")
        self._python(entry.home)
        variant = entry.variants[form]
        if absent := sorted(set(variant.instructions) - set(instruction_sets())):
            raise NotHere(f"its {form} needs {', '.join(absent)}, which this processor lacks")
        return self._converted(entry, variant) if variant.made else self.model

    def start(self, entry: Entry, form: str) -> Runner:
        """An engine's process, loading. Raises NotHere as `prepare`."""
        model, variant = self.prepare(entry, form), entry.variants[form]
        command = [self._python(entry.home), str(PEERS / entry.runner)]
        command += ["--model", str(model), "--threads", str(self.threads)]
        command += [*variant.flags, *(entry.quick_flags if self.quick else ())]
        if entry is OURS:
            command += [f"kv_cache_memory_bytes={self.cache_gb << 30}", *self.ours]
            package = str(Path(__file__).resolve().parents[1])
            paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
            return Runner(command, os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        if entry.name in ("OpenVINO", "vLLM"):
            command += ["--cache-gb", str(self.cache_gb)]
        return Runner(command, self._environment(entry))

    def _environment(self, entry: Entry) -> dict[str, str]:
        """Threads, and caches of compiled code beside the models instead of in the user's home."""
        caches = {name: str(self.model.parent / "compiled") for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR")}
        library = self.place / entry.home / entry.preload
        if entry.preload and library.is_file():
            caches["LD_PRELOAD"] = str(library)
        return plain_environment(self.threads, **caches)

    def _python(self, home: str) -> str:
        if not home:
            return sys.executable
        python = self.place / home / "bin" / "python"
        if not python.exists():
            raise NotHere(f"no environment {self.place / home}: make peers")
        return str(python)

    def _converted(self, entry: Entry, variant: Variant) -> Path:
        """What an engine reads, made once for each model: a folder, or the file in it."""
        folder = self.model.with_name(f"{self.model.name}-{entry.home}-{variant.made}")
        source = (self.model / DONE).read_text()
        if not (folder / DONE).is_file() or (folder / DONE).read_text() != source:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            command = [self._python(entry.maker_home), str(PEERS / entry.maker), "--model", str(self.model)]
            command += ["--into", str(folder), "--format", variant.made]
            print(f"  {entry.name}: writing {folder.name}", flush=True)
            done = subprocess.run(command, capture_output=True, text=True, env=plain_environment(self.threads))
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no word"]
                raise NotHere(f"{entry.maker} failed: {lines[-1][:200]}")
            (folder / DONE).write_text(source)
        return folder / entry.file if entry.file else folder
