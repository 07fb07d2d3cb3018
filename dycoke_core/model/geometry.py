"""Sizes of a language model, read off its configuration."""

from typing import Any

from dycoke_core.compression.flops import TextGeometry
from dycoke_core.errors import ModelLoadError
from dycoke_core.model.adapter import LayerKind, LayerSpec


def text_geometry(config: Any) -> TextGeometry:
    """Args: config: transformers' text configuration of a dense decoder."""
    num_heads = config.num_attention_heads
    num_windowed = list(getattr(config, "layer_types", None) or ()).count(LayerKind.SLIDING)
    return TextGeometry(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=num_heads,
        num_kv_heads=config.num_key_value_heads,
        head_size=getattr(config, "head_dim", None) or config.hidden_size // num_heads,
        vocab_size=config.vocab_size,
        num_windowed_layers=num_windowed,
        window=config.sliding_window if num_windowed else 0,
    )


def layer_specs(config: Any) -> tuple[LayerSpec, ...]:
    """A configuration without `layer_types` has full attention throughout.

    Raises:
        ModelLoadError: a kind of layer that is none of ours.
    """
    geometry = text_geometry(config)
    names = getattr(config, "layer_types", None) or [LayerKind.FULL] * geometry.num_layers
    unknown = sorted(set(names) - set(LayerKind))
    if unknown:
        raise ModelLoadError(
            f"config.json's layer_types has '{unknown[0]}', which is not supported; supported are: "
            f"{', '.join(LayerKind)}"
        )
    kinds = [LayerKind(name) for name in names]
    return tuple(
        LayerSpec(
            kind,
            geometry.num_kv_heads,
            geometry.head_size,
            window=config.sliding_window if kind is LayerKind.SLIDING else None,
        )
        for kind in kinds
    )
