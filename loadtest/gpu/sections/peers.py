"""Others on the same task: transformers' `generate` on the same weights, and vLLM if installed.

transformers runs its own layers with sdpa and a dynamic cache, the defaults of `generate`. Not
covered: its static cache with torch.compile, which takes minutes.
"""

import importlib.util
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from loadtest.geometry import random_llava_onevision
from loadtest.gpu.kit import Kit
from loadtest.gpu.timing import by_turns, ratios
from loadtest.transformers_baseline import TransformersModel


def measure_peers(kit: Kit) -> None:
    _measure_transformers(kit)
    if importlib.util.find_spec("vllm") is None or kit.is_dry:
        kit.report.note("vLLM is not installed here")
    else:
        _measure_vllm(kit)


def _measure_transformers(kit: Kit) -> None:
    """Tokens per second of one sequence of full tokens, after a prompt of the same length."""
    samples = _tokens_s(kit)
    for name, rates in samples.items():
        kit.report.record(f"{name}_b1_tokens_s", rates, "tokens/s")
    kit.report.record("ours_over_transformers", ratios(samples["ours"], samples["transformers"]))


def _tokens_s(kit: Kit) -> dict[str, list[float]]:
    sizes, bench = kit.sizes, kit.bench("large")
    plain = random_llava_onevision(
        sizes.large, device=str(kit.device), dtype=sizes.dtype, packed=False
    )
    theirs = TransformersModel(plain, sizes.num_frames * bench.model.tokens_per_frame)
    prefill_ms = [theirs.prefill_seconds() * 1e3 for _ in range(3)][1:]
    kit.report.record("transformers_prefill_full_ms", prefill_ms, "ms")
    bench.fill(bench.policies.full, 1)
    return by_turns(
        {
            "ours": lambda: 1 / bench.decode(bench.policies.full, 1).times.median_s,
            "transformers": lambda: 1 / theirs.decode_seconds("sdpa"),
        },
        turns=sizes.turns,
        has_time=kit.has_time,
    )


# --- vLLM: the language model alone, on as many tokens of text as a video has visual ones ---


def _measure_vllm(kit: Kit) -> None:
    """Milliseconds per decode step of a batch with different prompts and no shared prefix."""
    from vllm import LLM, SamplingParams

    sizes = kit.sizes
    free, total = torch.cuda.mem_get_info(kit.device)
    num_visual = sizes.num_frames * kit.bench("large").model.tokens_per_frame
    length = num_visual + 1 + sizes.num_text_tokens
    seconds = {}
    with tempfile.TemporaryDirectory() as directory:
        _write_text_config(Path(directory), kit)
        llm = LLM(
            model=directory,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="bfloat16",
            max_model_len=length + 256,
            max_num_seqs=sizes.batch,
            gpu_memory_utilization=0.9 * free / total,
            enable_prefix_caching=True,  # the later runs find their prompts
        )
        for num_tokens in (8, 8, 72):  # the first fills the cache
            params = SamplingParams(
                max_tokens=num_tokens, temperature=0.0, ignore_eos=True, detokenize=False
            )
            started_at = time.perf_counter()
            llm.generate(_random_prompts(sizes.batch, length), params)
            seconds[num_tokens] = time.perf_counter() - started_at
    step_ms = (seconds[72] - seconds[8]) / 64 * 1e3
    kit.report.record("vllm_decode_b64_full_ms", step_ms, "ms", note="language model, text prompts")


def _random_prompts(number: int, length: int) -> list[dict[str, Any]]:
    """Prompts that are the same at every call, no two alike."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 100_000, (number, length), generator=generator)
    return [{"prompt_token_ids": row.tolist()} for row in ids]


def _write_text_config(directory: Path, kit: Kit) -> None:
    """A Qwen2 of the language model's shape."""
    text = kit.bench("large").model.model.config.text_config.to_dict()
    text |= {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "dtype": "bfloat16"}
    (directory / "config.json").write_text(json.dumps(text, default=str))
