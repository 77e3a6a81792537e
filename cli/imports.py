"""Importing torch and what needs it, faster."""

import atexit
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quick_imports() -> Iterator[None]:
    """Imports in its body without the garbage collector: a quarter of the time.

    What is imported stays to the end, so the collector need not look through it later, either.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # warnings come with a trace of C++
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else extension modules report leaks
