"""DyCoke for video language models: compression, engine, frame reading. No web, Redis or metrics.

Dimension letters used in shape comments throughout the package:

    B batch        F frames           N visual tokens per frame     D hidden size
    T layers       H query heads      G key/value heads             E head size
    S cached tokens                   V visual tokens after stage I

This module imports nothing, so that processes without torch can import `dycoke_core.config`,
`dycoke_core.errors` and `dycoke_core.video`.
"""
