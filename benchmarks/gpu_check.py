"""Checks and measures all that the program does on a GPU, in eight minutes.

    python benchmarks/gpu_check.py [--minutes 8] [--out FOLDER] [--only STAGES] [--tiny]

Stages run in order of worth, each in a process of its own, so that neither an error nor a stage
that hangs ends the others. Each has to end by a time of its own; what one leaves over, the next may
take. After each, FOLDER/report.json is written; at the end FOLDER/summary.md, which is printed. A
folder in FOLDER, named after the date, has the output of the stages and of their runs.
With `--tiny`, models and data are small, to try the check itself on any device.

Exit code: 0 if all stages that ran passed, 1 if not, 2 for a rejected command line or no GPU.
"""

import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] * (str(ROOT) not in sys.path)

from cli.flags import between, flag  # noqa: E402
from cli.options import take_all  # noqa: E402
from cli.parser import UsageError  # noqa: E402
from cli.paths import PathStr  # noqa: E402
from cli.terminal import reason, run_program  # noqa: E402
from reports import files  # noqa: E402

Found = dict[str, Any]


#: Seconds of eight minutes, and a function of a module, which says what passes.
STAGES = {
    "device": (35, "gpu_stages.find_device"),  # the first import of torch may take long
    "tests": (45, "gpu_runs.run_tests"),
    "images": (20, "gpu_stages.compare_images"),
    "attention": (40, "gpu_stages.time_attention"),
    "step": (70, "gpu_stages.train_steps"),
    "compile": (110, "gpu_stages.compile_steps"),
    "run": (60, "gpu_stages.extrapolate_run"),
    "digits": (35, "gpu_runs.run_digits"),
    "processes": (30, "gpu_runs.run_processes"),
    "memory": (15, "gpu_runs.run_out_of_memory"),
    "loaders": (20, "gpu_stages.time_loaders"),
}
_WORK = (
    "import json, sys; from benchmarks import gpu_check as it; it.work(*json.loads(sys.argv[1]))"
)
_NEED_CUDA = "tests", "compile", "memory"
#: Minutes for which the seconds of the stages are meant.
_MINUTES = 8
_TWO_GPUS = "Needs two GPUs: NCCL between two processes, in the stage `processes`; no other stage."


@dataclass(frozen=True)
class CheckOptions:
    """Options of this program."""

    minutes: float = flag(_MINUTES, "minutes in all", range=between(0.1, 1000))
    out: PathStr = flag("gpu_check", "folder of the report")
    only: str = flag(",".join(STAGES), "stages to run after `device`, with commas between")
    tiny: bool = flag(False, "small models and data, to try the check itself on any device")

    def problems(self) -> list[str]:
        """What is wrong with them together."""
        unknown = [name for name in self.only.split(",") if name not in STAGES]
        return [f"--only: {name!r} is none of {', '.join(STAGES)}" for name in unknown]


@dataclass
class Check:
    """A stage under way, in its own process: what it works with, and what it finds."""

    folder: Path  # of the findings of all stages; in it is a folder for its own files
    name: str
    ends: float  # when it is ended, by `time.monotonic`, which all processes of a machine share
    tiny: bool = False  # whether models and data are small
    found: Found = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.facts = self.earlier("device")  # what the first stage found
        self.device = str(self.facts.get("device", "cpu"))
        self.on_cuda = self.device != "cpu"
        self.computes = bool(self.facts.get("computes", True))
        self.own = self.folder / self.name

    @property
    def seconds_left(self) -> float:
        """Seconds until it is ended."""
        return self.ends - time.monotonic()

    def earlier(self, name: str) -> Found:
        """What a stage before this one found."""
        return dict(_read(self.folder / f"{name}.json")["found"])

    def note(self, **found: Any) -> None:
        """Adds findings."""
        self.found |= found
        text = json.dumps({"found": self.found, "failures": self.failures}, default=str)
        short = json.loads(text, parse_float=lambda x: float(f"{float(x):.4g}"), parse_constant=str)
        files.write_json(self.folder / f"{self.name}.json", short)

    def expect(self, what: str, holds: bool, of_values: bool = True) -> None:
        """Fails the stage unless something holds; `of_values`: if kernels compute anything."""
        if of_values and not self.computes:
            self.note(values="values skipped: the kernels of this GPU do nothing")
        elif not holds:
            self.failures.append(what)
            self.note()


def main(argv: list[str] | None = None) -> int:
    """Runs one command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    options, others, problems = take_all(
        CheckOptions, argv, prog="gpu_check.py", usage="gpu_check.py [--flags]",
        description="Checks and measures all that the program does on a GPU.",
    )  # fmt: skip
    folder, date = Path(options.out).absolute(), datetime.now().isoformat(timespec="seconds")
    own, ends = folder / date.replace(":", ""), time.monotonic()
    problems += [f"{word}: there are flags only" for word in others]
    try:
        if not problems:
            own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        problems.append(f"--out: {error}")
    if problems:
        return UsageError(problems).report("gpu_check.py")
    stages, device = dict[str, Any](), Found()
    for name in (name for name in STAGES if name in ("device", *options.only.split(","))):
        ends += STAGES[name][0] * options.minutes / _MINUTES
        result: dict[str, Any] = {"status": "not run", "why": "needs CUDA", "found": {}}
        if device.get("device") != "cpu" or name not in _NEED_CUDA:
            result = _run(command(name, own, ends, options.tiny), own / name, ends)
        stages[name], device = result, device or result["found"]
        if device.get("device") == "cpu" and not options.tiny:
            problem = "torch finds no GPU here: --tiny tries the check without one"
            return UsageError([problem]).report("gpu_check.py")
        print(f"{name}: {result['status']} {result['why']}".rstrip(), file=sys.stderr, flush=True)
        files.write_json(folder / "report.json", {"date": date, "command": argv, "stages": stages})
        if "computes" not in device:  # the others depend on what the first finds
            break
    text = summary(date, stages, cells=device.get("computes", False) and not options.tiny)
    files.write_text(folder / "summary.md", text)
    print(text)
    return int(any(result["status"] == "failed" for result in stages.values()))


def command(name: str, folder: Path, ends: float, tiny: bool) -> list[str]:
    """The command line of a stage, to be run in the folder of the program."""
    argument = json.dumps([name, str(folder), ends, tiny])
    return [sys.executable, "-c", _WORK, argument]


def work(name: str, folder: str, ends: float, tiny: bool) -> None:
    """A stage, in its own process."""
    check = Check(Path(folder), name, ends, tiny)
    try:
        check.own.mkdir(exist_ok=True)
        module, _, function = STAGES[name][1].partition(".")
        getattr(import_module(f"benchmarks.{module}"), function)(check)
    except BaseException as error:
        traceback.print_exc()  # into the log
        of_values = isinstance(error, ArithmeticError)  # such as a division by a sum
        check.expect(reason(error), False, of_values)


def _run(argv: list[str], path: Path, ends: float) -> dict[str, Any]:
    """Runs one stage, and ends it with all that it has started, at its deadline or before."""
    log, begin = path.with_suffix(".txt"), time.monotonic()
    with log.open("wb") as output:
        to_log: Any = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": output}
        process = subprocess.Popen(argv, cwd=ROOT, start_new_session=True, **to_log)
    code: int | None = None
    try:
        with suppress(subprocess.TimeoutExpired):
            code = process.wait(max(0.0, ends - begin))
    finally:
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(10)
    result = _read(path.with_suffix(".json"))
    seconds, why = time.monotonic() - begin, result.pop("failures")
    if code is None:
        why.append(f"ended at its deadline, after {seconds:.0f} s")
    elif code and not why:
        last = log.read_text(errors="replace").strip().rpartition("\n")[2]
        why.append(f"ended with {code}: {last[-300:]}")
    status = "failed" if why else "passed"
    why += [one for name, one in result["found"].items() if name == "values"]
    return {"status": status, "why": "; ".join(why), "seconds": round(seconds, 1), **result}


def _read(findings: Path) -> dict[str, Any]:
    found: dict[str, Any] = {"found": {}, "failures": []}
    return json.loads(findings.read_text()) if findings.exists() else found


def summary(date: str, stages: dict[str, Any], cells: bool) -> str:
    """The report as Markdown; at its end, if asked for, the cells of docs/speed.md."""
    lines = ["# GPU check", "", f"{date}. {_TWO_GPUS}", ""]
    lines += ["| stage | result | seconds | why |", "|---|---|---|---|"]
    for name, result in stages.items():
        why = result["why"].replace("|", "/").replace("\n", " ")
        lines.append(f"| {name} | {result['status']} | {result.get('seconds', '')} | {why} |")
    for name, result in stages.items():
        lines += ["", f"## {name}", "", *_items(result["found"])]
    if cells:
        lines += ["", "## For docs/speed.md", "", *_cells(stages)]
    return "\n".join([*lines, ""])


def _items(found: Found) -> Iterator[str]:
    """Findings as a list; those with several lines below it."""
    for name, value in found.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        lines = value if isinstance(value, list) else str(value).splitlines()
        yield f"- {name}:" + (f" {lines[0]}" if len(lines) == 1 else "")
        yield from (f"  - {one}" for one in lines if len(lines) > 1)


def _cells(stages: dict[str, Any]) -> Iterator[str]:
    """The table of docs/speed.md; cells of what was not measured are empty."""
    device, steps, run = (stages.get(n, {}).get("found", {}) for n in ("device", "compile", "run"))
    torch = device.get("versions", {}).get("torch")
    yield f"{device['gpu']}, driver {device['driver']}, torch {torch}, CUDA {device['cuda']}"
    yield from ("", "| ViT-B/16, `--amp bf16 --compile` | |", "|---|---|")
    for size in (128, 16):
        cell = "{images/s:.0f} images/s, {share of the matrix rate:.0%} of {rate:.0f} TFLOP/s"
        one = steps.get(f"at {size}") and steps[f"at {size}"] | {"rate": device["bf16 TFLOP/s"]}
        what = f"training step at batch {size}: images/s, share of the bf16 matrix rate"
        yield f"| {what} | {cell.format(**one) if one else ''} |"
    copies = run.get("two copies", {})
    for what, found in (
        ("Split CIFAR-100, 50,000 + 10,000 images", run),
        ("two copies in fp32", copies),
    ):
        seconds = found.get("whole run, seconds")
        yield f"| {what}, whole run | {f'{seconds:.0f} s, extrapolated' if seconds else ''} |"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that stages are ended, too
    run_program(main)
