"""A Gemma 3 checkpoint and a sequence in transformers, put together without our adapter.

Ids, pixels and image blocks are the processor's own.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.models.gemma3.modeling_gemma3 import get_block_sequence_ids_for_mask

from dycoke_core.sequence import Sequence
from tests.compression.slow_loops import SlowStageTwo, weights


class GemmaReference:
    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            directory, dtype=torch.float32, attn_implementation="sdpa"
        ).eval()
        self.processor: Any = AutoProcessor.from_pretrained(directory)
        self.image_token_id = self.model.config.image_token_index

    def inputs(self, sequence: Sequence) -> dict[str, Tensor]:
        """As the processor hands them to the model, frames as images of the last turn."""
        frames = [] if sequence.frames is None else list(sequence.frames)
        images = [{"type": "image", "image": frame} for frame in frames]
        turns: list[dict[str, Any]] = [
            {"role": m.role, "content": [{"type": "text", "text": m.content}]}
            for m in sequence.messages
        ]
        turns[-1]["content"] = [*images, *turns[-1]["content"]]
        inputs = self.processor.apply_chat_template(
            turns,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        return dict(inputs)

    def features(self, inputs: dict[str, Tensor]) -> Tensor:
        """[F, N, D]."""
        output = self.model.model.get_image_features(inputs["pixel_values"])
        return output.pooler_output  # type: ignore[no-any-return]

    def compressed(
        self, inputs: dict[str, Tensor], select: Callable[[Tensor], list[int]]
    ) -> "CompressedPrompt":
        """A prompt without the tokens that stage I drops; those that stay keep their positions."""
        features, ids = self.features(inputs), inputs["input_ids"][0]
        embeds = self.model.get_input_embeddings()(ids)
        kept = set(select(features))
        visual_places = (ids == self.image_token_id).nonzero().flatten().tolist()
        embeds[visual_places] = features.flatten(0, 1)
        dropped = {place for n, place in enumerate(visual_places) if n not in kept}
        stays = [place for place in range(len(ids)) if place not in dropped]
        blocks = get_block_sequence_ids_for_mask(inputs["token_type_ids"])[0]
        return CompressedPrompt(
            embeds[stays],
            torch.tensor(stays)[None],
            [n for n, place in enumerate(stays) if place in visual_places],
            blocks[stays].tolist(),
        )


@dataclass(frozen=True)
class CompressedPrompt:
    embeds: Tensor  # [P, D]
    positions: Tensor  # int64 [1, P]
    visual: list[int]  # where the visual tokens are in it
    blocks: list[int]  # of each token: its image's number, -1 of text


class SlowWindows(SlowStageTwo):
    """Stage II by loops in a model with windows, and images that see themselves as a whole.

    Args:
        prompt: whose positions and images are looked at.
        windows: of each layer; None: it sees everything.
        scoring: the layer that scores; pruned: those that attend to what it chose.
    """

    def __init__(
        self,
        prompt: CompressedPrompt,
        *,
        windows: list[int | None],
        scoring: int,
        pruned: list[int],
        p: float,
        threshold: float | None,
    ) -> None:
        super().__init__(prompt.visual, layer=0, p=p, threshold=threshold)
        self.positions, self.blocks = prompt.positions[0].tolist(), list(prompt.blocks)
        self.windows, self.scoring, self.pruned = windows, scoring, pruned

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        keys, values = self.keys.setdefault(layer, []), self.values.setdefault(layer, [])
        first = len(keys)
        keys += key[0].unbind(dim=1)
        values += value[0].unbind(dim=1)
        while len(self.positions) < len(keys):
            self.positions.append(self.positions[-1] + 1)
            self.blocks.append(-1)
        outputs = []
        for token in range(query.shape[2]):
            seen = [other for other in range(len(keys)) if self.sees(layer, first + token, other)]
            if self.is_decoding and layer == self.scoring:
                assert seen == list(range(len(keys)))
                self.select(weights(query[0, :, token], keys, seen, scaling))
            if self.is_decoding and layer in self.pruned:
                hidden = set(self.visual) - {self.visual[place] for place in self.kept}
                seen = [place for place in seen if place not in hidden]
            per_head = weights(query[0, :, token], keys, seen, scaling)
            stacked = torch.stack([values[place] for place in seen])
            group = query.shape[1] // stacked.shape[1]
            outputs.append(
                torch.stack([per_head[h] @ stacked[:, h // group] for h in range(len(per_head))])
            )
        return torch.stack(outputs)[None]

    def sees(self, layer: int, token: int, other: int) -> bool:
        is_of_its_image = self.blocks[token] == self.blocks[other] >= 0
        if other > token and not is_of_its_image:
            return False
        window = self.windows[layer]
        return window is None or self.positions[other] > self.positions[token] - window
