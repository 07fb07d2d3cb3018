"""Compiles every kernel for several GPUs, without needing one: `python -m <this> --json`.

It compiles what the kernels' functions would launch, with the models' own shapes, and shows what
each kernel needs of a multiprocessor: registers, shared memory, spilled registers. It says nothing
about time.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler import compile as compile_source

from dycoke_core.gpu_kernels.attention import merge_parts, split_attend
from dycoke_core.gpu_kernels.gemma_layers import gelu_mul, norm_add_rmsnorm
from dycoke_core.gpu_kernels.host_copy import gather_kept
from dycoke_core.gpu_kernels.launch import Launch, recording_launches
from dycoke_core.gpu_kernels.layers import add_rmsnorm, embed, head_rmsnorm, rope_store, silu_mul
from dycoke_core.gpu_kernels.rows import ITEM_COLUMNS, ROW_COLUMNS, WRITE_SLOT
from dycoke_core.gpu_kernels.sampling import SamplingScratch, sample
from dycoke_core.gpu_kernels.scoring import visual_scores
from dycoke_core.gpu_kernels.selection import gate_select

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # per program, opted into
TENSOR_CORE = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)")
_POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Model:
    name: str
    num_heads: int  # H
    num_kv_heads: int  # G
    head_size: int  # E
    hidden: int  # D
    intermediate: int  # I
    vocabulary: int


@dataclass(frozen=True, slots=True)
class Compiled:
    kernel: str
    target: int  # compute capability, times ten
    model: str
    dtype: str
    constants: str
    registers: int  # per thread
    shared_bytes: int
    spill_bytes: int  # per thread: stack frame and local memory
    num_warps: int
    tensor_core_instructions: int
    asynchronous_copies: int


LARGE = Model("7B", 28, 4, 128, 3584, 18944, 152064)
SMALL = Model("0.5B", 14, 2, 64, 896, 4864, 151936)
TINY = Model("tiny", 4, 2, 64, 256, 512, 526)
GEMMA = Model("Gemma 3 4B", 8, 4, 256, 2560, 10240, 262208)
_MATRIX_KERNELS = ("split_attend_kernel", "visual_scores_kernel")
_GEMMA_KERNELS = (
    *("split_attend_kernel", "visual_scores_kernel", "merge_parts_kernel", "rope_store_kernel"),
    *("norm_add_rmsnorm_kernel", "gelu_mul_kernel", "head_rmsnorm_kernel"),
)
_CASES = [  # last: all kernels, or only those that a dtype, a shape or a GPU changes most
    (90, LARGE, torch.bfloat16, True),
    (90, LARGE, torch.float16, False),
    (90, SMALL, torch.bfloat16, True),
    (90, TINY, torch.float32, False),
    (90, GEMMA, torch.bfloat16, False),
    (80, GEMMA, torch.bfloat16, False),
    (80, LARGE, torch.bfloat16, True),
    (80, SMALL, torch.float16, False),
    (100, LARGE, torch.bfloat16, True),
    (100, SMALL, torch.bfloat16, False),
]


def main() -> None:
    """Prints a table, and with --json one line of JSON last."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    is_json = parser.parse_args().json
    if os.environ.get("TRITON_INTERPRET") == "1":
        sys.exit("TRITON_INTERPRET=1: nothing would be compiled")
    results = []
    for compiled in compile_all():
        results.append(compiled)
        print("  ".join(str(value) for value in asdict(compiled).values()), flush=True)
    if is_json:
        print(json.dumps([asdict(compiled) for compiled in results]))


def compile_all() -> Iterator[Compiled]:
    """Every kernel for every case, one after another."""
    for target, model, dtype, is_whole in _CASES:
        for launch in launches_of(model, dtype):
            names = _GEMMA_KERNELS if model is GEMMA else _MATRIX_KERNELS
            if is_whole or launch.kernel.__name__ in names:
                yield compile_launch(launch, target, model)


def launches_of(model: Model, dtype: torch.dtype) -> list[Launch]:
    """The launches of decode steps of 64 rows and of one, each variant of each kernel once."""
    rows, seats, cap, stride = 64, 65, 1024, 4096
    heads, kv_heads, head_size = model.num_heads, model.num_kv_heads, model.head_size

    def make(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    def ints(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.int32)

    def floats(*shape: int) -> Tensor:
        return make(*shape, dtype=torch.float32)

    table, slots = ints(rows, ROW_COLUMNS), ints(100_000)
    k_pool, v_pool = make(8192, kv_heads, head_size), make(8192, kv_heads, head_size)
    qkv = make(rows, (heads + 2 * kv_heads) * head_size)
    q = qkv[:, : heads * head_size].view(rows, heads, head_size)
    total, scores = floats(rows, heads), floats(rows, stride)
    reference, kept = floats(seats, stride), ints(seats, stride)
    x, weight, changed = make(rows, model.hidden), make(model.hidden), ints(rows)
    angles = make(rows, head_size)
    with recording_launches() as launches:
        for tile_rows in (16, 64):
            out = floats(cap, kv_heads, tile_rows, head_size)
            parts = floats(cap, kv_heads, tile_rows)
            tile: dict[str, Any] = {"list_layer": 0, "tile_rows": tile_rows}
            split_attend(
                *(q, k_pool, v_pool, slots, ints(cap, ITEM_COLUMNS), ints(1), out, parts),
                **tile,
                layer=0,
                scaling=0.125,
            )
            n = 1 if tile_rows == 16 else rows  # few rows and many take different tiles
            o = make(n, heads, head_size)
            merge_parts(*(out, parts, ints(cap), ints(2, n + 1), table[:n], o, total[:n]), **tile)
        visual_scores(q, k_pool, slots, table, total, scores, layer=0, scaling=0.125)
        state = (scores, reference, kept, slots, ints(100), ints(seats), changed)
        gate_select(table, *state, layer=0)
        pools = (k_pool, v_pool, k_pool, v_pool)
        gather_kept(*pools, table, kept, changed, slots, slots, layer=0)
        add_rmsnorm(x, None, weight, 1e-6)
        add_rmsnorm(x, x, weight, 1e-6)
        head_weight = make(head_size)
        head_rmsnorm(qkv, head_weight, head_weight, 1e-6, num_heads=heads)
        write_slots = table[:, WRITE_SLOT]
        rope_store(qkv, angles, angles, write_slots, k_pool, v_pool, layer=0, num_heads=heads)
        silu_mul(make(rows, 2 * model.intermediate))
        if model is GEMMA:
            wide = floats(model.hidden)
            gelu_mul(make(rows, 2 * model.intermediate))
            norm_add_rmsnorm(x, x, wide, wide, 1e-6)
        embed(table, ints(seats), make(1000, model.hidden))
        sampling = (floats(rows), floats(rows), make(rows, dtype=torch.float64))
        outputs = (ints(seats), ints(rows), ints(rows))
        scratch = SamplingScratch.allocate(rows, model.vocabulary, "meta")
        sample(make(rows, model.vocabulary), *sampling, table, *outputs, scratch)
    return launches


def compile_launch(launch: Launch, target: int, model: Model) -> Compiled:
    """One kernel for one GPU, specialised as Triton would specialise it for these arguments."""
    kernel, options = launch.kernel, dict(launch.options)
    values = dict(zip(kernel.arg_names, launch.args, strict=False))
    constants = {name: options.pop(name) for name in list(options) if name in kernel.arg_names}
    signature = dict.fromkeys(constants, "constexpr")
    attributes = {}
    for index, parameter in enumerate(kernel.params[: len(values)]):
        value = values[parameter.name]
        signature[parameter.name] = _type_of(value)
        if parameter.do_not_specialize or isinstance(value, float):
            continue
        if not isinstance(value, Tensor) and value == 1:
            signature[parameter.name], constants[parameter.name] = "constexpr", 1
        elif _is_aligned(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(
        fn=kernel,
        signature={name: signature[name] for name in kernel.arg_names},
        constexprs={(kernel.arg_names.index(name),): v for name, v in constants.items()},
        attrs=attributes,
    )
    compiled = compile_source(source, target=GPUTarget("cuda", target, 32), options=options)
    usage = _resource_usage(compiled.asm["cubin"])
    code = compiled.asm["ptx"]
    return Compiled(
        kernel=kernel.__name__.removesuffix("_kernel"),
        target=target,
        model=model.name,
        dtype=_pool_type(launch),
        constants=" ".join(f"{name}={value}" for name, value in constants.items()),
        registers=usage["REG"],
        shared_bytes=compiled.metadata.shared,
        spill_bytes=usage["STACK"] + usage["LOCAL"],
        num_warps=compiled.metadata.num_warps,
        tensor_core_instructions=len(TENSOR_CORE.findall(code)),
        asynchronous_copies=code.count("cp.async.c"),
    )


def _type_of(value: Tensor | float | int) -> str:
    if isinstance(value, Tensor):
        return _POINTERS[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _is_aligned(value: Tensor | int) -> bool:
    if isinstance(value, Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return value % 16 == 0


def _pool_type(launch: Launch) -> str:
    """The model's dtype, or float32 if the kernel sees only scores."""
    types = [_type_of(value) for value in launch.args if isinstance(value, Tensor)]
    return next((t for t in types if t in ("*bf16", "*fp16")), "*fp32").removeprefix("*")


def _resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK and LOCAL of a compiled kernel, by the tool in Triton's own wheel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


if __name__ == "__main__":
    main()
