"""When Python may look for garbage."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collection_paused() -> Iterator[None]:
    """No finalizer runs on garbage inside the block.

    Before 3.11.8, `ast.parse` raises `SystemError` (AST constructor recursion depth mismatch) where
    something else parses meanwhile: a collection that starts within it, and in it the logging of a
    traceback, say of a task whose exception nobody retrieved.
    Source: https://github.com/python/cpython/issues/106905
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
