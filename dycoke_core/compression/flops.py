"""FLOPs of an answer: by the paper's formula, and counted exactly. Standard library only."""

from dataclasses import dataclass


def paper_flops(
    num_visual_tokens: float,
    *,
    hidden_size: int,
    intermediate_size: int,
    num_layers: int,
    num_output_tokens: int = 100,
) -> float:
    """FLOPs of prefill and decode as the paper counts them, to compare with published numbers.

    Mostly multiply-adds, a two-matrix MLP, no grouped-query attention, no vision tower, no text
    tokens, no language head. See `exact_flops` for what is really computed.

    Args:
        num_visual_tokens: n, visual tokens that enter the language model; may be fractional.

    Source: paper Eq. 8.
    """
    n, d, m, r = num_visual_tokens, hidden_size, intermediate_size, num_output_tokens
    prefill = 4 * n * d**2 + 2 * n**2 * d + 2 * n * d * m
    decode = r * ((4 * d**2 + 2 * d * m) + 2 * (d * n + d * (r + 1) / 2))
    return num_layers * (prefill + decode)


@dataclass(frozen=True, slots=True)
class TextGeometry:
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    num_windowed_layers: int = 0  # of them, that see only this many tokens, a query's own included
    window: int = 0


@dataclass(frozen=True, slots=True)
class VisionGeometry:
    hidden_size: int
    intermediate_size: int
    num_mlp_matrices: int  # of a layer: 3 where the MLP is gated
    num_layers: int  # that are run
    num_patches: int  # per unit: a frame, or a temporal patch of several
    num_attended: float  # patches that a patch attends to, on average over the layers
    patch_inputs: int  # channels * values of a patch in each
    projector_products: float  # multiply-adds per patch
    projector_values: float  # per patch, that the projector and what follows it hold at once
    is_rotary: bool = False  # whether queries and keys are rotated by position


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """What one answer computed: counts that a receipt knows exactly.

    `num_decode_steps` is the number of forward passes after the prefill: one less than the tokens
    of the answer.
    """

    num_units: int  # that were encoded
    num_text_tokens: int  # of the prompt, with all that separates visual tokens
    num_visual_tokens: int  # V
    num_decode_tokens: int  # n_keep
    num_pruned_layers: int  # 0 if stage II is off
    num_decode_steps: int
    num_reused_tokens: int = 0  # prompt tokens whose keys and values were cached


def exact_flops(vision: VisionGeometry, text: TextGeometry, answer: AnswerShape) -> float:
    """FLOPs of all matrix products of one answer, two per multiply-add.

    Counts the vision tower and projector over every unit, the gated MLP, grouped-query attention
    under the causal mask and within windows, the language head once per token. Leaves out
    element-wise work, softmax, normalisation, the selection of stages I and II, and that an image's
    tokens may see its later ones (together below 0.1 %). Windows are counted as if no token in
    their reach had been dropped.
    """
    return (
        vision_flops(vision, answer.num_units)
        + prefill_flops(text, answer.num_text_tokens + answer.num_visual_tokens)
        - _prompt_flops(text, answer.num_reused_tokens)
        + decode_flops(text, answer)
    )


def vision_flops(vision: VisionGeometry, num_units: int) -> float:
    v = vision
    linear = 4 * v.hidden_size**2 + v.num_mlp_matrices * v.hidden_size * v.intermediate_size
    attention = 2 * v.num_attended * v.hidden_size
    per_patch = v.patch_inputs * v.hidden_size + v.num_layers * (linear + attention)
    return 2.0 * num_units * v.num_patches * (per_patch + v.projector_products)


def prefill_flops(text: TextGeometry, num_tokens: int, *, is_causal: bool = True) -> float:
    """FLOPs of a prompt of `num_tokens` and the head at its last position."""
    return _prompt_flops(text, num_tokens, is_causal=is_causal) + 2.0 * _head_products(text)


def decode_flops(text: TextGeometry, answer: AnswerShape) -> float:
    """FLOPs of all decode steps, head included; step i sees the prompt and i + 1 newer tokens."""
    steps = answer.num_decode_steps
    grown = steps * answer.num_text_tokens + steps * (steps + 1) / 2
    full_layers = text.num_layers - text.num_windowed_layers - answer.num_pruned_layers
    pairs = full_layers * (steps * answer.num_visual_tokens + grown)
    pairs += answer.num_pruned_layers * (steps * answer.num_decode_tokens + grown)
    num_prompt = answer.num_text_tokens + answer.num_visual_tokens
    within = _pairs_within(text.window, num_prompt + steps) - _pairs_within(text.window, num_prompt)
    pairs += text.num_windowed_layers * within
    fixed = steps * (_linear_products(text) + _head_products(text))
    return 2.0 * (fixed + _attention_products(text) * pairs)


def _prompt_flops(text: TextGeometry, num_tokens: int, *, is_causal: bool = True) -> float:
    """FLOPs of the layers over the first `num_tokens` of a prompt."""
    pairs = num_tokens * (num_tokens + 1) / 2 if is_causal else num_tokens**2
    within = _pairs_within(text.window, num_tokens) if is_causal else num_tokens**2
    num_full_layers = text.num_layers - text.num_windowed_layers
    pairs = num_full_layers * pairs + text.num_windowed_layers * within
    attention = _attention_products(text) * pairs
    return 2.0 * (num_tokens * _linear_products(text) + attention)


def _pairs_within(window: int, num_tokens: int) -> float:
    """Of queries and keys, in a layer in which a token sees this many, its own included."""
    first = min(num_tokens, window)
    return first * (first + 1) / 2 + (num_tokens - first) * window


def _linear_products(text: TextGeometry) -> int:
    """Multiply-adds of all layers' projections and MLPs for one token."""
    attention = 2 * text.hidden_size * text.head_size * (text.num_heads + text.num_kv_heads)
    return text.num_layers * (attention + 3 * text.hidden_size * text.intermediate_size)


def _attention_products(text: TextGeometry) -> int:
    """Multiply-adds of one layer for one query-key pair: the score and the weighted value."""
    return 2 * text.num_heads * text.head_size


def _head_products(text: TextGeometry) -> int:
    return text.hidden_size * text.vocab_size
