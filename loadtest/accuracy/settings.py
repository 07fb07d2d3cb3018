"""What is compared: named settings, and the tables of the paper that they belong to."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dycoke_core.compression.counts import share_of
from dycoke_core.compression.flops import TextGeometry, paper_flops
from dycoke_core.compression.policies import make_policy
from dycoke_core.config import POLICY_PARAMETERS, CompressionConfig
from dycoke_core.model.adapter import VideoLanguageModel

Table = Literal["table1", "table5", "table6", "figure5"]
TABLES: tuple[Table, ...] = ("table1", "table5", "table6", "figure5")
NUM_FRAMES = 32
FULL = "full"  # the setting that the others are compared with
PRUMERGE_RATIO, FASTV_RATIO = 0.55, 0.35  # from DyCoke's paper


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of a table.

    Args:
        name: unique; what the row is called.
        method: how it is run: a policy by the engine, or a baseline one answer at a time.
        compression: the policy.
        layer: the first layer that FastV prunes.
    """

    name: str
    method: Literal["policy", "fastv", "prumerge"] = "policy"
    compression: CompressionConfig = field(default_factory=lambda: CompressionConfig(policy="full"))
    num_frames: int = NUM_FRAMES
    layer: int = 0

    def for_video(self, seed: int) -> CompressionConfig:
        """The policy with its own draw for each video, so that no single mask decides."""
        takes_seed = "seed" in POLICY_PARAMETERS[self.compression.policy]
        return replace(self.compression, seed=seed) if takes_seed else self.compression


@dataclass(frozen=True, slots=True)
class Sizes:
    """What of a model decides how many tokens a setting leaves, and what they cost.

    Args:
        full_layers: those that attend to everything; None: all do.
    """

    geometry: TextGeometry
    tokens_per_unit: int  # N
    frames_per_unit: int = 1
    full_layers: tuple[int, ...] | None = None

    @classmethod
    def of(cls, model: VideoLanguageModel) -> "Sizes":
        """With the frames that suit the model."""
        windows = [spec.window for spec in model.layers]
        return cls(
            model.text_geometry,
            model.tokens_per_unit(model.image_size, model.image_size),
            model.frames_per_unit,
            tuple(layer for layer, window in enumerate(windows) if window is None),
        )

    def num_units(self, num_frames: int) -> int:
        return -(-num_frames // self.frames_per_unit)


@dataclass(frozen=True, slots=True)
class Cost:
    """What a setting costs the language model, from counts alone, without text and newline.

    `paper_flops` is Eq. 8 with R = 100, as if no layer had a window; each of FastV's layers counts
    with the tokens it sees.
    """

    visual_tokens_in: int
    visual_tokens_prefill: int  # in the layers before any pruning
    visual_tokens_decode: int  # in a pruned layer
    visual_tokens_decode_mean: float  # over all layers
    paper_flops: float

    @property
    def retained_ratio(self) -> float:
        """The paper's "retained ratio (final)"."""
        return self.visual_tokens_decode / self.visual_tokens_in


def cost_of(setting: Setting, sizes: Sizes) -> Cost:
    geometry, num_units = sizes.geometry, sizes.num_units(setting.num_frames)
    num_layers, num_in = geometry.num_layers, num_units * sizes.tokens_per_unit
    if setting.method == "fastv":
        num_kept = share_of(FASTV_RATIO, num_in)
        work = _flops(geometry, num_in, setting.layer)
        num_pruned = num_layers - setting.layer
        work += _flops(geometry, num_kept, num_pruned)
        mean = _mean(num_layers, num_pruned, num_in, num_kept)
        return Cost(num_in, num_in, num_kept, mean, work)
    if setting.method == "prumerge":
        num_kept = num_units * share_of(PRUMERGE_RATIO, sizes.tokens_per_unit)
        work = _flops(geometry, num_kept, num_layers)
        return Cost(num_in, num_kept, num_kept, num_kept, work)
    policy = make_policy(setting.compression)
    num_visual = policy.count_visual_tokens(num_units, sizes.tokens_per_unit)
    stage_two = policy.stage_two(num_visual, num_layers)
    if stage_two is not None and sizes.full_layers is not None:
        stage_two = stage_two.in_layers(sizes.full_layers, num_layers)
    num_decode, num_pruned = num_visual, 0
    if stage_two is not None:
        num_decode = stage_two.num_kept
        num_pruned = sum(stage_two.prunes(layer) for layer in range(num_layers))
    mean = _mean(num_layers, num_pruned, num_visual, num_decode)
    work = _flops(geometry, num_visual, num_layers)
    return Cost(num_in, num_visual, num_decode, mean, work)


def settings_of(table: Table, sizes: Sizes) -> list[Setting]:
    """The rows of one table, full tokens first.

    Layers beyond the paper's L = 3 are named by the model's own depth: a small model has no
    layer 10, and FastV's layer 5 of 28 would be its last.
    """
    if table == "table1":
        return _table1(sizes)
    if table == "table5":
        return _table5(sizes.geometry.num_layers)
    if table == "table6":
        fewer = [_full(NUM_FRAMES // 4), _full(NUM_FRAMES // 2)]
        return [_full(), *fewer, _dycoke(), _dycoke(num_frames=NUM_FRAMES // 2)]
    frames = (NUM_FRAMES, NUM_FRAMES // 2, NUM_FRAMES // 4)
    shares = (0.3, 0.5, 0.7, 0.9)
    rows = [
        row for n in frames for row in (_full(n), *(_dycoke(k=k, num_frames=n) for k in shares))
    ]
    return rows


def settings_named(policies: Sequence[str]) -> list[Setting]:
    """Full tokens and policies as a request writes them: a name, or JSON text.

    Raises:
        InvalidRequestError: a policy or parameter that no request may name.
    """
    settings = [_full()]
    for text in policies:
        config = CompressionConfig.from_text(text)
        parameters = ", ".join(f"{n}={v}" for n, v in config.as_dict().items() if n != "policy")
        settings.append(Setting(f"{config.policy} ({parameters})", compression=config))
    return union([settings])


def union(tables: Sequence[Sequence[Setting]]) -> list[Setting]:
    """Every setting once, by name."""
    return list({setting.name: setting for table in tables for setting in table}.values())


def _table1(sizes: Sizes) -> list[Setting]:
    num_units = sizes.num_units(NUM_FRAMES)
    same = make_policy(CompressionConfig()).count_visual_tokens(num_units, sizes.tokens_per_unit)
    ratio = same / (num_units * sizes.tokens_per_unit)
    fastv_layer = 5 if sizes.geometry.num_layers > 20 else 3
    return [
        _full(),
        Setting("FastV (35 %)", "fastv", layer=fastv_layer),
        Setting("PruMerge (55 %)", "prumerge"),
        *(_dycoke(k=k) for k in (0.3, 0.5, 0.7, 0.9)),
        _dycoke(p=0.0),
        _policy("vidcom2, tokens of K=0.7", policy="vidcom2", retained_ratio=ratio),
        *(
            _policy(f"{policy} (K={k:g})", policy=policy, k=k)
            for policy in ("random_ttm", "fewer_frames")
            for k in (0.7, 0.9)
        ),
    ]


def _table5(num_layers: int) -> list[Setting]:
    return [
        _full(),
        _policy("w/o DP: dycoke_one_shot", policy="dycoke_one_shot"),
        _policy("random_ttm (K=0.7)", policy="random_ttm", k=0.7),
        _policy("random_kv", policy="random_kv"),
        _policy("lowest_kv", policy="lowest_kv"),
        _dycoke(),
        *(_dycoke(l=layer) for layer in (1, 2, num_layers - 1)),
        _dycoke(p=0.9),
        _policy("lowest_kv (P=0.9)", policy="lowest_kv", p=0.9),
        _dycoke(k=0.9, l=0, p=0.9),
    ]


def _full(num_frames: int = NUM_FRAMES) -> Setting:
    name = FULL if num_frames == NUM_FRAMES else f"{FULL}, {num_frames} frames"
    return Setting(name, num_frames=num_frames)


def _dycoke(*, num_frames: int = NUM_FRAMES, **changes: Any) -> Setting:
    config = CompressionConfig(**changes)
    name = f"dycoke (K={config.k:g}, L={config.l}, P={config.p:g})"
    if num_frames != NUM_FRAMES:
        name += f", {num_frames} frames"
    return Setting(name, compression=config, num_frames=num_frames)


def _policy(name: str, **parameters: Any) -> Setting:
    return Setting(name, compression=CompressionConfig(**parameters))


def _mean(num_layers: int, num_pruned: int, before: int, after: int) -> float:
    """The mean over layers, this many of which see `after` tokens."""
    return ((num_layers - num_pruned) * before + num_pruned * after) / num_layers


def _flops(geometry: TextGeometry, num_visual_tokens: int, num_layers: int) -> float:
    return paper_flops(
        num_visual_tokens,
        hidden_size=geometry.hidden_size,
        intermediate_size=geometry.intermediate_size,
        num_layers=num_layers,
    )
