"""Writes a checkpoint as CTranslate2 reads it.

    python benchmarks/peers/make_ctranslate2.py --model DIR --into DIR --format float32|bfloat16|int8

Needs ctranslate2, transformers and torch.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--into", type=Path, required=True)
    parser.add_argument("--format", choices=("float32", "bfloat16", "int8"), required=True)
    args = parser.parse_args()

    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(args.model)).convert(str(args.into), quantization=args.format, force=True)


if __name__ == "__main__":
    main()
