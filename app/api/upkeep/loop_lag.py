"""How late the event loop is: what every stream and every other request waits for, whoever is to
blame. Sampled, so a stall shorter than `PERIOD_S` is seen by chance, a longer one always.
"""

import asyncio
from collections.abc import Callable

PERIOD_S = 0.1


async def watch_loop_lag(observe: Callable[[float], None]) -> None:
    """Tells `observe`, each `PERIOD_S`, by how many seconds a timer was late. Until cancelled."""
    loop = asyncio.get_running_loop()
    while True:
        due_at = loop.time() + PERIOD_S
        await asyncio.sleep(PERIOD_S)
        observe(max(0.0, loop.time() - due_at))
