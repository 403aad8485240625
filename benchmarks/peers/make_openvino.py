"""Writes a checkpoint as OpenVINO reads it, with optimum-intel: fp32, fp16, int8, or int4 in groups.

    python benchmarks/peers/make_openvino.py --model DIR --into DIR --format fp32|fp16|int8|int4 [--group 32]

int8 is OpenVINO's own (asymmetric, a scale for each output); int4 is symmetric in groups, table and head in int8, its
default. Needs optimum-intel, nncf and openvino-tokenizers.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--format", choices=("fp32", "fp16", "int8", "int4"), required=True)
    parser.add_argument("--group", type=int, default=32, help="of int4, along the inputs (default: 32)")
    args = parser.parse_args()

    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig, OVWeightQuantizationConfig

    settings = OVConfig(dtype=args.format)
    if args.format == "int8":
        settings = OVConfig(quantization_config=OVWeightQuantizationConfig(bits=8))
    if args.format == "int4":
        how = OVWeightQuantizationConfig(bits=4, sym=True, group_size=args.group, ratio=1.0)
        settings = OVConfig(quantization_config=how)
    main_export(str(args.model), output=args.into, task="text-generation-with-past", ov_config=settings, stateful=True)


if __name__ == "__main__":
    main()
