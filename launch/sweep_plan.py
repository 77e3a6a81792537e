"""The arms of a sweep, the runs that they consist of, and which of these are finished."""

import itertools
import math
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import configurations, needs
from cli.flags import Range, flag, flags_of
from cli.options import near
from cli.parser import UsageError, parse, shown, words_of
from cli.paths import ROOT, PathStr
from cli.settings import COUNT, SEED, Settings, names_of
from continual_datasets.class_order import read_class_order
from launch.submitit_jobs import JobOptions
from reports import stored_runs
from reports.stored_runs import ResultsError, StoredRun

SWEEP_DIR = ROOT / "configs" / "sweeps"

#: How an axis of `--grid` is written.
GRID: Range = ("must be NAME=VALUE,...", re.compile(r"[A-Za-z][\w-]*=.").match)

#: Settings that sweep.py gives to each run.
_GIVEN = ("seed", "seeds", "output_dir", "resume")

#: Most arms that a sweep can have.
_MOST_ARMS = 10_000

#: What names of folders cannot have.
_UNFIT = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class SweepOptions(JobOptions):
    """Options of sweep.py."""

    grid: tuple[str, ...] | None = flag(
        None,
        "settings and their values, NAME=VALUE,..., all of which are combined; no SWEEP then",
        range=GRID,
    )
    output_dir: PathStr = flag("", "folder of the sweep: each run goes to DIR/ARM/seedSEED")
    seeds: tuple[int, ...] = flag((42,), "seeds of each arm", range=SEED)
    jobs: int | None = flag(None, "local runs at a time, which share cores and GPUs", range=COUNT)
    list: bool = flag(False, "show the sweeps, and stop")
    dry_run: bool = flag(False, "show what would run, and stop")
    submitit: bool = flag(False, "run as an array of jobs")
    max_parallel: int | None = flag(None, "jobs of the array that run at a time", range=COUNT)

    @property
    def folder(self) -> Path:
        """Folder of the sweep."""
        return Path(self.output_dir).absolute()

    def problems(self) -> Sequence[str]:
        """What is wrong with them together."""
        problems = ["--output_dir is missing: name the folder of the sweep"] * (not self.output_dir)
        if not self.submitit:
            names = [*(one.name for one in flags_of(JobOptions)), "max_parallel"]
            given = [name for name in names if getattr(self, name) != getattr(SweepOptions, name)]
            return problems + [f"--{name} is for jobs: give --submitit, too" for name in given]
        if self.jobs is not None:
            problems.append("--jobs is for runs of this machine: give --max_parallel instead")
        return [*problems, *super().problems()]


@dataclass(frozen=True)
class Run:
    """One arm with one seed."""

    name: str  # ARM/seedSEED, its folder relative to that of the sweep
    folder: Path  # of its results
    argv: list[str]  # of main.py
    settings: Settings  # that they stand for

    def results(self) -> StoredRun | None:
        """Its results; None: it is not finished."""
        with suppress(ResultsError):
            return stored_runs.read(self.folder)
        return None


@dataclass(frozen=True)
class Sweep:
    """The runs that a command line asks for."""

    name: str  # of the sweep file, or --grid
    runs: list[Run]
    left_out: dict[str, list[str]]  # names of arms that do not run, by reason
    axes: list[str]  # settings on the x axis and for the lines of the figure `accuracy_against`


def list_sweeps() -> str:
    """The sweeps that ship with the program, each with its first line, as text."""
    lines = ["Sweeps (python sweep.py SWEEP CONFIG ... --output_dir DIR):"]
    for path in sorted(SWEEP_DIR.glob("*.yaml")):
        lines.append(f"  {path.stem:16}{path.read_text('utf-8').splitlines()[0][2:]}")
    return "\n".join(lines)


def make_sweep(options: SweepOptions, base: Sequence[str], problems: Sequence[str] = ()) -> Sweep:
    """Finds the runs of a sweep, of which `base` has the name, and arguments that all runs share.

    Raises:
        UsageError: If something cannot be read, or no arm is possible, with everything wrong and
            the problems that are known already.
    """
    from experiment.validate import validate
    from model.backbone import WeightsError, with_own_norm

    name, *base = ["--grid", *base] if options.grid else base or [""]
    try:
        arms, axes = expand(name, read_grid(options.grid) if options.grid else read_file(name))
    except ValueError as error:
        raise UsageError([*problems, str(error)]) from error
    runs: list[Run] = []
    reasons = defaultdict[str, list[str]](list)
    twins: dict[str, str] = {}  # arms by their settings
    is_readable = True
    for arm, values in arms.items():
        argv = [*base, *_arguments(values)]
        settings, found = parse(argv)
        with suppress(WeightsError):  # which `validate` reports
            settings = with_own_norm(settings)
        given = [name for name in _GIVEN if name in settings.given.flags]
        found = [*problems, *found, *(f"--{n}: sweep.py sets it: leave it out" for n in given)]
        is_readable &= not found
        own = []
        for seed in dict.fromkeys(options.seeds):
            folder = options.folder / arm / f"seed{seed}"
            last: dict[str, Any] = {"seed": seed, "output_dir": str(folder), "resume": "auto"}
            words = [*argv, *_arguments(last)]
            own.append(Run(f"{arm}/seed{seed}", folder, words, settings.replace(**last)))
        try:
            validate(own[0].settings, found, elsewhere=options.submitit)
        except UsageError as error:
            for problem in error.problems:
                reasons[problem].append(arm)
            continue
        twin = twins.setdefault(_effective(own[0].settings), arm)
        if twin == arm:
            runs += own
        else:
            reasons[f"equal to {twin}: what differs has no effect"].append(arm)
    if not (is_readable and runs):
        raise UsageError(
            problem if len(own_arms) == len(arms) else f"{', '.join(own_arms)}: {problem}"
            for problem, own_arms in reasons.items()
        )
    return Sweep(name, runs, reasons, axes)


def read_file(name: str) -> dict[str, Any]:
    """The content of a file of configs/sweeps/, named without its ending, or of a .yaml file.

    Raises:
        ValueError: If there is none, or it cannot be read.
    """
    path = name if configurations.is_file_name(name) else str(SWEEP_DIR / f"{name}.yaml")
    if not configurations.exists(path):
        given = f"{name!r} is no sweep" if name else "no sweep is given"
        hint = near(name, [path.stem for path in SWEEP_DIR.glob("*.yaml")])
        advice = ": begin with one of --list, or a file that ends in .yaml, or give --grid"
        raise ValueError(f"{given}{hint or advice}")
    return configurations.load(path)


def read_grid(texts: Sequence[str]) -> dict[str, Any]:
    """The same from texts of the form `name=value,value`."""
    grid = defaultdict[str, list[str]](list)
    for name, _, values in (text.partition("=") for text in texts):
        grid[name.replace("-", "_")] += values.split(",")
    return {"grid": dict(grid)}


def expand(name: str, content: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Combines the arms of a sweep, if any, with all values of its grid, if any.

    Returns:
        The settings of each arm, by the name that its folder gets; and the axes, see `Sweep`.

    Raises:
        ValueError: If the content is of another form, or two arms would have the same folder.
    """
    arms, grid = content.get("arms", {}), content.get("grid", {})
    if not (
        content.keys() <= {"arms", "grid", "against", "lines"}
        and isinstance(arms, dict)
        and isinstance(grid, dict)
        and (arms or grid)
        and all(isinstance(settings or {}, dict) for settings in arms.values())
        and all(isinstance(values, list) and values for values in grid.values())
        and all(isinstance(content.get(axis, ""), str) for axis in ("against", "lines"))
    ):
        problem = f"{name}: must hold arms, lines of `name: {{setting: value}}`, or grid, lines of "
        raise ValueError(problem + "`setting: [value, ...]`, or both, and may set against, lines")
    if (number := math.prod(map(len, [arms or "1", *grid.values()]))) > _MOST_ARMS:
        raise ValueError(f"{name}: makes {number} arms, {_MOST_ARMS} is the most")
    combined: dict[str, dict[str, Any]] = {}
    combinations = itertools.product((arms or {"": {}}).items(), itertools.product(*grid.values()))
    for (arm, own), combination in combinations:
        values = dict(zip(grid, combination, strict=True))
        words = [f"{key}={_UNFIT.sub('_', shown(value))}" for key, value in values.items()]
        full_name = ",".join(filter(None, [str(arm).replace("/", "_"), *words]))
        if not full_name.isprintable() or full_name[:1] in ("", "."):
            raise ValueError(f"{name}: the arm {full_name} has no name for a folder: rename it")
        if full_name in combined:
            raise ValueError(f"{name}: two arms have the name and the folder {full_name}")
        combined[full_name] = {**(own or {}), **values}
    axes = [content[axis] for axis in ("against", "lines") if axis in content]
    varied = [setting for setting, values in grid.items() if len(values) > 1]
    if not arms and len(varied) <= 2:
        axes += [setting for setting in varied if setting not in axes]
    return combined, axes[:2]


def finished(runs: Sequence[Run], num_processes: int) -> list[Run]:
    """The runs that are finished, each of which has so many processes.

    Raises:
        UsageError: If the folder of a run holds a run with other settings, with the differences.
    """
    problems = []
    done = [run for run in runs if run.results()]
    for run in done:  # main.py itself compares the settings of an unfinished run
        if differences := "; ".join(_differences(run, num_processes)):
            problem = f"{run.folder} holds a run with other settings: {differences}; "
            problems.append(problem + "give another --output_dir, or move it away")
    if problems:
        raise UsageError(problems)
    return done


def _effective(settings: Settings) -> str:
    """The settings that decide what a run does, as text."""
    return str(sorted(needs.effective(settings.replace(output_dir="").stored()).items()))


def _arguments(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of main.py."""
    argv = []
    for name, value in settings.items():
        argv += [f"--{name}", *([word for word in words_of(value) if word] or ["none"])]
    return argv


def _differences(run: Run, num_processes: int) -> Iterator[str]:
    """How the finished run that is stored in the folder of a run differs from it.

    Settings are compared, not the keys of `stored_runs`: those need weights and data, which are
    read when the run starts, perhaps on another machine.
    """
    results = stored_runs.load_results(run.folder)
    wanted, stored = run.settings.stored(), {**Settings().stored(), **results["config"]}
    images = wanted["images_per_step"] = wanted["batch_size"] * num_processes
    stored["images_per_step"] = results.get("run", {}).get("images_per_step", images)
    free = {*names_of("compute", "place")} - {"pretrained"}
    wanted, stored = needs.effective(wanted), needs.effective(stored)
    for config in (wanted, stored):
        config["vote_group_size"] = config["vote_group_size"] or config["batch_size"]
        config["pretrained"] = Path(str(config["pretrained"])).name  # wherever the file is
        if "imagefolder" in str(config["dataset"]).lower():
            free -= {"data_path"}
            config["data_path"] = os.path.realpath(os.path.expanduser(config["data_path"]))
    if path := wanted["class_order"]:
        wanted["class_order"], learned = [], list(itertools.chain(*results.get("class_order", [])))
        stored["class_order"] = learned
        with suppress(ValueError, OSError):  # a file that main.py will reject
            order = read_class_order(Path(path), results.get("class_names", []))
            wanted["class_order"] = order[: len(learned)]
    for name in sorted(wanted.keys() - free):
        if stored.get(name) != wanted[name]:
            yield f"{name} {shown(stored.get(name))} in place of {shown(wanted[name])}"
