"""The card of a small worker."""

from typing import Any

from app.messages import ModelCard


def model_card(worker_id: str = "w", **fields: Any) -> ModelCard:
    usual = {
        "model": "m",
        "weights_digest": "d",
        "device": "cpu",
        "dtype": "float32",
        "image_size": 8,
        "tokens_per_frame": 10,
        "num_layers": 1,
        "max_model_tokens": 1000,
        "prefill_chunk_tokens": 64,
        "max_running_jobs": 1,
        "running_jobs": 0,
    }
    return ModelCard(worker_id=worker_id, **usual | fields)
