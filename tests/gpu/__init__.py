"""What only a CUDA device can show. Marked `gpu`; skipped where there is none."""
