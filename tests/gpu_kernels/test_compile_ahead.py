"""Every kernel fits the GPUs it is meant for, compiled here without one."""

import json
import os
import subprocess
import sys

import pytest

from dycoke_core.gpu_kernels.compile_ahead import GEMMA, SHARED_LIMIT_BYTES

# Minutes of CPU time, whichever of these tests comes first.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

KERNELS = {
    *("split_attend", "merge_parts", "visual_scores", "gate_select", "gather_kept"),
    *("add_rmsnorm", "rope_store", "silu_mul", "embed"),
    *("row_maxima", "binade_sums", "choose_tokens"),
}
Row = dict[str, int | str]


@pytest.fixture(scope="module")
def compiled() -> list[Row]:
    """In a process of its own: here Triton may be set to interpret."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "dycoke_core.gpu_kernels.compile_ahead", "--json"]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr
    rows: list[Row] = json.loads(result.stdout.splitlines()[-1])
    return rows


def test_every_kernel_compiles_for_every_gpu(compiled: list[Row]) -> None:
    for target in SHARED_LIMIT_BYTES:
        assert {row["kernel"] for row in compiled if row["target"] == target} >= KERNELS


def test_gemmas_kernels_compile(compiled: list[Row]) -> None:
    for target in (80, 90):
        found = {r["kernel"] for r in compiled if (r["target"], r["model"]) == (target, GEMMA.name)}
        assert found >= {"split_attend", "visual_scores", "norm_add_rmsnorm", "gelu_mul"}


def test_no_kernel_spills_registers(compiled: list[Row]) -> None:
    """But for one pair of them per thread, of heads of 256 on an A100."""

    def tolerated(row: Row) -> int:
        return 8 if row["target"] == 80 and "E=256" in row["constants"] else 0

    assert [row for row in compiled if row["spill_bytes"] > tolerated(row)] == []


def test_shared_memory_fits(compiled: list[Row]) -> None:
    for row in compiled:
        assert row["shared_bytes"] <= SHARED_LIMIT_BYTES[row["target"]], row


def test_attention_multiplies_in_tensor_cores_and_copies_ahead(compiled: list[Row]) -> None:
    rows = [r for r in compiled if r["kernel"] in ("split_attend", "visual_scores")]
    assert all(r["tensor_core_instructions"] for r in rows if r["dtype"] in ("bf16", "fp16"))
    assert all(r["asynchronous_copies"] for r in rows)


def test_three_programs_of_attention_share_a_multiprocessor(compiled: list[Row]) -> None:
    """Those of the usual tile, as `split_attend` says; each takes 1 KB of shared memory more."""
    for row in compiled:
        is_usual = row["kernel"] == "split_attend" and "M=16" in row["constants"]
        if is_usual and row["dtype"] != "fp32" and row["target"] >= 90:
            assert 3 * (row["shared_bytes"] + 1024) <= 228 * 1024, row
            assert 3 * row["registers"] * 32 * row["num_warps"] <= 65536, row
