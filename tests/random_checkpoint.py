"""Checkpoints of the bundled model's form with random weights: their answers are word salad.

Tests of compression, resume and failover want answers that never end early and that change with
every token, frame and rounding; the trained model's short, certain answers would hide faults. Plain
random initialisation repeats one token for ever, so weights are scaled until the next word depends
on the words before, the question and the video.
"""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration, PreTrainedTokenizerFast

from dycoke_core.tiny.architecture import BUNDLED_SHAPE, ModelShape, new_model, save_checkpoint
from dycoke_core.tiny.tokenizer import build_tokenizer

SEED = 20241122
# For kernels in Triton's interpreter, where every program costs a good part of a millisecond: 96
# pixels, pooled to 3 x 3 = 9 tokens per frame.
SMALL_SHAPE = ModelShape(
    image_size=96,
    num_layers=4,
    hidden_size=64,
    intermediate_size=96,
    vision_hidden_size=32,
    max_tokens=512,
)


def build_random_checkpoint(
    directory: Path, *, seed: int = SEED, shape: ModelShape = BUNDLED_SHAPE
) -> None:
    """The same seed gives the same bytes."""
    model = new_model(seed, shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _scale_weights(model, build_tokenizer())
    save_checkpoint(model, directory)


@torch.no_grad()
def _scale_weights(
    model: LlavaOnevisionForConditionalGeneration, tokenizer: PreTrainedTokenizerFast
) -> None:
    scale_matrices(model)
    nn.init.normal_(model.model.vision_tower.embeddings.position_embedding.weight, std=0.5)
    nn.init.normal_(model.model.language_model.embed_tokens.weight, std=4.0)
    nn.init.normal_(model.model.image_newline, std=1.0)
    model.lm_head.weight.mul_(speakable(tokenizer)[:, None])


@torch.no_grad()
def scale_matrices(model: nn.Module) -> None:
    """Gives every matrix a gain at which its output depends visibly on its input."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
            fan_in = module.weight[0].numel()
            nn.init.normal_(module.weight, std=_gain(name) * fan_in**-0.5)
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.02)


def _gain(name: str) -> float:
    """Found by trial: sharp attention makes answers depend on the video and on what came before;
    with gains of 1, attention is an average over 1,500 tokens and says nothing. The head's gain
    keeps unspeakable tokens, of logit 0, out of samples too."""
    gains = {"q_proj": 2.0, "k_proj": 2.0, "linear_2": 2.0, "lm_head": 4.0}
    return gains.get(name.rsplit(".", 1)[-1], 1.0)


def speakable(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """1 for tokens that are a word, or the beginning of one, with its space, else 0: a logit of 0
    never wins, so answers are words, and never end before max_tokens."""
    vocabulary = tokenizer.get_vocab()
    mask = torch.zeros(len(vocabulary))
    for token, index in vocabulary.items():
        mask[index] = token.startswith("Ġ") and token[1:].isalpha()
    return mask
