"""Writes a checkpoint as OpenVINO reads it: fp32, fp16, int8, or int4 in groups.

    python benchmarks/peers/make_openvino.py --model DIR --into DIR --format fp32|fp16|int8|int4 [--group 32]

optimum-intel writes the graph, nncf compresses its weights, rounding to nearest. int8 is OpenVINO's own (asymmetric, a
scale for each output); int4 is symmetric in groups, table and head in int8, its default. Needs openvino-tokenizers too.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

MODEL = "openvino_model.xml"


def export(model: Path, into: Path, dtype: str) -> None:
    """The checkpoint's graph with a cache inside, and its tokenizer as graphs."""
    import openvino
    from openvino_tokenizers import convert_tokenizer
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig
    from transformers import AutoTokenizer

    task = "text-generation-with-past"
    main_export(str(model), output=into, task=task, ov_config=OVConfig(dtype=dtype), stateful=True)
    there_and_back = convert_tokenizer(AutoTokenizer.from_pretrained(model), with_detokenizer=True)
    for graph, name in zip(there_and_back, ("openvino_tokenizer", "openvino_detokenizer"), strict=True):
        openvino.save_model(graph, into / f"{name}.xml")


def compress(folder: Path, kind: str, group: int) -> None:
    """Replace a folder's model by one with compressed weights."""
    import nncf
    import openvino

    modes = nncf.CompressWeightsMode
    how = {"mode": modes.INT8_ASYM} if kind == "int8" else {"mode": modes.INT4_SYM, "group_size": group, "ratio": 1.0}
    small = nncf.compress_weights(openvino.Core().read_model(folder / MODEL), **how)
    with tempfile.TemporaryDirectory(dir=folder) as aside:  # the old file is open for as long as its graph is
        openvino.save_model(small, Path(aside) / MODEL, compress_to_fp16=False)
        for file in Path(aside).iterdir():
            file.replace(folder / file.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--format", choices=("fp32", "fp16", "int8", "int4"), required=True)
    parser.add_argument("--group", type=int, default=32, help="of int4, along the inputs (default: 32)")
    args = parser.parse_args()
    export(args.model, args.into, "fp16" if args.format == "fp16" else "fp32")
    if args.format in ("int8", "int4"):
        compress(args.into, args.format, args.group)


if __name__ == "__main__":
    main()
