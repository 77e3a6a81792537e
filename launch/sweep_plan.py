"""The arms of a sweep, the runs that they consist of, and which of these are finished."""

import difflib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sequence, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cli import configurations
from cli.parser import UsageError, parse, read_mapping, shown
from cli.paths import ROOT
from cli.settings import LEGACY_FLAGS, Settings, find_flag, is_setting, names_of
from reports import stored_runs
from reports.stored_runs import ResultsError

SWEEP_DIR = ROOT / "configs" / "sweeps"

#: Keys of a sweep file.
_KEYS = ("arms", "grid", "against", "lines", "needs")

#: Settings that sweep.py gives to each run, or with which main.py does not train.
NOT_SWEPT = (
    "seed", "seeds", "output_dir", "resume", "eval", "checkpoint", "list", "dry_run",
    "speed_test_only",
)  # fmt: skip

#: What an arm may be called: its name is that of a folder.
_FOLDER_NAME = re.compile(r"[\w][\w.=,+-]*")

#: Names of folders that hold something else.
_TAKEN = ("jobs", "logs", *stored_runs.NO_RUNS)

#: Settings in which a finished run may differ from the one that is wanted.
_FREE = (*names_of("compute"), "file_lists")


@dataclass(frozen=True)
class Arm:
    """One set of settings of a sweep.

    Attributes:
        name: Its name, which is also that of its folder.
        settings: Settings on top of the base, by name.
    """

    name: str
    settings: dict[str, Any]

    def flags(self) -> list[str]:
        """The settings as arguments of main.py."""
        return [text for name, value in self.settings.items() for text in _arguments(name, value)]


@dataclass(frozen=True)
class Sweep:
    """A sweep file, or the grid of a command line.

    Attributes:
        name: Name of the sweep, as given on the command line.
        arms: All arms, each name once.
        is_grid: Whether arms are combinations of values, some of which may be impossible.
        against: Setting on the x axis of the figure `accuracy_against`; None: it is not drawn.
        lines: Setting whose values get a line each in that figure; None: one line.
        needs: What the base must be like, in words for messages.
    """

    name: str
    arms: tuple[Arm, ...]
    is_grid: bool
    against: str | None = None
    lines: str | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Run:
    """One arm with one seed.

    Attributes:
        arm: Name of the arm.
        seed: The seed.
        argv: Arguments of main.py, its folder included.
        folder: Folder of its results.
        config: Settings by name, as results.json stores them; the vote group size is resolved.
    """

    arm: str
    seed: int
    argv: tuple[str, ...]
    folder: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder, relative to that of the sweep."""
        return f"{self.arm}/seed{self.seed}"

    @property
    def command(self) -> str:
        """The command that runs it by hand."""
        return shlex.join(["python", "main.py", *self.argv])

    def result(self) -> str:
        """Accuracy and forgetting of the finished run, as text.

        Raises:
            ResultsError: If it is not finished.
        """
        stored = stored_runs.read(self.folder)
        forgetting = stored.value("instance", "forgetting")
        text = f"accuracy {stored.value('instance', 'accuracy'):.2f}"
        if forgetting is not None:
            text += f", forgetting {forgetting:.2f}"
        return f"{text} (instance-wise)"


def list_sweeps() -> str:
    """The sweeps that ship with the program, each with its first line, as text."""
    lines = {}
    for path in sorted(SWEEP_DIR.glob("*.yaml")):
        with path.open(encoding="utf-8") as file:
            lines[path.stem] = file.readline().removeprefix("#").strip()
    width = max(map(len, lines)) + 2
    found = (f"  {name:{width}}{line}" for name, line in lines.items())
    return "\n".join(["Sweeps (python sweep.py SWEEP CONFIG ... --output_dir DIR):", *found])


def load_sweep(name: str) -> Sweep:
    """Reads a sweep.

    Args:
        name: Name of a file of configs/sweeps/ without its ending, or path to a .yaml file.

    Raises:
        UsageError: With everything that is wrong with it.
    """
    content = _load(name)
    problems = [
        f"{name}: {key} is no part of a sweep: it has {', '.join(_KEYS)}"
        for key in content
        if key not in _KEYS
    ]
    arms, grid = content.get("arms") or {}, content.get("grid") or {}
    if not isinstance(arms, dict) or not all(isinstance(s or {}, dict) for s in arms.values()):
        problems.append(f"{name}: arms must be lines of `name: {{setting: value}}`")
        arms = {}
    if not isinstance(grid, dict) or not all(isinstance(v, list) and v for v in grid.values()):
        problems.append(f"{name}: grid must be lines of `setting: [value, ...]`")
        grid = {}
    if problems:
        raise UsageError(problems)
    sweep = make_sweep(name, {str(n): s or {} for n, s in arms.items()}, grid)
    against = content.get("against", sweep.against)
    others = [name for name in (sweep.against, sweep.lines) if name != against]
    lines = content.get("lines", next(iter(others), None))
    return replace(sweep, against=against, lines=lines, needs=content.get("needs"))


def make_sweep(name: str, arms: dict[str, dict[str, Any]], grid: dict[str, list[Any]]) -> Sweep:
    """Makes a sweep of named arms, of a grid of values, or of each arm with each combination.

    Args:
        name: Name of the sweep.
        arms: Settings of each arm by its name.
        grid: Values of each setting by its name.

    Raises:
        UsageError: With all unknown settings, values of the grid that cannot be read, and names
            that folders cannot have.
    """
    if not arms and not grid:
        raise UsageError([f"{name}: there is nothing in it, give arms or a grid"])
    combinations = [
        Arm(",".join(f"{n}={_as_name(v)}" for n, v in values.items()), values)
        for values in (dict(zip(grid, c, strict=True)) for c in itertools.product(*grid.values()))
    ]
    found = [
        Arm(",".join(filter(None, (arm, combination.name))), {**own, **combination.settings})
        for arm, own in (arms or {"": {}}).items()
        for combination in combinations
    ]
    names = [arm.name for arm in found]
    problems = [*_setting_problems(name, arms, grid)]
    problems += [
        f"{name}: there are two arms {n}" for n in dict.fromkeys(names) if names.count(n) > 1
    ]
    problems += [
        f"{name}: {arm!r} cannot be the name of an arm, whose folder it names: use letters, "
        "digits and _ . = , + -" + (f"; not {', '.join(_TAKEN)}" if arm in _TAKEN else "")
        for arm in names
        if not _FOLDER_NAME.fullmatch(arm) or arm in _TAKEN
    ]
    if problems:
        raise UsageError(problems)
    axes = [setting for setting, values in grid.items() if len(values) > 1]
    against, lines = [*axes, None, None][:2] if len(axes) <= 2 and not arms else (None, None)
    return Sweep(name, tuple(found), bool(grid), against, lines)


def parse_grid(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Reads `--grid`: texts of the form `name=value,value`.

    Returns:
        Values by name.

    Raises:
        UsageError: If a setting is named twice, or has no value.
    """
    pairs = [text.partition("=")[::2] for text in texts]
    names = [name.replace("-", "_") for name, _ in pairs]
    problems = [f"--grid names {n} twice" for n in dict.fromkeys(names) if names.count(n) > 1]
    problems += [
        f"--grid {name}={values}: a value is missing between commas"
        for name, values in pairs
        if "" in values.split(",")
    ]
    if problems:
        raise UsageError(problems)
    return {name: values.split(",") for name, (_, values) in zip(names, pairs, strict=True)}


def possible_runs(
    sweep: Sweep, seeds: Sequence[int], base: list[str], folder: Path, *, elsewhere: bool
) -> tuple[list[Run], dict[str, list[str]]]:
    """All runs, and the combinations of a grid that are impossible, with the reasons.

    Args:
        sweep: The sweep.
        seeds: Seeds of each arm, at least one.
        base: Arguments of main.py that all runs share.
        folder: Folder of the sweep.
        elsewhere: Whether the runs are jobs, whose devices and data are not checked here.

    Raises:
        UsageError: If the base or a named arm is impossible, no combination of a grid is possible,
            or two arms are the same.
    """
    runs: list[Run] = []
    problems: dict[str, list[str]] = {}
    for arm in sweep.arms:
        own = [_make_run(arm, seed, base, folder) for seed in seeds]
        if found := _check(own[0], elsewhere):
            problems[arm.name] = found
        else:
            runs += own
    shared = [
        problem
        for problem in next(iter(problems.values()), [])
        if len(problems) == len(sweep.arms) and all(problem in p for p in problems.values())
    ]
    own_problems = [
        f"{arm}: {p}" for arm, found in problems.items() for p in found if p not in shared
    ]
    if problems and not (sweep.is_grid and runs):
        raise UsageError([*shared, *own_problems])
    if same := _same_arms(sweep, runs):
        raise UsageError(same)
    return runs, problems


def finished(runs: list[Run], num_processes: int) -> list[Run]:
    """The runs that are finished.

    Args:
        runs: Runs of a sweep.
        num_processes: Processes that each of them has.

    Raises:
        UsageError: If the folder of a run holds a run with other settings, with the differences.
    """
    problems = []
    done = []
    for run in runs:
        if differences := _differences(run, num_processes):
            problems.append(
                f"{run.folder} holds a run with other settings: {'; '.join(differences)}; give "
                "another --output_dir, or move it away"
            )
        with suppress(ResultsError):
            stored_runs.read(run.folder)
            done.append(run)
    if problems:
        raise UsageError(problems)
    return done


def _load(name: str) -> dict[str, Any]:
    """The content of a sweep file.

    Raises:
        UsageError: If there is no such file, or it is no YAML.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if is_path else SWEEP_DIR / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, [p.stem for p in SWEEP_DIR.glob("*.yaml")], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        is_config = name in configurations.names()
        kind = "a configuration, no sweep" if is_config else "no sweep"
        raise UsageError(
            [
                f"{name!r} is {kind}: {hint}--list shows the sweeps; a file of your own must end "
                "in .yaml; SWEEP comes before each CONFIG"
            ]
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UsageError([f"{path} is no YAML: {' '.join(str(error).split())}"]) from error
    if not isinstance(content, dict):
        raise UsageError([f"{path} must hold lines of `arms: ...` or `grid: ...`"])
    return content


def _setting_problems(
    sweep: str, arms: dict[str, dict[str, Any]], grid: dict[str, list[Any]]
) -> Iterator[str]:
    """Settings that do not exist or cannot be swept over, and values of a grid that cannot be read.

    Values of arms are checked later, together with their combination: see `possible_runs`.
    """
    in_grid = sweep if sweep == "--grid" else f"{sweep}: grid"
    given = [(in_grid, {name: value}) for name, values in grid.items() for value in values]
    given += [(f"{sweep}: {arm}", settings) for arm, settings in arms.items()]
    problems = []
    for place, settings in given:
        read = settings if place == in_grid else _unknown(settings)
        problems += [f"{place}: {text}" for text in read_mapping(read)[1]]
        problems += [
            f"{place}: {name} cannot be swept over"
            + (", give --seeds" if name in ("seed", "seeds") else "")
            for name in settings
            if str(name).replace("-", "_") in NOT_SWEPT
        ]
    yield from dict.fromkeys(problems)


def _unknown(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of an arm that do not exist."""
    names = {name: str(name).replace("-", "_") for name in settings}
    return {
        name: settings[name]
        for name, plain in names.items()
        if not is_setting(plain) and plain not in LEGACY_FLAGS
    }


def _as_name(value: Any) -> str:
    """A value as part of a folder name."""
    return re.sub(r"[^\w.+-]+", "_", shown(value))


def _arguments(name: str, value: Any) -> list[str]:
    """A setting as arguments of a command line."""
    if isinstance(value, dict):
        return [f"--{name}", *(f"{key}={one}" for key, one in value.items())]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", shown(value)]


def _make_run(arm: Arm, seed: int, base: list[str], folder: Path) -> Run:
    own = folder / arm.name / f"seed{seed}"
    argv = [*base, *arm.flags(), "--seed", str(seed), "--output_dir", str(own), "--resume", "auto"]
    settings, _ = parse(argv)
    config = {**settings.stored(), "vote_group_size": settings.vote_group_size}
    return Run(arm.name, seed, tuple(argv), own, config)


def _check(run: Run, elsewhere: bool) -> list[str]:
    """The problems for which main.py would reject a run."""
    from experiment.validate import validate

    try:
        validate(*parse(run.argv), elsewhere=elsewhere)
    except UsageError as error:
        return error.problems
    return []


def _same_arms(sweep: Sweep, runs: list[Run]) -> list[str]:
    """One line for each arm whose settings equal those of an earlier one."""
    first: dict[str, str] = {}
    problems = []
    for run in {run.arm: run for run in runs}.values():
        compared = {n: v for n, v in run.config.items() if find_flag(n).role != "compute"}
        other = first.setdefault(json.dumps(compared, sort_keys=True), run.arm)
        if other != run.arm:
            problems.append(
                f"{other} and {run.arm} are the same here: with what the base sets they come to "
                "equal settings"
            )
    if problems and sweep.needs:
        problems.insert(0, f"{sweep.name} needs {sweep.needs}")
    return problems


def _differences(run: Run, num_processes: int) -> list[str]:
    """How the run that is stored in the folder of a run, if any, differs from it."""
    stored, results = _stored(run.folder)
    if stored is None:
        return []
    stored = {**Settings().stored(), **stored}
    stored["vote_group_size"] = stored["vote_group_size"] or stored["batch_size"]
    differences = [
        f"--{name} {shown(stored[name])} in place of {shown(value)}"
        for name, value in run.config.items()
        if name in stored and not _is_same(name, stored, run.config)
    ]
    return differences or [*_other_steps(run, results, num_processes), *_other_order(run, results)]


def _stored(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Settings and results of the run in a folder; None and {} where it has none."""
    with suppress(ResultsError):
        results = stored_runs.load_results(folder)
        return results["config"], results
    with suppress(OSError, yaml.YAMLError):
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return (content if isinstance(content, dict) else None), {}
    return None, {}


def _is_same(name: str, stored: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a setting is the same; paths may differ where they do not change what is learned."""
    from experiment.provenance import same_value

    one, other = stored[name], wanted[name]
    if name == "data_path":
        in_folders = "imagefolder" in str(wanted["dataset"]).lower()
        return not in_folders or Path(one).expanduser().resolve() == Path(other).resolve()
    if name == "pretrained" and isinstance(one, str) and isinstance(other, str):
        return Path(one).name == Path(other).name
    if name == "num_tasks":  # none is a value of its own here: as many as the data have
        return one == other
    return name in _FREE or same_value(name, one, other)


def _other_steps(run: Run, results: dict[str, Any], num_processes: int) -> Iterator[str]:
    images = results.get("run", {}).get("images_per_step")
    expected = run.config["batch_size"] * num_processes
    if images not in (None, expected):
        yield f"{images} images a step of all processes in place of {expected}"


def _other_order(run: Run, results: dict[str, Any]) -> Iterator[str]:
    """A line if the class order file has changed since the run."""
    from continual_datasets.class_order import read_class_order

    path = run.config["class_order"]
    if path is None or "class_order" not in results:
        return
    learned = [class_id for classes in results["class_order"] for class_id in classes]
    with suppress(ValueError, OSError):  # a file that main.py will reject
        if read_class_order(Path(path), results["class_names"])[: len(learned)] == learned:
            return
    yield f"another order of the classes than {path} has now"


def count_runs(runs: Sized) -> str:
    """Their number with a noun, such as `2 runs`."""
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"
