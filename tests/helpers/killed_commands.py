"""Commands in processes of their own, which end when the test wants it."""

import mmap
import os
import signal
import sys
import threading
import time
import traceback

from tqdm import tqdm

import engine
import main
from reports import files


def in_child(function, *args):
    """Begins a process that does no more than that and ends with the code that it returns."""
    if (pid := os.fork()) == 0:
        code = 70
        try:
            signal.alarm(60)
            tqdm.set_lock(threading.RLock())  # the usual one is held for ever if it is killed
            code = function(*args) or 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return pid


def exit_code(pid):
    """Waits for the end of a process."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


class Child:
    """A command in a process of its own, to be killed when it has begun something so many times.

    Args:
        argv: The command line.
        log: File for what it says.
        moment: How many of the things in `DOING` it begins before it is to be killed.
        only: Which of them counts; it waits there to be killed. None: all, and it continues.
        prepare: What it does first.
    """

    DOING = {  # noqa: RUF012
        "training": (engine, "train_step"),
        "evaluation": (engine, "evaluate"),
        "saving": (files, "write_whole"),
    }

    def __init__(self, argv, log, moment, only=None, prepare=lambda: None):
        self._shared = memoryview(mmap.mmap(-1, 64)).cast("q")  # what it does, finished steps
        self._begun, self._bell = os.pipe()
        self._left, self._only = moment, only
        self.pid = in_child(self._run, argv, log, prepare)
        os.close(self._bell)

    @property
    def doing(self):
        return ["something else", *self.DOING][self._shared[0]]

    @property
    def steps(self):
        return self._shared[1]

    def kill(self, number, delay=0.0, send=os.kill):
        """Sends the signal when the moment has come, and gives the exit code."""
        if os.read(self._begun, 1):
            time.sleep(delay)
            send(self.pid, number)
        os.close(self._begun)
        return exit_code(self.pid)

    def _run(self, argv, log, prepare):
        prepare()
        sys.stdout = sys.stderr = log.open("a")
        for number, (name, place) in enumerate(self.DOING.items(), 1):
            setattr(*place, self._watched(getattr(*place), number, name))
        return main.main(argv)

    def _watched(self, function, number, name):
        def watched(*args, **kwargs):
            outer, self._shared[0] = self._shared[0], number
            self._left -= self._only in (None, name)
            if self._left == 0:
                os.write(self._bell, b"!")
                self._left = -1
                time.sleep(60 if self._only else 0)
            result = function(*args, **kwargs)
            self._shared[0] = outer
            self._shared[1] += number == 1
            return result

        return watched


def four_tasks(command):
    """A run of many short parts: 32 steps, 16 epochs, 10 evaluations."""
    return [*command, "--num_tasks", "4", "--size", "8", "--batch-size", "4", "--epochs", "4"]
