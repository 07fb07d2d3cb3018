"""Stage 1: the vision tower and the projector learn to say what each cell of a frame shows.

Linear heads on the pooled visual tokens name colour, shape, offset, outline and background; the
outline is what makes shapes learnable at all. The heads are dropped afterwards, the tower and the
projector stay as they are from here on.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.model.vision import encode_frames
from dycoke_core.tiny.architecture import GRID, HIDDEN_SIZE
from dycoke_core.tiny.scenes import BACKGROUNDS, SHAPES
from dycoke_core.tiny.training.batches import BatchKey, FrameBatch, frame_batch
from dycoke_core.tiny.training.muon import Muon
from dycoke_core.tiny.training.targets import NOTHING, POINTS, SEEN_COLORS

FRAMES_PER_STEP = 96
TOKEN_SCALE = 0.25  # standard deviation of a visual token's numbers, as the language model gets it
_TEST_EVERY = 100  # steps
_TEST_FRAMES = 192
_LOSS_WEIGHTS = {
    "color": 1.0,
    "shape": 1.5,
    "offset": 2.0,
    "outline": 10.0,
    "background": 0.5,
    "cell": 0.3,
}


def visual_tokens(model: LlavaOnevisionForConditionalGeneration, frames: Tensor) -> Tensor:
    """uint8 [B, S, S, 3] → [B, N, D], as the engine computes them."""
    pixels = (frames.float() / 255 - 0.5) / 0.5
    *_, tokens = encode_frames(model.model, pixels.permute(0, 3, 1, 2), slice_layers=99)
    assert tokens is not None
    return tokens


class VisionStage:
    """The model's visual half, its heads and their optimizers; one process's share of the work."""

    name = "vision"

    def __init__(
        self,
        model: LlavaOnevisionForConditionalGeneration,
        seed: int,
        process: int,
        num_processes: int,
    ) -> None:
        self.model = model
        self._seed = seed
        self._process = process
        self._num_frames = FRAMES_PER_STEP // num_processes
        self.heads = nn.ModuleDict(
            {
                "color": nn.Linear(HIDDEN_SIZE, len(SEEN_COLORS)),
                "shape": nn.Linear(HIDDEN_SIZE, len(SHAPES)),
                "offset": nn.Linear(HIDDEN_SIZE, 2),
                "outline": nn.Linear(HIDDEN_SIZE, POINTS * POINTS),
                "background": nn.Linear(HIDDEN_SIZE, len(BACKGROUNDS)),
                "cell": nn.Linear(HIDDEN_SIZE, GRID * GRID),
            }
        )
        trained = [model.model.vision_tower, model.model.multi_modal_projector]
        named = [item for module in trained for item in module.named_parameters()]
        is_matrix = {name: p.ndim in (2, 4) and "position" not in name for name, p in named}
        rest = [p for name, p in named if not is_matrix[name]]
        self.optimizers: list[torch.optim.Optimizer] = [
            Muon([p for name, p in named if is_matrix[name]], lr=4e-3),
            torch.optim.AdamW(
                [*rest, *self.heads.parameters()], lr=3e-3, weight_decay=0.0, betas=(0.9, 0.98)
            ),
        ]

    def losses(self, step: int, num_steps: int) -> tuple[Tensor, dict[str, float]]:
        """The loss, and how often the heads are right."""
        key = BatchKey(self._seed, step, self._process)
        return self._losses(frame_batch(key, num_frames=self._num_frames))

    @torch.no_grad()
    def test(self, step: int) -> dict[str, float]:
        if step % _TEST_EVERY:
            return {}
        key = BatchKey(self._seed, 0, split="test")
        return self._losses(frame_batch(key, num_frames=_TEST_FRAMES))[1]

    @torch.no_grad()
    def finish(self) -> None:
        """Scales the projector's output to TOKEN_SCALE: the same factor in every process."""
        batch = frame_batch(BatchKey(self._seed, 0), num_frames=_TEST_FRAMES)
        last = self.model.model.multi_modal_projector.linear_2
        factor = TOKEN_SCALE / visual_tokens(self.model, batch.frames).std()
        last.weight.mul_(factor)
        last.bias.mul_(factor)

    def _losses(self, batch: FrameBatch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = visual_tokens(self.model, batch.frames)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        said = {name: head(tokens) for name, head in self.heads.items()}
        seen = batch.shape != NOTHING
        named = batch.color > 0
        cells = torch.arange(GRID * GRID).expand(seen.shape)
        weights = torch.ones(len(SEEN_COLORS))
        weights[0] = 0.3  # most cells show nothing
        terms = {
            "color": F.cross_entropy(
                said["color"].mT, batch.color, weight=weights, ignore_index=NOTHING
            ),
            "shape": F.cross_entropy(said["shape"].mT, batch.shape, ignore_index=NOTHING),
            "offset": F.smooth_l1_loss(said["offset"][seen], batch.offset[seen], beta=0.3),
            "outline": F.binary_cross_entropy_with_logits(said["outline"], batch.outline),
            "background": F.cross_entropy(said["background"].mT, batch.background),
            "cell": F.cross_entropy(said["cell"].mT, cells),
        }
        loss = torch.stack([_LOSS_WEIGHTS[name] * term for name, term in terms.items()]).sum()
        right = {
            "color": (said["color"].argmax(-1) == batch.color)[named],
            "shape": (said["shape"].argmax(-1) == batch.shape)[seen],
            "background": said["background"].argmax(-1) == batch.background,
            "cell": said["cell"].argmax(-1) == cells,
        }
        figures = {name: float(hits.float().mean()) for name, hits in right.items()}
        figures["offset"] = float((said["offset"].detach() - batch.offset)[seen].abs().mean())
        return loss, figures | {"loss": float(loss.detach())}
