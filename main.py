"""Trains and evaluates L2P from the command line.

    python main.py [CONFIG ...] [--flags]
    python -m torch.distributed.launch --nproc_per_node=N --use_env main.py [CONFIG ...] [--flags]

Exit code: 0 done, 1 stopped by an error that is told, 2 refused command line, 75 stopped by a
signal and ready to go on with `--resume auto`, 130 interrupted.

torch and timm take seconds to import. `--help` and `--list` answer without them: only `program`
and what it imports may need them.
"""

import atexit
import functools
import gc
import sys
from types import ModuleType

from cli import options
from experiment import signals as stop_signals
from experiment.signals import StopSignals


def main(argv: list[str] | None = None) -> int:
    """Runs one command line.

    Args:
        argv: Arguments without the program's name; None: those of the process.

    Returns:
        The exit code.
    """
    signals = StopSignals()
    signals.defer()  # an import that is cut short cannot be made up for
    with signals:
        code = _main(sys.argv[1:] if argv is None else argv, signals)
    if code == stop_signals.EXIT_CODE:
        signals.hand_on()
    return code


def _main(argv: list[str], signals: StopSignals) -> int:
    try:
        args, problems = options.parse_args(argv)
        if args.list:
            print(options.list_configs())
            return 0
        program = _import_program()
    except KeyboardInterrupt:
        print("interrupted before anything ran", file=sys.stderr)
        return 130
    return program.run(args, problems, signals)


@functools.cache
def _import_program() -> ModuleType:
    """Imports what runs a command line, without the garbage collector: a quarter of the time.

    What is imported stays to the end, so the collector need not look through it later, either.
    """
    gc.disable()
    try:
        from experiment import program
    finally:
        gc.enable()
    gc.freeze()
    atexit.register(gc.unfreeze)  # else extension modules report leaks
    return program


if __name__ == "__main__":
    exit_code = main()
    stop_signals.ignore_stop_signals()
    sys.exit(exit_code)
