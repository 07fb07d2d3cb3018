"""The proof kit: every figure that a GPU must show, from one command. See `python -m loadtest.gpu`.

Imports only torch, transformers, numpy, safetensors and triton (if installed), so that it runs on a
bare GPU image.
"""
