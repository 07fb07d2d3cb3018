"""Where in a clip the frames stand that a model is shown, as its processor chooses them. Standard
library only.

- `floor`: the first and the last frame and others evenly between them, rounded down
  (LLaVA-OneVision; models that know images alone);
- `nearest`: the same, rounded to the nearest frame (Qwen3-VL);
- `starts`: the first frame of each of so many equal parts (Qwen2.5-VL).
"""

from typing import Literal

Spread = Literal["floor", "nearest", "starts"]

DEFAULT_SPREAD: Spread = "floor"
