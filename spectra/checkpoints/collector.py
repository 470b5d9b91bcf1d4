"""Python's cyclic garbage collector, out of the way while a header becomes objects."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused_collector() -> Iterator[None]:
    """Keep the cyclic collector from running inside the block; objects without cycles are freed as ever.

    Fifty thousand tensors are a million small objects, none of them garbage, and the collector walks over all that are
    there each time that their number has grown by a quarter: a third of the time that describing them takes. It is
    off for the whole process, and on again when the block that turned it off is left.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
