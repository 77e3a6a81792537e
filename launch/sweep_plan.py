"""The arms of a sweep, the runs that they consist of, and which of these are finished."""

import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cli import configurations
from cli.parser import UsageError, parse, shown
from cli.paths import ROOT
from cli.settings import Settings, names_of
from launch.options import SweepOptions
from reports import stored_runs
from reports.stored_runs import ResultsError

SWEEP_DIR = ROOT / "configs" / "sweeps"

#: Settings that sweep.py gives to each run.
_GIVEN = ("seed", "seeds", "output_dir", "resume")

#: What names of folders cannot have.
_UNFIT = re.compile(r"[^\w.+-]+")


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        name: ARM/seedSEED, its folder relative to that of the sweep.
        folder: Folder of its results.
        argv: Arguments of main.py.
        settings: The settings that they stand for.
    """

    name: str
    folder: Path
    argv: list[str]
    settings: Settings


@dataclass(frozen=True)
class Sweep:
    """The runs that a command line asks for.

    Attributes:
        name: Name of the sweep file, or --grid.
        runs: A run for each arm and seed.
        left_out: Names of impossible arms by the reason.
        axes: Settings on the x axis and for the lines of the figure `accuracy_against`.
    """

    name: str
    runs: list[Run]
    left_out: dict[str, list[str]]
    axes: Sequence[str]


def list_sweeps() -> str:
    """The sweeps that ship with the program, each with its first line, as text."""
    lines = ["Sweeps (python sweep.py SWEEP CONFIG ... --output_dir DIR):"]
    for path in sorted(SWEEP_DIR.glob("*.yaml")):
        lines.append(f"  {path.stem:16}{path.read_text('utf-8').splitlines()[0][2:]}")
    return "\n".join(lines)


def make_sweep(options: SweepOptions, base: Sequence[str], problems: Sequence[str] = ()) -> Sweep:
    """Finds the runs of a sweep.

    Args:
        options: Options of sweep.py.
        base: The rest of the command line: the sweep, unless `--grid` gives it, and arguments of
            main.py that all runs share.
        problems: What is known to be wrong already.

    Raises:
        UsageError: If something cannot be read, or no arm is possible, with everything wrong.
    """
    from experiment.validate import validate

    name, *base = ["--grid", *base] if options.grid else base or [""]
    arms, axes = expand(name, read_grid(options.grid) if options.grid else read_file(name))
    runs: list[Run] = []
    reasons: dict[str, list[str]] = {}
    is_readable = True
    for arm, values in arms.items():
        argv = [*base, *(word for item in values.items() for word in _words(*item))]
        settings, found = parse(argv)
        given = [name for name in settings.given.flags if name in _GIVEN]
        found = [*problems, *found, *(f"--{n}: sweep.py sets it: leave it out" for n in given)]
        is_readable &= not found
        own = [_make_run(arm, seed, argv, options.folder) for seed in dict.fromkeys(options.seeds)]
        try:
            validate(own[0].settings, found, elsewhere=options.submitit)
            runs += own
        except UsageError as error:
            for problem in error.problems:
                reasons.setdefault(problem, []).append(arm)
    if not (is_readable and runs):
        raise UsageError(
            problem if len(own_arms) == len(arms) else f"{', '.join(own_arms)}: {problem}"
            for problem, own_arms in reasons.items()
        )
    return Sweep(name, runs, reasons, axes)


def read_file(name: str) -> dict[str, Any]:
    """The content of a file of configs/sweeps/, named without its ending, or of a .yaml file.

    Raises:
        UsageError: If there is none, or it cannot be read.
    """
    path = name if configurations.is_file_name(name) else str(SWEEP_DIR / f"{name}.yaml")
    if not Path(path).expanduser().is_file():
        problem = f"{name!r} is no sweep: begin with one of --list, or a file that ends in .yaml"
        raise UsageError([f"{problem}, or give --grid"])
    try:
        return configurations.load(path)
    except ValueError as error:
        raise UsageError([str(error)]) from error


def read_grid(texts: Sequence[str]) -> dict[str, Any]:
    """The same from texts of the form `name=value,value`."""
    grid: dict[str, list[str]] = {}
    for name, _, values in (text.partition("=") for text in texts):
        grid.setdefault(name.replace("-", "_"), []).extend(values.split(","))
    return {"grid": grid}


def expand(name: str, content: dict[str, Any]) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Combines the arms of a sweep, if any, with all values of its grid, if any.

    Args:
        name: Name of the sweep.
        content: `arms`, `grid`, and the axes `against` and `lines`; all are optional.

    Returns:
        The settings of each arm, by the name that its folder gets; and the axes, see `Sweep`.

    Raises:
        UsageError: If the content is of another form, or two arms would have the same folder.
    """
    arms, grid = content.get("arms", {}), content.get("grid", {})
    if not (
        content.keys() <= {"arms", "grid", "against", "lines"}
        and isinstance(arms, dict)
        and isinstance(grid, dict)
        and (arms or grid)
        and all(isinstance(settings or {}, dict) for settings in arms.values())
        and all(isinstance(values, list) and values for values in grid.values())
    ):
        problem = f"{name}: must hold arms, lines of `name: {{setting: value}}`, or grid, lines of "
        raise UsageError([problem + "`setting: [value, ...]`, or both, and may set against, lines"])
    combined: dict[str, dict[str, Any]] = {}
    combinations = itertools.product((arms or {"": {}}).items(), itertools.product(*grid.values()))
    for (arm, own), combination in combinations:
        values = dict(zip(grid, combination, strict=True))
        words = [f"{key}={_UNFIT.sub('_', shown(value))}" for key, value in values.items()]
        full_name = ",".join(filter(None, [str(arm).replace("/", "_"), *words]))
        if full_name in combined:
            raise UsageError([f"{name}: two arms have the name and the folder {full_name}"])
        combined[full_name] = {**(own or {}), **values}
    varied = [setting for setting, values in grid.items() if len(values) > 1]
    axes = [content[axis] for axis in ("against", "lines") if axis in content]
    if not arms and len(varied) <= 2:
        axes += [setting for setting in varied if setting not in axes]
    return combined, axes[:2]


def finished(runs: Sequence[Run], num_processes: int) -> list[Run]:
    """The runs that are finished, each of which has so many processes.

    Raises:
        UsageError: If the folder of a run holds a run with other settings, with the differences.
    """
    done, problems = [], []
    for run in runs:
        with suppress(ResultsError):  # main.py itself compares the settings of an unfinished run
            stored_runs.read(run.folder)
            done.append(run)
            if differences := "; ".join(_differences(run, num_processes)):
                problem = f"{run.folder} holds a run with other settings: {differences}; "
                problems.append(problem + "give another --output_dir, or move it away")
    if problems:
        raise UsageError(problems)
    return done


def _words(name: str, value: Any) -> list[str]:
    """A setting as arguments of main.py."""
    words = shown(value).split() if isinstance(value, dict | list) else [shown(value)]
    return [f"--{name}", *words]


def _make_run(arm: str, seed: int, argv: list[str], folder: Path) -> Run:
    name = f"{arm}/seed{seed}"
    own = ["--seed", str(seed), "--output_dir", str(folder / name), "--resume", "auto"]
    return Run(name, folder / name, [*argv, *own], parse([*argv, *own])[0])


def _differences(run: Run, num_processes: int) -> Iterator[str]:
    """How the finished run that is stored in the folder of a run differs from it."""
    results = stored_runs.load_results(run.folder)
    wanted, stored = run.settings.stored(), {**Settings().stored(), **results["config"]}
    images = wanted["images_per_step"] = wanted["batch_size"] * num_processes
    stored["images_per_step"] = results.get("run", {}).get("images_per_step", images)
    free = {*names_of("compute", "place")} - {"pretrained"}
    for config in (wanted, stored):
        config["vote_group_size"] = config["vote_group_size"] or config["batch_size"]
        config["pretrained"] = Path(str(config["pretrained"])).name  # wherever the file is
        if "imagefolder" in str(config["dataset"]).lower():
            free -= {"data_path"}
            config["data_path"] = str(Path(config["data_path"]).expanduser().resolve())
    if wanted["class_order"] is not None:
        stored["class_order"] = list(itertools.chain(*results["class_order"]))
        wanted["class_order"] = _read_order(Path(wanted["class_order"]), results)
    for name in sorted(wanted.keys() - free):
        if stored.get(name) != wanted[name]:
            yield f"{name} {shown(stored.get(name))} in place of {shown(wanted[name])}"


def _read_order(path: Path, results: dict[str, Any]) -> list[int]:
    """The class order of a file, as far as a run has learned its classes."""
    from continual_datasets.class_order import read_class_order

    with suppress(ValueError, OSError):  # a file that main.py will reject
        order = read_class_order(path, results["class_names"])
        return order[: sum(map(len, results["class_order"]))]
    return []
