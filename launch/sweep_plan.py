"""What a sweep consists of: its arms, the runs that they make, and which of these are done."""

import argparse
import difflib
import itertools
import json
import re
import shlex
from collections.abc import Iterator, Sized
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from cli import options
from cli.options import UsageError
from cli.paths import ROOT
from reports import stored_runs
from reports.stored_runs import ResultsError

SWEEP_DIR = ROOT / "configs" / "sweeps"

#: What a file of a sweep may say.
_KEYS = ("arms", "grid", "against", "lines", "needs")

#: Settings that this program gives to each run, or that make a command something else than a run.
NOT_SWEPT = (
    "seed", "seeds", "output_dir", "resume", "eval", "checkpoint", "list", "dry_run",
    "speed_test_only",
)  # fmt: skip

#: Names of arms are names of folders, other than those that hold something else.
_FOLDER_NAME = re.compile(r"[\w][\w.=,+-]*")

_TAKEN = ("jobs", "logs", *stored_runs.NO_RUNS)

#: Settings that may differ from those of a run that is there: where things are, and how fast.
_FREE = (*options.COMPUTE_ONLY, "file_lists")


@dataclass(frozen=True)
class Arm:
    """One set of settings of a sweep.

    Attributes:
        name: Its name, which is also that of its folder.
        settings: What it adds to the base, by name.
    """

    name: str
    settings: dict[str, Any]

    def flags(self) -> list[str]:
        """The settings as flags of main.py."""
        return [word for name, value in self.settings.items() for word in _words(name, value)]


@dataclass(frozen=True)
class Sweep:
    """What a file of a sweep says.

    Attributes:
        name: Name of the sweep, as people gave it.
        arms: All arms, each name once.
        is_grid: Whether arms are combinations of values, some of which may be impossible.
        against: Setting on the horizontal axis of the picture; None: each arm stands alone.
        lines: Setting that has a line for each of its values; None: one line.
        needs: What the base must be like, for people.
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
        folder: Where its results go.
        config: Resolved settings by name.
    """

    arm: str
    seed: int
    argv: tuple[str, ...]
    folder: Path
    config: dict[str, Any]

    @property
    def name(self) -> str:
        """Its folder below that of the sweep."""
        return f"{self.arm}/seed{self.seed}"

    @property
    def command(self) -> str:
        """What runs it by hand."""
        return shlex.join(["python", "main.py", *self.argv])

    def result(self) -> str:
        """Accuracy and forgetting of the finished run, for people.

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
    """Every sweep that ships with the program, with a line about it."""
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
        name: Name of a file of sweeps/ without its ending, or a path to a .yaml file.

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
    """A sweep of named arms, of all combinations of values, or of each arm in all combinations.

    Args:
        name: Name of the sweep.
        arms: Settings of each arm by its name.
        grid: Values of each setting by its name.

    Raises:
        UsageError: With all unknown settings, values that cannot be read, and unfit names.
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


def parse_grid(texts: list[str]) -> dict[str, list[Any]]:
    """Reads `name=value,value`.

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
    args: argparse.Namespace, sweep: Sweep, base: list[str], folder: Path
) -> tuple[list[Run], dict[str, list[str]]]:
    """All runs, and the combinations of a grid that are impossible, with the reasons.

    Raises:
        UsageError: If an arm of its own is impossible, or the base, or two arms are the same.
    """
    runs: list[Run] = []
    problems: dict[str, list[str]] = {}
    for arm in sweep.arms:
        own = [_make_run(arm, seed, base, folder) for seed in args.seeds or [42]]
        if found := _check(own[0], elsewhere=args.submitit):
            problems[arm.name] = found
        else:
            runs += own
    shared = [
        problem
        for problem in next(iter(problems.values()), [])
        if len(problems) == len(sweep.arms) and all(problem in p for p in problems.values())
    ]
    told = [
        *shared,
        *(f"{arm}: {p}" for arm, found in problems.items() for p in found if p not in shared),
    ]
    if told and not (sweep.is_grid and runs):
        raise UsageError(told)
    if same := _same_arms(sweep, runs):
        raise UsageError(same)
    return runs, problems


def finished(runs: list[Run], num_processes: int) -> list[Run]:
    """Runs that need not run again.

    Raises:
        UsageError: If the folder of a run holds one of other settings, with what differs.
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
    """The content of a file of a sweep.

    Raises:
        UsageError: If there is no such file, or it is no YAML.
    """
    is_path = name.endswith((".yaml", ".yml"))
    path = Path(name).expanduser() if is_path else SWEEP_DIR / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name, [p.stem for p in SWEEP_DIR.glob("*.yaml")], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        is_config = name in options.config_names()
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
    """Settings that do not exist, values that cannot be read, and what no sweep is over."""
    in_grid = sweep if sweep == "--grid" else f"{sweep}: grid"
    given = [(f"{sweep}: {arm}", dict(settings)) for arm, settings in arms.items()]
    given += [(in_grid, {name: value}) for name, values in grid.items() for value in values]
    problems = []
    for place, settings in given:
        problems += [f"{place}: {text}" for text in options.check_settings(settings)]
        problems += [
            f"{place}: {name} cannot be swept over"
            + (", give --seeds" if name in ("seed", "seeds") else "")
            for name in settings
            if str(name).replace("-", "_") in NOT_SWEPT
        ]
    yield from dict.fromkeys(problems)


def _as_name(value: Any) -> str:
    """A value as a part of the name of a folder."""
    return re.sub(r"[^\w.+-]+", "_", options.shown(value))


def _words(name: str, value: Any) -> list[str]:
    """A setting as words of a command line."""
    if isinstance(value, dict):
        return [f"--{name}", *(f"{key}={one}" for key, one in value.items())]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)]
    return [f"--{name}", options.shown(value)]


def _make_run(arm: Arm, seed: int, base: list[str], folder: Path) -> Run:
    from experiment import build

    own = folder / arm.name / f"seed{seed}"
    argv = [*base, *arm.flags(), "--seed", str(seed), "--output_dir", str(own), "--resume", "auto"]
    args, _ = options.parse_args(argv)
    config = {**build.resolved(args), "vote_group_size": build.vote_group_size(args)}
    return Run(arm.name, seed, tuple(argv), own, config)


def _check(run: Run, elsewhere: bool) -> list[str]:
    """What main.py would refuse."""
    from experiment.validate import validate_args

    try:
        validate_args(*options.parse_args(list(run.argv)), elsewhere=elsewhere)
    except UsageError as error:
        return error.problems
    return []


def _same_arms(sweep: Sweep, runs: list[Run]) -> list[str]:
    """A line for each arm that is the same as an earlier one."""
    first: dict[str, str] = {}
    problems = []
    for run in {run.arm: run for run in runs}.values():
        kept = {n: v for n, v in run.config.items() if n not in options.COMPUTE_ONLY}
        other = first.setdefault(json.dumps(kept, sort_keys=True), run.arm)
        if other != run.arm:
            problems.append(
                f"{other} and {run.arm} are the same here: with what the base sets they come to "
                "equal settings"
            )
    if problems and sweep.needs:
        problems.insert(0, f"{sweep.name} needs {sweep.needs}")
    return problems


def _differences(run: Run, num_processes: int) -> list[str]:
    """How the run that lies in a folder, if any, differs from the one that should."""
    stored, results = _stored(run.folder)
    if stored is None:
        return []
    stored = {**options.defaults(), **stored}
    stored["vote_group_size"] = stored["vote_group_size"] or stored["batch_size"]
    differences = [
        f"--{name} {options.shown(stored[name])} in place of {options.shown(value)}"
        for name, value in run.config.items()
        if name in stored and not _is_same(name, stored, run.config)
    ]
    return differences or [*_other_steps(run, results, num_processes), *_other_order(run, results)]


def _stored(folder: Path) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Settings of the run that lies in a folder, and its results, as far as known."""
    with suppress(ResultsError):
        results = stored_runs.load_results(folder)
        return results["config"], results
    with suppress(OSError, yaml.YAMLError):
        content = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        return (content if isinstance(content, dict) else None), {}
    return None, {}


def _is_same(name: str, stored: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Whether a setting is the same; paths may differ where they do not tell what is learned."""
    from experiment import build

    one, other = stored[name], wanted[name]
    if name == "data_path":
        in_folders = "imagefolder" in str(wanted["dataset"]).lower()
        return not in_folders or Path(one).expanduser().resolve() == Path(other).resolve()
    if name == "pretrained" and isinstance(one, str) and isinstance(other, str):
        return Path(one).name == Path(other).name
    if name == "num_tasks":  # none leaves it to the data
        return one == other
    return name in _FREE or build.same(name, one, other)


def _other_steps(run: Run, results: dict[str, Any], num_processes: int) -> Iterator[str]:
    images = results.get("run", {}).get("images_per_step")
    expected = run.config["batch_size"] * num_processes
    if images not in (None, expected):
        yield f"{images} images a step of all processes in place of {expected}"


def _other_order(run: Run, results: dict[str, Any]) -> Iterator[str]:
    """Whether the file of the class order says what it said then."""
    from continual_datasets.class_order import read_class_order

    path = run.config["class_order"]
    if path is None or "class_order" not in results:
        return
    learned = [class_id for classes in results["class_order"] for class_id in classes]
    with suppress(ValueError, OSError):  # a file that main.py will refuse
        if read_class_order(Path(path), results["class_names"])[: len(learned)] == learned:
            return
    yield f"another order of the classes than {path} says now"


def count_runs(runs: Sized) -> str:
    """How many they are, in words."""
    return "1 run" if len(runs) == 1 else f"{len(runs)} runs"
