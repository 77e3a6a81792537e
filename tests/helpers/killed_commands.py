"""Commands in processes of their own, which end when the test wants it."""

import os
import signal
import threading
import traceback

from tqdm import tqdm

import main
from experiment.signals import ignore_stop_signals


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


def ended(argv, number, seconds, _rank):
    """Runs a command, and sends its process a signal after so many seconds of computing."""
    ignore_stop_signals()  # before and behind what listens to them
    signal.signal(signal.SIGVTALRM, lambda *_: os.kill(os.getpid(), number))
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    return main.main(argv)
