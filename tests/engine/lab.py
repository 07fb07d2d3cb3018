"""One backend and a LLaVA-OneVision that suits it: what the engine's invariants are tested on.

A test is run once for each backend.
"""

from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.config import BackendName
from dycoke_core.model.llava_onevision import LlavaOnevision
from dycoke_core.sequence import Sequence
from tests.compression.slow_loops import SlowStageTwo
from tests.engine.bench import Bench
from tests.engine.recording import Recording, make_sequence


class Lab(Bench[LlavaOnevision]):
    """
    Args:
        model: on the backend's device; `reference_model`: the same on the CPU.
    """

    def __init__(
        self,
        backend: BackendName,
        directory: Path,
        model: LlavaOnevision,
        reference_model: LlavaOnevision,
        settings: dict[str, Any],
    ) -> None:
        def sequence(name: str, **ask: Any) -> Sequence:
            return make_sequence(name, image_size=model.image_size, **ask)

        super().__init__(model, backend, sequence, settings)
        self.directory, self.reference_model = directory, reference_model
        self.num_steps_compared = 0  # by `agreed_steps`
        self.num_steps_skipped = 0  # of those: after a choice that depended on rounding

    @property
    def tokens_per_frame(self) -> int:
        return self.model.tokens_per_frame

    @cached_property
    def transformers_model(self) -> LlavaOnevisionForConditionalGeneration:
        """The checkpoint in transformers alone."""
        model = LlavaOnevisionForConditionalGeneration.from_pretrained(
            self.directory, dtype=torch.float32, attn_implementation="sdpa"
        )
        return model.eval()  # type: ignore[no-any-return]

    def agreed_steps(self, recording: Recording, slow: SlowStageTwo) -> int:
        """Decode steps up to the first that chose otherwise than the slow loops, all of them if
        none did. One may, where float32 cannot tell which choice is right."""
        mine = list(zip(recording.kept, recording.refreshes, strict=True))
        assert len(mine) == len(slow.steps)
        self.num_steps_compared += len(mine)
        for index, ((kept, num_refreshes), step) in enumerate(zip(mine, slow.steps, strict=True)):
            if kept.tolist() != step.kept or num_refreshes != step.num_refreshes:
                assert step.is_borderline, f"step {index} kept {kept.tolist()}, not {step.kept}"
                self.num_steps_skipped += len(mine) - index
                return index
        return len(mine)

    @contextmanager
    def spoiled_embedding(self, token_id: int) -> Any:
        """Inside the block, a sequence that is fed this token gets logits that are not finite."""
        weight = self.model.model.get_input_embeddings().weight.data
        before = weight[token_id].clone()
        weight[token_id] = torch.nan
        try:
            yield
        finally:
            weight[token_id] = before
