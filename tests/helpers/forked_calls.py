"""Calls in forked processes."""

import multiprocessing


def start(target, *args):
    """Call a function in another process, which shares what the test has patched."""
    process = multiprocessing.get_context("fork").Process(target=target, args=args, daemon=True)
    process.start()
    return process


def finish(process):
    """Wait until a process has ended without an error."""
    process.join(20)
    assert process.exitcode == 0
