"""Each kernel alone, compared with moving its bytes at the copy rate of this run."""

from dycoke_core.compression.counts import share_of
from loadtest.geometry import Geometry
from loadtest.gpu.kit import Kit
from loadtest.gpu.timing import device_seconds

_GOALS = {
    "split_attend_contiguous": "split_attend_contiguous_share",
    "split_attend_random": "split_attend_slots_share",
}


def measure_kernels(kit: Kit) -> None:
    for geometry in dict.fromkeys((kit.sizes.large, kit.sizes.small)):
        _measure(kit, geometry)


def _measure(kit: Kit, geometry: Geometry) -> None:
    """Measures the kernels. Without Triton this raises ImportError, and the section fails."""
    from loadtest.gpu.kernel_cases import StepInputs, kernel_cases

    sizes, report = kit.sizes, kit.report
    tokens_per_frame = (-(-(geometry.image_size // geometry.patch_size) // 2)) ** 2
    num_full = sizes.num_frames * tokens_per_frame
    inputs = StepInputs(
        geometry,
        batch=sizes.batch,
        num_tokens=num_full + sizes.num_text_tokens,
        num_visual=share_of(0.472, num_full),
        dtype=sizes.dtype,
        device=kit.device,
    )
    copy_rate = report.figures.get("copy_gb_s")
    for case in kernel_cases(inputs):
        name = f"{case.name}_{geometry.name}"
        seconds = [device_seconds(case.run, kit.device) for _ in range(3)]
        report.record(f"{name}_us", [s * 1e6 for s in seconds], "µs")
        rates = [case.num_bytes / s / 1e9 for s in seconds]
        note = "" if case.from_memory else "a cold cache's, unlike in a step"
        report.record(f"{name}_gb_s", rates, "GB/s", note=note)
        if copy_rate is None or not case.from_memory:
            continue
        shares = [rate / copy_rate.value for rate in rates]
        report.record(f"{name}_share", shares, "share", note="of the copy rate")
        if geometry is sizes.large and case.name in _GOALS:
            report.record(_GOALS[case.name], shares)
