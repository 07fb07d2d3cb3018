"""DyCoke for video language models: compression, engine, frame reading. No web, Redis or metrics.

Dimension letters used in shape comments throughout the package:

    B batch        F frames           N visual tokens per frame     D hidden size
    T layers       H query heads      G key/value heads             E head size
    S cached tokens                   V visual tokens after stage I

This module imports no torch, so that processes without it can import `dycoke_core.config`,
`dycoke_core.errors` and `dycoke_core.video`.
"""

import os

# Idle OpenMP threads sleep instead of spinning, unless the environment says otherwise. Spinning
# gains a few per cent on an idle machine, and makes a step 10 to 50 times slower as soon as another
# process wants a core. It is read when torch loads, so it is set before.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
