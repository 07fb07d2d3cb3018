"""The least that each stage can cost, from the model's own weights and the engine's own rows."""

import pytest

from dycoke_core.compression import flops
from dycoke_core.engine.budget import row_bytes
from dycoke_core.model.llava_onevision import LlavaOnevision
from loadtest.limits import Limits


@pytest.fixture
def limits(tiny_model: LlavaOnevision) -> Limits:
    """A machine of a teraflop and ten gigabytes per second."""
    return Limits(tiny_model, 1e12, read_bytes_s=1e10, weight_read_bytes_s=5e9)


def test_a_pass_reads_the_matrices_of_the_layers_and_the_head(
    limits: Limits, tiny_model: LlavaOnevision
) -> None:
    layers = tiny_model.model.model.language_model.layers
    matrices = [weight for weight in layers.parameters() if weight.dim() == 2]
    num_weights = sum(weight.numel() for weight in matrices)
    text = tiny_model.text_geometry
    num_weights += text.hidden_size * text.vocab_size
    assert limits.weight_bytes == num_weights * tiny_model.dtype.itemsize


def test_a_decode_step_reads_weights_once_and_each_sequences_rows(
    limits: Limits, tiny_model: LlavaOnevision
) -> None:
    text = tiny_model.text_geometry
    row = row_bytes(text, tiny_model.dtype) * text.num_layers
    one = limits.decode_seconds(1, 0)
    assert one == pytest.approx(limits.weight_bytes / 1e10)
    assert limits.decode_seconds(8, 100) - one == pytest.approx(800 * row / 1e10)


def test_a_question_costs_what_it_adds_to_its_prefix(
    limits: Limits, tiny_model: LlavaOnevision
) -> None:
    text = tiny_model.text_geometry
    assert limits.prefill_seconds(100) == pytest.approx(flops.prefill_flops(text, 100) / 1e12)
    added = limits.prefill_seconds(120) - limits.prefill_seconds(100)
    step = limits.decode_seconds(1, 100)
    assert limits.question_seconds(20, 100) == pytest.approx(step + added)
    assert limits.question_seconds(20, 1000) > limits.question_seconds(20, 100)


def test_rates_are_told_in_billions(limits: Limits) -> None:
    assert limits.rates() == {
        "matmul_gflops_s": 1000.0,
        "read_gb_s": 10.0,
        "weight_read_gb_s": 5.0,
    }
