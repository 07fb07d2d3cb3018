"""The bundled model, the synthetic world that it was trained on, and a clip of that world.

Small enough to ship with the source, trained well enough that its answers can be right or wrong.
"""

from pathlib import Path

CHECKPOINT = Path(__file__).parent / "checkpoint"
FIGURES = Path(__file__).parent / "training_log" / "accuracy.json"
CLIP = Path(__file__).parent / "clips" / "shapes.mp4"
