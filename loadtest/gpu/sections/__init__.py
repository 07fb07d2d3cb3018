"""The sections of a run, in their order.

Among sections that share an engine, those that leave useless prefixes behind come first: cold
requests empty its caches, and the oldest entries are evicted first. The profiler comes last,
because it may stay attached.
"""

from loadtest.gpu.kit import Section
from loadtest.gpu.sections import busy, decode, device, kernels, peers, serving, suite

SECTIONS: tuple[Section, ...] = (
    Section("machine", device.describe, 2, "device"),
    Section("ceilings", device.measure_ceilings, 12, "device"),
    Section("tests", suite.run_tests, 90, "device"),
    Section("kernels", kernels.measure_kernels, 45, "kernels"),
    Section("cold", serving.measure_cold, 70, "engine"),
    Section("prefill", serving.measure_prefill, 10, "engine"),
    Section("first-token", serving.measure_first_token, 8, "engine"),
    Section("memory", serving.measure_memory, 5, "engine"),
    Section("decode", decode.measure_batch, 80, "engine"),
    Section("cached", decode.measure_cached, 25, "engine"),
    Section("single", decode.measure_single, 8, "engine"),
    Section("wide", decode.measure_wide, 40, "engine"),
    Section("small", decode.measure_small_model, 25, "engine"),
    Section("peers", peers.measure_peers, 30, "engine"),
    Section("busy", busy.measure_busy, 25, "engine"),
)
