"""A bound on the processor time of a passage, for tests of what must not grow with its input's square or explode."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Fail if this thread computes for longer. What other tests have left in the process is not collected meanwhile:
    with torch and transformers loaded, one full collection takes longer than most bounds."""
    gc.collect()
    gc.disable()
    started = time.thread_time()
    try:
        yield
        taken = time.thread_time() - started
    finally:
        gc.enable()
    assert taken < seconds, f"{taken:.2f} s of processor time, where {seconds:g} are the bound"
