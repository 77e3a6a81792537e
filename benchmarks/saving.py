"""The share of its time that a run spends on saving states, checkpoints and results.

    python benchmarks/saving.py [CONFIG ...] [--flags of main.py]

The run is one of main.py in this process (default: digits_l2p), into a temporary folder.
"""

import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import engine
import main
from experiment import training_run


def measure(argv: list[str]) -> None:
    """Runs main.py and prints its seconds, those of saving, and their ratio."""
    seconds: list[float] = []
    total = 0.0

    def time_method(name: str) -> None:
        method = getattr(training_run.Checkpointer, name)

        def timed(*args: object, **kwargs: object) -> None:
            start = time.perf_counter()
            method(*args, **kwargs)
            seconds.append(time.perf_counter() - start)

        setattr(training_run.Checkpointer, name, timed)

    for name in ("at_boundary", "at_task_end"):
        time_method(name)
    train = engine.train_and_evaluate

    def whole(*args: object) -> None:
        nonlocal total
        start = time.perf_counter()
        train(*args)  # type: ignore[arg-type]
        total = time.perf_counter() - start

    engine.train_and_evaluate = whole  # type: ignore[assignment]
    with tempfile.TemporaryDirectory(dir=".") as folder:
        code = main.main([*argv, "--output_dir", folder])
    if code != 0:
        sys.exit(code)
    saves = [s for s in seconds if s > 1e-4]  # the others wrote nothing
    print(f"\ntraining and evaluation {total:.2f} s, of which saving {sum(seconds):.3f} s")
    print(f"{len(saves)} files or states, at most {1000 * max(saves):.1f} ms each")
    print(f"share of saving: {100 * sum(seconds) / total:.2f} %")


if __name__ == "__main__":
    measure(sys.argv[1:] or ["digits_l2p"])
