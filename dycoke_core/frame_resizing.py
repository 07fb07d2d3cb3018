"""How frames come to the size at which a model takes them. Standard library only.

- `decoder`: while they are decoded, by FFmpeg's bicubic filter, colours at the resolution that the
  video has them in, mostly half (LLaVA-OneVision);
- `bicubic`, `bilinear`: decoded whole, turned into RGB, then by Pillow's filter of that name, as
  the processors of Qwen's models and of Gemma 3 do it.
"""

from typing import Literal

Resizing = Literal["decoder", "bicubic", "bilinear"]

DEFAULT_RESIZING: Resizing = "decoder"
