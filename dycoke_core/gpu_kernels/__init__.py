"""Triton kernels of the CUDA backend: one function per kernel, which checks and launches it.

Owns the arithmetic on the device and the layout of the tables that describe a step (`rows`). Knows
no sequence, page, video or graph: callers allocate and fill the tensors. No function waits for the
device or allocates anything but its result, so each can be captured in a CUDA graph.

With TRITON_INTERPRET=1 the kernels run on CPU tensors, slowly, in float32 and float16; the
interpreter multiplies bfloat16 matrices wrongly, so without a GPU bfloat16 is only compiled.
Triton is imported only in this package; `rows` does not need it.
"""
