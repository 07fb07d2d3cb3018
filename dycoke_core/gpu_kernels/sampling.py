"""Chooses the next tokens on the device, as `dycoke_core.engine.sampler` defines, without a sort.

Three launches for any batch: the largest logit of each split of the vocabulary; for rows that are
drawn, how much of the weight lies in each binade (weights from 2^-j down to 2^-(j+1)) of each
split; then one program per row, which for greedy rows only compares the splits.

A drawn row reads its logits four times: twice spread over the splits' programs, then by its own
program once to collect the weights of the one binade that holds the nucleus's threshold, and once,
up to the token, to draw. That is at most 1.2 MB for 152 thousand logits in bfloat16, the second
half of it from the L2 cache. The threshold's last 23 bits are then found among the collected
weights, in registers. A binade of more than `capacity` weights is halved first, at one more pass
over the logits per bit.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dycoke_core.gpu_kernels.columns import ROW_COLUMNS, SEAT
from dycoke_core.gpu_kernels.launch import check_rows, check_tensors, launch, require

SPLIT = 4096  # logits per program
CAPACITY = 8192  # weights that a row's program searches in registers, 16 per thread

_NUM_BINADES = 32
BINADES = tl.constexpr(_NUM_BINADES)  # the last one holds everything below 2^-30
LEAST_TEMPERATURE = tl.constexpr(torch.finfo(torch.float32).tiny)


@dataclass(frozen=True, slots=True)
class SamplingScratch:
    """What the three kernels pass to each other, valid within one call.

    Args:
        maxima, places: float32 and int32 [rows, splits], the largest logit and where it is.
        sums: float64 [rows, splits, 32], sums of the weights in each binade.
        collected: int32 [rows, capacity], bits of weights.
        split: logits per split, a power of two.
    """

    maxima: Tensor
    places: Tensor
    sums: Tensor
    collected: Tensor
    split: int

    @classmethod
    def allocate(
        cls,
        num_rows: int,
        vocabulary: int,
        device: torch.device | str,
        *,
        split: int = SPLIT,
        capacity: int = CAPACITY,
    ) -> "SamplingScratch":
        """For at most `num_rows` rows: 43 KB per row for a vocabulary of 152 thousand."""
        shape = (num_rows, triton.cdiv(vocabulary, split))
        return cls(
            maxima=torch.empty(shape, dtype=torch.float32, device=device),
            places=torch.empty(shape, dtype=torch.int32, device=device),
            sums=torch.empty((*shape, _NUM_BINADES), dtype=torch.float64, device=device),
            collected=torch.empty((num_rows, capacity), dtype=torch.int32, device=device),
            split=split,
        )


def sample(
    logits: Tensor,
    temperature: Tensor,
    top_p: Tensor,
    uniform: Tensor,
    rows: Tensor,
    last_ids: Tensor,
    ids: Tensor,
    is_finite: Tensor,
    scratch: SamplingScratch,
) -> None:
    """Chooses one token per row and stores it for the row's seat.

    Equals `dycoke_core.engine.sampler.sample` unless the number drawn falls within rounding of a
    boundary between two tokens, or the nucleus's sum within rounding of top_p: exponentials and the
    order of sums depend on the device.

    Args:
        logits: [B, vocabulary], any float dtype, rows of any stride.
        temperature, top_p: float32 [B]; temperature 0 is greedy.
        uniform: float64 [B], in [0, 1).
        rows: int32 [B, ROW_COLUMNS], of which SEAT is read. Rows of seat 0 are padding: their ids
            and flags are written as 0 and 1, and nothing else of theirs is read.
        last_ids: int32 [seats], written for each seat.
        ids: int32 [B], written; 0 where a row is not finite.
        is_finite: int32 [B], written: 0 where the largest logit is NaN or infinite.
        scratch: for at least B rows of this vocabulary.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    num_rows, vocabulary = logits.shape
    check_rows(rows, num_rows)
    require(logits.stride(1) == 1, "a row of logits must be contiguous")
    for values in (temperature, top_p, uniform, ids, is_finite):
        require(values.shape == (num_rows,), "settings, ids and flags must be [B]")
    check_tensors(torch.float32, temperature=temperature, top_p=top_p)
    check_tensors(torch.float64, uniform=uniform)
    check_tensors(torch.int32, last_ids=last_ids, ids=ids, is_finite=is_finite)
    num_splits = triton.cdiv(vocabulary, scratch.split)
    require(scratch.maxima.shape[1] == num_splits, "scratch is for another vocabulary")
    require(scratch.maxima.shape[0] >= num_rows, "scratch is for fewer rows")
    tables = (logits, rows, scratch.maxima, scratch.places)
    launch(
        row_maxima_kernel,
        (num_rows, num_splits),
        *tables,
        logits.stride(0),
        vocabulary,
        SPLIT=scratch.split,
        num_warps=4,
    )
    num_splits_padded = triton.next_power_of_2(num_splits)
    launch(
        binade_sums_kernel,
        (num_rows, num_splits),
        *(logits, rows, scratch.maxima, scratch.sums, temperature, top_p),
        logits.stride(0),
        vocabulary,
        SPLIT=scratch.split,
        SPLITS=num_splits_padded,
        num_warps=8,
    )
    launch(
        choose_tokens_kernel,
        (num_rows,),
        *tables,
        *(scratch.sums, scratch.collected, temperature, top_p, uniform),
        *(last_ids, ids, is_finite),
        logits.stride(0),
        vocabulary,
        num_splits,
        TILE=scratch.split // 2,  # at 4096, Triton 3.6 spills registers
        SPLITS=num_splits_padded,
        CAPACITY=scratch.collected.shape[1],
        num_warps=16,
    )


@triton.jit
def row_maxima_kernel(logits, rows, maxima, places, logits_stride, vocabulary, SPLIT: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if tl.load(rows + b * ROW_COLUMNS + SEAT) != 0:
        n = split * SPLIT + tl.arange(0, SPLIT)
        is_token = n < vocabulary
        logit = tl.load(logits + b * logits_stride + n, mask=is_token, other=-float("inf"))
        logit = logit.to(tl.float32)
        logit = tl.where(logit == logit, logit, float("inf"))  # a NaN must show in the maximum
        top = tl.max(logit, 0)
        place = tl.min(tl.where(is_token & (logit == top), n, vocabulary), 0)
        at = b * tl.num_programs(1) + split
        tl.store(maxima + at, top)
        tl.store(places + at, place)


@triton.jit
def binade_sums_kernel(
    logits,
    rows,
    maxima,
    sums,
    temperature,
    top_p,
    logits_stride,
    vocabulary,
    SPLIT: tl.constexpr,
    SPLITS: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    num_splits = tl.num_programs(1)
    row_temperature = tl.load(temperature + b)
    is_drawn = (tl.load(rows + b * ROW_COLUMNS + SEAT) != 0) & (row_temperature > 0)
    top = tl.max(_splits_maxima(maxima, b, num_splits, SPLITS), 0)
    if is_drawn & _is_finite(top):
        row = logits + b * logits_stride
        n = split * SPLIT + tl.arange(0, SPLIT)
        bits = _weight_bits(row, n, vocabulary, top, row_temperature)
        weight = _weights(bits)
        binade = _binades(bits)
        at = sums + (b * num_splits + split) * BINADES
        if tl.load(top_p + b) < 1:
            for j in range(BINADES):
                tl.store(at + j, tl.sum(tl.where(binade == j, weight, 0.0), 0))
        else:  # only the total is needed
            every = tl.arange(0, BINADES)
            tl.store(at + every, tl.where(every == 0, tl.sum(weight, 0), 0.0))


@triton.jit
def choose_tokens_kernel(
    logits,
    rows,
    maxima,
    places,
    sums,
    collected,
    temperature,
    top_p,
    uniform,
    last_ids,
    ids,
    is_finite,
    logits_stride,
    vocabulary,
    num_splits,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    seat = tl.load(rows + b * ROW_COLUMNS + SEAT)
    token = 0
    has_token = 1
    if seat != 0:
        s = tl.arange(0, SPLITS)
        split_top = _splits_maxima(maxima, b, num_splits, SPLITS)
        top = tl.max(split_top, 0)
        has_token = _is_finite(top).to(tl.int32)
        if has_token != 0:
            is_best = (s < num_splits) & (split_top == top)
            place = tl.load(places + b * num_splits + s, mask=is_best, other=vocabulary)
            token = tl.min(place, 0)
            row_temperature = tl.load(temperature + b)
            if row_temperature > 0:
                row = logits + b * logits_stride
                least, mass = _nucleus(
                    row,
                    top,
                    row_temperature,
                    tl.load(top_p + b),
                    sums + b * num_splits * BINADES,
                    collected + b * CAPACITY,
                    vocabulary,
                    num_splits,
                    TILE,
                    SPLITS,
                    CAPACITY,
                )
                target = tl.load(uniform + b) * mass
                token = _pick(row, top, row_temperature, least, target, vocabulary, TILE)
        tl.store(last_ids + seat, token)
    tl.store(ids + b, token)
    tl.store(is_finite + b, has_token)


@triton.jit
def _splits_maxima(maxima, b, num_splits, SPLITS: tl.constexpr):
    s = tl.arange(0, SPLITS)
    return tl.load(maxima + b * num_splits + s, mask=s < num_splits, other=-float("inf"))


@triton.jit
def _is_finite(top):
    return (top > -float("inf")) & (top < float("inf"))


@triton.jit
def _weight_bits(row, n, vocabulary, top, temperature):
    """Bits of the float32 weights at n; 0 beyond the vocabulary. They order as the weights do."""
    logit = tl.load(row + n, mask=n < vocabulary, other=-float("inf")).to(tl.float32)
    weight = tl.exp(tl.div_rn(logit - top, tl.maximum(temperature, LEAST_TEMPERATURE)))
    return tl.where(n < vocabulary, weight.to(tl.int32, bitcast=True), 0)


@triton.jit
def _weights(bits):
    return bits.to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _binades(bits):
    """0 for a weight of 1, j for one below 2^-(j-1) and at least 2^-j, 31 for all below 2^-30."""
    return tl.minimum(127 - (bits >> 23), BINADES - 1)


@triton.jit
def _nucleus(
    row,
    top,
    temperature,
    top_p,
    sums,
    collected,
    vocabulary,
    num_splits,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """A bound in bits, at most those of the least candidate's weight, and the candidates' sum."""
    s = tl.arange(0, SPLITS)[:, None]
    j = tl.arange(0, BINADES)
    by_split = tl.load(sums + s * BINADES + j[None, :], mask=s < num_splits, other=0.0)
    by_binade = tl.sum(by_split, 0)
    least = 1
    mass = tl.sum(by_binade, 0)
    if top_p < 1:
        goal = tl.maximum(top_p.to(tl.float64) * mass, 1e-300)  # never an empty nucleus
        at_least = tl.cumsum(by_binade, 0)  # the weights of binades 0 to j
        binade = tl.minimum(tl.sum((at_least < goal).to(tl.int32), 0), BINADES - 1)
        above = tl.sum(tl.where(j < binade, by_binade, 0.0), 0)
        mass = tl.sum(tl.where(j <= binade, by_binade, 0.0), 0)
        # Invariant: {w >= least} weighs `mass` >= goal, {w >= end} weighs `above` < goal, and
        # end - least <= 2^num_bits, all in bits of weights.
        is_last = binade == BINADES - 1
        least = tl.where(is_last, 0, (127 - binade) << 23)
        end = (128 - binade) << 23
        num_bits = tl.where(is_last, 30, 23)
        count = CAPACITY + 1
        while (count > CAPACITY) & (num_bits > 0):
            middle = least + (1 << (num_bits - 1))
            count, upper = _collect(
                row, top, temperature, least, middle, end, collected, vocabulary, TILE, CAPACITY
            )
            if count > CAPACITY:
                num_bits -= 1
                if above + upper >= goal:
                    least = middle
                    mass = above + upper
                else:
                    end = tl.minimum(end, middle)
                    above += upper
        if num_bits > 0:
            tl.debug_barrier()  # until other threads have stored what they collected
            i = tl.arange(0, CAPACITY)
            bits = tl.load(collected + i, mask=i < count, other=0)
            weight = _weights(bits)
            while num_bits > 0:
                num_bits -= 1
                middle = least + (1 << num_bits)
                reached = above + tl.sum(tl.where(bits >= middle, weight, 0.0), 0)
                if reached >= goal:
                    least = middle
                    mass = reached
    return tl.maximum(least, 1), mass


@triton.jit
def _collect(
    row,
    top,
    temperature,
    least,
    middle,
    end,
    collected,
    vocabulary,
    TILE: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Stores the first CAPACITY weights in [least, end).

    Returns:
        How many such weights there are, and the sum of those in [middle, end).
    """
    count = 0
    upper = tl.zeros([TILE], tl.float64)
    for begin in range(0, vocabulary, TILE):
        bits = _weight_bits(row, begin + tl.arange(0, TILE), vocabulary, top, temperature)
        is_in = (bits >= least) & (bits < end)
        num_in = tl.sum(is_in.to(tl.int32), 0)
        if num_in > 0:
            at = count + tl.cumsum(is_in.to(tl.int32), 0) - 1
            tl.store(collected + at, bits, mask=is_in & (at < CAPACITY))
        count += num_in
        upper += tl.where(is_in & (bits >= middle), _weights(bits), 0.0)
    return count, tl.sum(upper, 0)


@triton.jit
def _pick(row, top, temperature, least, target, vocabulary, TILE: tl.constexpr):
    """The first candidate at which the running sum exceeds the target, else the last candidate."""
    token = vocabulary
    before = target * 0
    begin = 0
    while (token == vocabulary) & (begin < vocabulary):
        n = begin + tl.arange(0, TILE)
        bits = _weight_bits(row, n, vocabulary, top, temperature)
        weight = tl.where(bits >= least, _weights(bits), 0.0)
        mass = tl.sum(weight, 0)
        if before + mass > target:
            running = before + tl.cumsum(weight, 0)
            token = tl.min(tl.where((bits >= least) & (running > target), n, vocabulary), 0)
        before += mass
        begin += TILE
    if token == vocabulary:
        token = 0
        for begin in range(0, vocabulary, TILE):
            n = begin + tl.arange(0, TILE)
            bits = _weight_bits(row, n, vocabulary, top, temperature)
            token = tl.maximum(token, tl.max(tl.where(bits >= least, n, 0), 0))
    return token
