"""Keys and values: a video's shared prefix, and each sequence's own.

Token-major slabs, allocated once at their final size: no concatenation per step, and a refresh
gathers whole rows. Keys are stored after RoPE, at absolute positions, so they may be in any order.

    PrefixKV      text and V visual rows, in the order of the prompt
                  in every layer; immutable once prefilled, shared by all sequences that ask
                  about the video. It is also their DP cache.
    SequenceKV    layers < L: question | generated
                  layers >= L: n_keep kept visual rows | the prefix's text rows | question |
                  generated

A decode step reads prefix and own rows in layers below L, and only own rows from L on. A refresh
costs one gather of n_keep rows per pruned layer. Layers with a window are stored like those below L
and read only the rows within the window.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.compression.kv_pruning import KVPruner
from dycoke_core.engine.backend import PrefixLayout, SeatLayout
from dycoke_core.engine.sight import Integers


@dataclass(slots=True, eq=False)
class Slab:
    """Rows of keys and values of one layer: [capacity, G, E] each, `length` of them in use."""

    keys: Tensor
    values: Tensor
    length: int = 0

    @classmethod
    def allocate(cls, capacity: int, like: Tensor) -> "Slab":
        """`like`: [..., G, E] on the device and in the dtype wanted."""
        shape = (capacity, *like.shape[-2:])
        return cls(like.new_empty(shape), like.new_empty(shape))

    def append(self, keys: Tensor, values: Tensor) -> None:
        """keys, values: [q, G, E]."""
        end = self.length + keys.shape[0]
        assert end <= self.keys.shape[0], "a slab is allocated at its final size"
        self.keys[self.length : end] = keys
        self.values[self.length : end] = values
        self.length = end

    def rows(self, start: int = 0, end: int | None = None) -> tuple[Tensor, Tensor]:
        """Used rows from `start` to `end`, as views."""
        end = self.length if end is None else end
        return self.keys[start:end], self.values[start:end]


@dataclass(slots=True, eq=False)
class PrefixKV:
    """The prompt up to the question, for every question about a video.

    Slabs are allocated when its embeddings are there. `num_tokens` grows while it is prefilled;
    then nothing writes to it again. That host and device are one memory here is why a prefix with
    layers "on the host" needs no separate code: only the budgets distinguish the two.
    """

    layout: PrefixLayout
    slabs: list[Slab] = field(default_factory=list)
    embeds: Tensor | None = None  # [P, D], until it is prefilled
    positions: Tensor | None = None  # int64 [axes, P], likewise
    layer_adds: Tensor | None = None  # [layers, P, D], likewise
    num_tokens: int = 0
    visual: tuple[range, ...] = ()  # places of the visual tokens, once it is embedded
    whole_runs: tuple[range, ...] = ()  # whose tokens see each other, later ones too
    token_positions: Integers | None = None  # its tokens' positions, where some layer has a window
    text_rows: Tensor = field(init=False)  # int64, places of the tokens that are not visual
    _visual_rows: slice | Tensor = field(init=False)  # places of those that are

    def place_visual(self, visual: tuple[range, ...]) -> None:
        """Takes the places of the visual tokens, as ascending runs; the others are text."""
        assert sum(len(run) for run in visual) == self.layout.num_visual
        self.visual = visual
        is_text = torch.ones(self.layout.num_tokens, dtype=torch.bool)
        for run in visual:
            is_text[run.start : run.stop] = False
        self.text_rows = is_text.nonzero().flatten()
        if len(visual) == 1:  # as views, where they lie together
            (run,) = visual
            self._visual_rows = slice(run.start, run.stop)
        else:
            self._visual_rows = (~is_text).nonzero().flatten()

    def roll_back(self) -> None:
        """Drops the rows of a pass that failed."""
        for slab in self.slabs:
            slab.length = self.num_tokens

    def visual_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        slab = self.slabs[layer]
        return slab.keys[self._visual_rows], slab.values[self._visual_rows]


class SequenceKV:
    """A seat: one sequence's own rows over a shared prefix, and its stage-II state."""

    def __init__(self, geometry: TextGeometry, prefix: PrefixKV, layout: SeatLayout) -> None:
        stage_two = layout.stage_two
        self.prefix = prefix
        self.first_position = prefix.layout.next_position
        self.pruned_layers = frozenset(
            layer
            for layer in range(geometry.num_layers)
            if stage_two is not None and stage_two.prunes(layer)
        )
        self.last_pruned_layer = max(self.pruned_layers, default=None)
        self.scoring_layer = stage_two.scoring_layer if stage_two else None
        self.pruner: KVPruner | None = None
        if stage_two is not None:
            num_visual = prefix.layout.num_visual
            self.pruner = KVPruner(
                num_visual, stage_two.num_kept, stage_two.threshold, stage_two.choose
            )
        self.must_load_kept_rows = False  # since a failed pass left others in their place
        self.num_own_tokens = 0  # tokens of question and answer processed so far
        self.is_decoding = False
        self.last_token_id: int | None = None  # that its last row drew
        self._num_front_rows = layout.num_front
        like = prefix.slabs[0].keys
        self.slabs = []
        for layer in range(geometry.num_layers):
            front = self._num_front_rows if self.is_pruned(layer) else 0
            slab = Slab.allocate(front + layout.max_own_tokens, like)
            slab.length = front
            self.slabs.append(slab)

    def is_pruned(self, layer: int) -> bool:
        return layer in self.pruned_layers

    def begin_decode(self) -> None:
        """From the next pass on, each pass is a decode step of one token. Fills the text rows of
        the prefix into the pruned layers; the kept rows come with the first selection."""
        num_kept = self.pruner.num_kept if self.pruner is not None else 0
        for layer in sorted(self.pruned_layers):
            keys, values = self.prefix.slabs[layer].rows()
            text_rows = slice(num_kept, self._num_front_rows)
            places = self.prefix.text_rows
            torch.index_select(keys, 0, places, out=self.slabs[layer].keys[text_rows])
            torch.index_select(values, 0, places, out=self.slabs[layer].values[text_rows])
        self.is_decoding = True

    def roll_back(self) -> None:
        """Drops the rows of a pass that failed."""
        for layer, slab in enumerate(self.slabs):
            front = self._num_front_rows if self.is_pruned(layer) else 0
            slab.length = front + self.num_own_tokens

    def own_rows(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the question and the answer alone."""
        return self.slabs[layer].rows(self._num_front_rows if self.is_pruned(layer) else 0)

    def load_kept_rows(self, layer: int) -> None:
        """Copies the kept rows from the prefix to the front of a pruned layer's slab."""
        assert self.pruner is not None and self.pruner.kept is not None
        keys, values = self.prefix.visual_rows(layer)
        kept, own = self.pruner.kept, self.slabs[layer]
        torch.index_select(keys, 0, kept, out=own.keys[: len(kept)])
        torch.index_select(values, 0, kept, out=own.values[: len(kept)])
