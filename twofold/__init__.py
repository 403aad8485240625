"""Twofold trains, aligns and serves large language models with one decoder, one set of weights, one set of kernels."""

__version__ = "0.1.0"
