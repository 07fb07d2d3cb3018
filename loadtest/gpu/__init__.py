"""The proof kit: every figure that a GPU must show, from one command. See `python -m loadtest.gpu`.

Imports torch, transformers, numpy, safetensors and (where it is installed) triton alone, so that it
runs on a bare GPU image.
"""
