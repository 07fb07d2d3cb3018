"""Stage 1: the vision tower and the projector learn to say what each cell of a frame shows.

Linear heads on the pooled visual tokens name colour, shape, place, outline and background; without
the outline shapes are not learnt. The heads are dropped afterwards; the projector is changed to
bring out what they could read, and from then on tower and projector are frozen.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from dycoke_core.tiny.architecture import GRID, HIDDEN_SIZE
from dycoke_core.tiny.scenes import BACKGROUNDS, SHAPES
from dycoke_core.tiny.training.batches import BatchKey, FrameBatch, frame_batch
from dycoke_core.tiny.training.muon import Muon
from dycoke_core.tiny.training.projection import bring_out, visual_tokens
from dycoke_core.tiny.training.targets import NOTHING, POINTS, SEEN_COLORS

FRAMES_PER_STEP = 96
_TEST_EVERY = 100  # steps
_TEST_FRAMES = 192
_FINISH_FRAMES = 384
_LOSS_WEIGHTS = {
    "color": 1.0,
    "shape": 1.5,
    "offset": 2.0,
    "outline": 10.0,
    "background": 0.5,
    "place": 6.0,
    "centre": 6.0,
}


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
                "place": nn.Linear(HIDDEN_SIZE, 2),
                "centre": nn.Linear(HIDDEN_SIZE, 2),
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

    def finish(self) -> None:
        """Brings out in the projector what the heads could read; the same in every process."""
        batch = frame_batch(BatchKey(self._seed, 0), num_frames=_FINISH_FRAMES)
        bring_out(self.model, batch, self._seed)

    def _losses(self, batch: FrameBatch) -> tuple[Tensor, dict[str, float]]:
        with torch.autocast("cpu", torch.bfloat16):
            tokens = visual_tokens(self.model, batch.frames)
        tokens = F.layer_norm(tokens.float(), tokens.shape[-1:])
        said = {name: head(tokens) for name, head in self.heads.items()}
        seen = batch.shape != NOTHING
        named = batch.color > 0
        centre = batch.place + batch.offset * (2 / GRID)
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
            "place": F.smooth_l1_loss(said["place"], batch.place, beta=0.1),
            "centre": F.smooth_l1_loss(said["centre"][seen], centre[seen], beta=0.1),
        }
        loss = torch.stack([_LOSS_WEIGHTS[name] * term for name, term in terms.items()]).sum()
        right = {
            "color": (said["color"].argmax(-1) == batch.color)[named],
            "shape": (said["shape"].argmax(-1) == batch.shape)[seen],
            "background": said["background"].argmax(-1) == batch.background,
        }
        figures = {name: float(hits.float().mean()) for name, hits in right.items()}
        figures["offset"] = float((said["offset"].detach() - batch.offset)[seen].abs().mean())
        figures["place"] = float((said["place"].detach() - batch.place).abs().mean())
        figures["centre"] = float((said["centre"].detach() - centre)[seen].abs().mean())
        return loss, figures | {"loss": float(loss.detach())}
