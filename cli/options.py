"""The command line: flags, configurations, and one message for everything that is wrong.

    main.py [CONFIG ...] [--flags]

A CONFIG is a file of configs/ (named without its ending) or a path to a .yaml file. They are merged
from left to right; flags win over them; what nobody sets keeps the default of l2p-pytorch. A key of
a configuration is a flag without its dashes and is read by the same rules.

Every flag may be written with dashes or underscores. A yes/no flag may be written `--flag`,
`--flag true`, `--flag=false` or `--no-flag`.
"""

import argparse
import ast
import difflib
import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from cli.paths import ROOT

CONFIG_DIR = ROOT / "configs"

#: What the line of an overlay about itself begins with.
_OVERLAY = "Overlay: "

#: Names in the namespace that describe a single command rather than the run.
TRANSIENT = (
    "explicit", "command", "eval", "checkpoint", "speed_test", "speed_test_only", "local_rank",
    "dist_url", "world_size", "resume", "save_every", "list", "seeds", "dry_run", "plots",
    "tensorboard", "wandb",
)  # fmt: skip

#: Settings that say where, how fast and how visibly a run is computed, not what.
COMPUTE_ONLY = (
    "output_dir", "device", "num_workers", "pin_mem", "print_freq", "compile", "grad_checkpointing",
    "data_on_device", "eval_batch_size", "test_cache",
)  # fmt: skip

#: Settings that do not tell one configuration from another: repetitions, and where things are.
NOT_CONFIGURATION = (*COMPUTE_ONLY, "seed", "data_path", "pretrained")

_WORDS = {"true": True, "yes": True, "on": True, "1": True}
_WORDS |= {"false": False, "no": False, "off": False, "0": False}


class UsageError(ValueError):
    """Everything that is wrong with a command line, one problem a line."""

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))

    def told_by(self, program: str) -> str:
        """What people read when a program refuses its command line, several lines."""
        lines = "".join(f"  - {problem}\n" for problem in self.problems)
        return f"{program}: this command line cannot run:\n{lines}"


def parse_bool(text: str) -> bool:
    """Reads a yes/no word strictly."""
    try:
        return _WORDS[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"{text!r} is not true or false") from None


def parse_unscale(text: str) -> str:
    """Reads the original's `--unscale_lr` as a value of `--lr_scale`."""
    return "per-device" if parse_bool(text) else "global"


def parse_mask(text: str) -> str:
    """Reads the original's `--use_prompt_mask` as a value of `--diversify`."""
    return "mask" if parse_bool(text) else "none"


def parse_bool_or_path(text: str) -> bool | str:
    """Reads a yes/no word, or else takes the text as a path."""
    return _WORDS.get(text.lower(), text)


def parse_bool_or_auto(text: str) -> bool | str:
    """Reads a yes/no word, or `auto`."""
    if text == "auto":
        return text
    try:
        return parse_bool(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not auto, true or false") from None


def _or_none(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """Reads `none` for none, anything else as `parse` does."""

    def parse_or_none(text: str) -> Any:
        return None if text.lower() == "none" else parse(text)

    parse_or_none.__name__ = parse.__name__  # what argparse calls it when it refuses a value
    return parse_or_none


def parse_key_value(text: str) -> tuple[str, Any]:
    """Reads `name=value`; the value is a Python literal, or else a string."""
    name, separator, value = text.partition("=")
    if not separator or not name:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


class _Flags:
    """Adds flags to a parser, under both spellings, and keeps what they default to."""

    def __init__(self) -> None:
        self.parser = argparse.ArgumentParser(
            prog="main.py",
            usage="main.py [CONFIG ...] [--flags]",
            description="Learning to Prompt (L2P): training and evaluation.",
            epilog="Yes/no flags: --flag, --flag true, --flag false, --no-flag. Dashes and "
            "underscores are the same. "
            "Example: main.py digits_l2p linear_probe --seeds 42 43 --output_dir output",
            allow_abbrev=False,
            exit_on_error=False,
        )
        self.parser.add_argument(
            "config",
            nargs="*",
            metavar="CONFIG",
            help=f"configurations, merged left to right: {', '.join(config_names())}",
        )
        self.defaults: dict[str, Any] = {}
        self.may_be_none: set[str] = set()
        self.switches: set[str] = set()

    def group(self, title: str) -> Callable[..., None]:
        """A group of flags; call it with a flag's name, default and argparse's arguments."""
        group = self.parser.add_argument_group(title)

        def add(name: str, default: Any, text: str, **kwargs: Any) -> None:
            spellings = list(dict.fromkeys([name, *_spellings(name)]))
            if text != argparse.SUPPRESS:
                text = f"{text} (default: {shown(default)})".replace("%", "%%")
            may_be_none = default is None and "nargs" not in kwargs
            if may_be_none:
                kwargs["type"] = _or_none(kwargs.get("type", str))
            action = group.add_argument(*spellings, default=argparse.SUPPRESS, help=text, **kwargs)
            self.defaults[action.dest] = list(default) if isinstance(default, tuple) else default
            if may_be_none:
                self.may_be_none.add(action.dest)
            if kwargs.get("type") in (parse_bool, parse_unscale, parse_mask):
                self.switches |= set(spellings)

        return add


def parse_args(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Reads a command line into one namespace of resolved settings.

    Args:
        argv: The arguments without the program's name.

    Returns:
        Every setting by name; `explicit`, the names that flags and configurations set; `command`,
        the names of the `configurations` and what `flags` set; and what is wrong, with defaults in
        the place of what could not be read.
    """
    flags = _build()
    problems: list[str] = []
    given = _parse(flags, argv, problems)
    settings = dict(flags.defaults)
    configured: dict[str, Any] = {}
    names = given.pop("config", [])
    problems.extend(_misplaced(names))
    for name in names:
        configured |= _read_config(flags, name, problems)
    settings |= configured | given
    settings["model_kwargs"] = dict(settings["model_kwargs"])
    if "model_kwargs" in given:
        given["model_kwargs"] = dict(given["model_kwargs"])
    explicit = frozenset({*configured, *given})
    command = {"configurations": names, "flags": given}
    return argparse.Namespace(**settings, explicit=explicit, command=command), problems


def defaults() -> dict[str, Any]:
    """Every setting by name, as it is when nobody sets it."""
    return {**(known := _build().defaults), "model_kwargs": dict(known["model_kwargs"])}


def check_settings(content: dict[str, Any]) -> list[str]:
    """What is wrong with settings by name, as a checkpoint holds them."""
    return _from_mapping(_build(), content)[1]


def config_names() -> list[str]:
    """Names of the configurations that ship with the program."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def _misplaced(names: list[str]) -> Iterator[str]:
    """Overlays that a configuration behind them would overwrite."""
    known = config_names()
    shipped = [(name, _first_line(name).startswith(_OVERLAY)) for name in names if name in known]
    for (overlay, is_overlay), (behind, is_behind_overlay) in itertools.pairwise(shipped):
        if is_overlay and not is_behind_overlay:
            yield f"{overlay} is an overlay: put it behind {behind}, which would overwrite it"


def list_configs() -> str:
    """Every configuration that ships with the program, overlays last, with a line about it."""
    lines = {name: _first_line(name) for name in config_names()}
    overlays = {name: line for name, line in lines.items() if line.startswith(_OVERLAY)}
    width = max(map(len, lines)) + 2
    return "\n".join(
        [
            "Configurations (python main.py CONFIG):",
            *(f"  {name:{width}}{line}" for name, line in lines.items() if name not in overlays),
            "",
            "Overlays (python main.py CONFIG OVERLAY ...):",
            *(f"  {n:{width}}{line.removeprefix(_OVERLAY)}" for n, line in overlays.items()),
        ]
    )


def _first_line(name: str) -> str:
    """What a configuration says of itself."""
    with (CONFIG_DIR / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()


def shown(value: Any) -> str:
    """A value as people write it on the command line."""
    if isinstance(value, dict):
        return " ".join(f"{key}={one}" for key, one in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return str(value).lower()
    return "none" if value in (None, "") else str(value)


def command_words(command: dict[str, Any]) -> str:
    """The configurations and flags of a command line that tell its configuration from others.

    Args:
        command: `configurations`, names or paths, and `flags`, values by name.
    """
    names = ["/".join(Path(name).parts[-2:]) for name in command["configurations"]]
    flags = {n: v for n, v in command["flags"].items() if n not in NOT_CONFIGURATION}
    return " ".join([*names, *(f"--{name} {shown(value)}" for name, value in flags.items())])


def to_yaml(settings: dict[str, Any]) -> str:
    """Settings as a configuration that `parse_args` reads back to the same values."""
    return yaml.safe_dump(settings, sort_keys=True, default_flow_style=None)


def _build() -> _Flags:
    flags = _Flags()
    _add_run(flags.group("run"))
    _add_data(flags.group("data"))
    _add_tasks(flags.group("tasks"))
    _add_replay(flags.group("replay"))
    _add_model(flags.group("model"))
    _add_prompts(flags.group("prompts"))
    _add_optimizer(flags.group("optimizer and learning rate"))
    _add_augmentation(flags.group("image transforms"))
    _add_speed(flags.group("speed and precision"))
    _add_views(flags.group("what is shown"))
    _add_evaluation(flags.group("evaluation and measurements"))
    return flags


def _add_run(add: Callable[..., None]) -> None:
    add("--list", False, "show the configurations and overlays, and stop", **_YN)
    add("--output_dir", "./output", "folder of results and checkpoints; empty: write nothing")
    add("--seed", 42, "seed of class order, initial values and augmentation", type=int)
    add("--device", "auto", "cuda, cuda:N, cpu, or auto: CUDA where there is one")
    add("--dist_url", "env://", "where processes meet (a launcher's environment by default)")
    add("--world_size", None, "processes of the run; checked against the launcher's", type=int)
    add("--resume", None, "go on from a saved state: auto (the newest in --output_dir) or a path")
    add("--save_every", 300.0, "seconds between two saved states inside an epoch", type=float)
    add("--seeds", None, "train once for each of these seeds, in folders of their own", **_INTS)
    add("--dry_run", False, "check data and weights, run one step, leave no results, stop", **_YN)
    add("--local-rank", None, argparse.SUPPRESS, type=int)


def _add_data(add: Callable[..., None]) -> None:
    add(
        "--dataset",
        "CIFAR100",
        "CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, NotMNIST, Flowers102, CORe50, Imagenet-R, "
        "digits (ships with scikit-learn) or ImageFolder; several with commas between them are "
        "learned one after the other; 5-datasets: five of them as in the original",
    )
    add(
        "--data-path",
        "/local_datasets/",
        "folder that holds the data; ImageFolder: with train/<class>/* and val/ or test/; its "
        "domains: with <domain>/train/<class>/*",
    )
    add("--domains", None, "domains to learn, in this order; none: all", nargs="+")
    add("--file_lists", None, "CORe50: folder of published file lists, instead of its sessions")
    add("--num_workers", 4, "processes that load images; 0: none beside the main one", type=int)
    add("--pin-mem", True, "page-locked memory for faster copies to a GPU", type=parse_bool)


def _add_tasks(add: Callable[..., None]) -> None:
    add(
        "--scenario",
        "class-incremental",
        "class-incremental, domain-incremental (CORe50, ImageFolder) or gaussian (task-free)",
    )
    add(
        "--num_tasks",
        None,
        "tasks that the classes are split into, or episodes of the gaussian scenario; none: 10, "
        "200 episodes, or as many as there are data sets or domains",
        type=int,
    )
    add("--classes_per_task", None, "classes of a task; none: all classes, evenly", type=int)
    add("--shuffle", True, "shuffle the classes by --seed before the split", type=parse_bool)
    add("--class_order", None, "file with the order of classes (ids or names; JSON or text)")
    add("--train_mask", True, "training predicts the task's own classes only", type=parse_bool)
    add("--task_inc", False, "evaluation is told the task of each image", type=parse_bool)
    add("--joint", False, "all tasks at once: the upper bound", type=parse_bool)
    add("--eval_every", 1, "tasks between two evaluations; the last is always evaluated", type=int)
    add(
        "--gaussian_reading",
        "paper",
        "episodes of --steps_per_task steps, every batch once (paper), or of whole epochs on all "
        "images of their classes (released)",
    )
    add("--steps_per_task", 5, "steps of an episode of the paper's reading", type=int)
    add("--gaussian_sigma", 50.0, "standard deviation of a class's presence, in steps", type=float)


def _add_replay(add: Callable[..., None]) -> None:
    add("--buffer_size", None, "images of earlier tasks to keep, shared by the classes", type=int)
    add("--buffer_per_class", None, "images of each earlier class to keep", type=int)
    add(
        "--replay_batch",
        None,
        "replayed images of a step, of each process, on top of --batch-size; none: as many",
        type=int,
    )


def _add_model(add: Callable[..., None]) -> None:
    add("--model", "vit_base_patch16_224", "any plain timm ViT, with or without a weights tag")
    add("--model-kwargs", (), "arguments of timm's constructor, name=value", **_PAIRS)
    add("--input-size", 224, "pixels a side; the patch size must divide it", type=int)
    add(
        "--pretrained",
        True,
        "weights: true (timm fetches them), false (random), or a local .npz, .safetensors, .pth "
        "or .bin file",
        type=parse_bool_or_path,
    )
    add("--drop", 0.0, "dropout of positions and projections, in training", type=float)
    add("--drop-path", 0.0, "stochastic depth, in training", type=float)
    add("--global_pool", "token", "final norm before (token) or after (avg) the head's mean")
    add("--head_type", "prompt", "what the head reads: token, gap, prompt or token+prompt")
    add("--head_init", "trunc_normal", "first values of the head: trunc_normal or zero")
    add(
        "--prompt_position",
        "class",
        "position rows of prompt tokens: the class token's (class) or none (official_v2)",
    )
    add(
        "--freeze",
        ("blocks", "patch_embed", "cls_token", "norm", "pos_embed"),
        "prefixes of the parameters that do not train; none given: everything trains",
        nargs="*",
    )


def _add_prompts(add: Callable[..., None]) -> None:
    add("--prompt_pool", True, "learn prompts; false: train head and whatever is not frozen", **_YN)
    add("--size", 10, "prompts in the pool (M)", type=int)
    add("--length", 5, "tokens of a prompt (L)", type=int)
    add("--top_k", 5, "prompts chosen for an image (K)", type=int)
    add("--initializer", "uniform", "first values of prompts: uniform, zero or official")
    add("--prompt_key", True, "keys are learned; false: the mean of the prompt's tokens", **_YN)
    add("--prompt_key_init", "uniform", "first values of keys: uniform, zero or official")
    add(
        "--diversify",
        "none",
        "spread what training selects: none, mask (task t trains the prompts [t*K, (t+1)*K) only) "
        "or frequency (the paper's penalty on prompts that earlier tasks used)",
    )
    add(
        "--use_prompt_mask",
        "none",
        "the original's name: true is --diversify mask, false is --diversify none",
        type=parse_mask,
        dest="diversify",
        metavar="BOOL",
    )
    add("--shared_prompt_pool", False, "a task's prompts start from the last task's", **_YN)
    add("--shared_prompt_key", False, "a task's keys start from the last task's", **_YN)
    add("--batchwise_prompt", True, "a vote group shares its most frequent prompts", **_YN)
    add("--vote_group_size", None, "images that vote together; none: --batch-size", type=int)
    add("--vote_ties", "lowest", "who wins a tied vote: lowest (id) or topk (as the original)")
    add("--embedding_key", "cls", "the query: cls, mean, max or mean_max")
    add("--predefined_key", "", "refused: the original accepts it and does nothing with it")
    add("--pull_constraint", True, "pull chosen keys towards the query", **_YN)
    add("--pull_constraint_coeff", 0.1, "weight of that term", type=float)


def _add_optimizer(add: Callable[..., None]) -> None:
    add("--batch-size", 16, "images of a step, of each process", type=int)
    add("--drop_last", False, "leave out the images that do not fill a last step", **_YN)
    add("--epochs", 5, "epochs of each task", type=int)
    add("--opt", "adam", "any optimizer of timm")
    add("--opt-eps", 1e-8, "epsilon of the optimizer", type=float)
    add("--opt-betas", None, "betas of the optimizer", type=float, nargs="+")
    add("--clip-grad", 1.0, "largest norm of the gradient; none: no limit", **_NUMBER)
    add("--momentum", 0.9, "momentum of SGD", type=float)
    add("--weight-decay", 0.0, "weight decay", type=float)
    add("--reinit_optimizer", True, "a fresh optimizer for each task", **_YN)
    add("--smoothing", 0.0, "label smoothing over the classes that may be predicted", type=float)
    add("--lr", 0.03, "learning rate for a batch of 256", type=float)
    add(
        "--lr_scale",
        "per-device",
        "what --lr is multiplied by: none (1), per-device (batch-size / 256) or global "
        "(batch-size * processes / 256)",
    )
    add(
        "--unscale_lr",
        "per-device",
        "the original's name: true is --lr_scale per-device, false is --lr_scale global",
        type=parse_unscale,
        dest="lr_scale",
        metavar="BOOL",
    )
    add(
        "--sched",
        "constant",
        "schedule over the epochs of a task, begun anew for each task: constant, cosine, tanh, "
        "step, multistep, poly or plateau",
    )
    add("--lr-noise", None, "parts of the schedule between which noise is added", **_FLOATS)
    add("--lr-noise-pct", 0.67, "limit of that noise, as a part of the rate", type=float)
    add("--lr-noise-std", 1.0, "standard deviation of that noise", type=float)
    add("--warmup-lr", 1e-6, "rate that the warm-up starts from", type=float)
    add("--min-lr", 1e-5, "lowest rate of cyclic schedules", type=float)
    add("--decay-epochs", 30.0, "epochs between two decays (step)", type=float)
    add("--decay-milestones", (30, 60), "epochs of the decays (multistep)", type=int, nargs="+")
    add("--warmup-epochs", 5, "epochs of warm-up, unless the schedule is constant", type=int)
    add("--cooldown-epochs", 10, "epochs at the lowest rate behind a cyclic schedule", type=int)
    add("--patience-epochs", 10, "epochs without gain before a decay (plateau)", type=int)
    add("--decay-rate", 0.1, "factor of a decay", type=float)
    add(
        "--dr",
        0.1,
        "the original's short name of --decay-rate",
        type=float,
        dest="decay_rate",
        metavar="DECAY_RATE",
    )


def _add_augmentation(add: Callable[..., None]) -> None:
    add("--scale", (0.08, 1.0), "range of the random crop's area", type=float, nargs=2)
    add("--ratio", (3 / 4, 4 / 3), "range of the random crop's width/height", type=float, nargs=2)
    add("--hflip", 0.5, "probability of a horizontal flip", type=float)
    add("--train-interpolation", "bilinear", "of the crop: nearest, bilinear, bicubic, random")
    add("--train_resize", None, "pixels a side before the crop (the release: 256)", type=int)
    add("--train_jpeg", None, "quality of a JPEG round trip before the crop", type=int)
    add("--test_interpolation", "bicubic", "of test images: bicubic, or bilinear (the release)")
    add("--color-jitter", None, "strength of colour jitter", **_NUMBER)
    add("--aa", None, "timm's augmentation policy, such as rand-m9-mstd0.5-inc1")
    add("--reprob", 0.0, "probability of random erasing", type=float)
    add("--remode", "pixel", "what an erased box is filled with: const, rand or pixel")
    add("--recount", 1, "boxes erased", type=int)
    add("--norm", "none", "pixels: none ([0, 1], the original), half ([-1, 1]) or imagenet")


def _add_speed(add: Callable[..., None]) -> None:
    add("--amp", None, "mixed precision of the backbone: bf16, fp16, or none (fp32, the original)")
    add("--tf32", False, "TensorFloat-32 products on a GPU, in place of full fp32", **_YN)
    add("--compile", False, "compile the passes through the backbone, with CUDA graphs", **_YN)
    add("--grad_checkpointing", False, "compute activations twice to hold fewer of them", **_YN)
    add(
        "--data_on_device",
        "auto",
        "keep all images on the device and crop and resize there: true, false, or auto (on a GPU, "
        "where they fit and the image transforms allow it)",
        type=parse_bool_or_auto,
    )
    add(
        "--eval_batch_size",
        None,
        "test images of a batch, in whole vote groups; none: --batch-size, on a GPU at least 256",
        type=int,
    )
    add("--test_cache", 2.0, "gigabytes of decoded test images that a process keeps", type=float)


def _add_views(add: Callable[..., None]) -> None:
    add("--print_freq", 10, "steps between two progress lines in a log file or pipe", type=int)
    add("--plots", True, "draw pictures at the end of a run", **_YN)
    add("--tensorboard", False, "log to TensorBoard, in --output_dir/tensorboard", **_YN)
    add("--wandb", False, "log to Weights & Biases, if wandb is installed", **_YN)


def _add_evaluation(add: Callable[..., None]) -> None:
    add("--eval", False, "evaluate the task checkpoints of --output_dir", **_YN)
    add("--checkpoint", None, "with --eval: this checkpoint alone")
    add("--speed_test", False, "measure images/s, GMACs and memory before the run", **_YN)
    add("--speed_test_only", False, "measure and stop", **_YN)


_YN: dict[str, Any] = {"type": parse_bool, "metavar": "BOOL"}
_NUMBER: dict[str, Any] = {"type": _or_none(float), "metavar": "NUMBER"}
_FLOATS: dict[str, Any] = {"type": float, "nargs": "+"}
_INTS: dict[str, Any] = {"type": int, "nargs": "+"}
_PAIRS: dict[str, Any] = {"type": parse_key_value, "nargs": "*", "metavar": "NAME=VALUE"}


def _parse(flags: _Flags, tokens: list[str], problems: list[str]) -> dict[str, Any]:
    """Settings that the tokens name; what argparse refuses goes to `problems`, all of it."""
    tokens = _spell_out_switches(tokens, flags.switches)
    while True:
        try:
            namespace, unknown = flags.parser.parse_known_intermixed_args(tokens)
        except argparse.ArgumentError as error:
            problems.append(str(error).removeprefix("argument "))
            remaining = _without(tokens, (error.argument_name or "").split("/"))
            if remaining == tokens:
                return {}
            tokens = remaining
            continue
        problems.extend(_unknown(flag, flags) for flag in unknown if flag.startswith("-"))
        return vars(namespace)


def _spell_out_switches(tokens: list[str], switches: set[str]) -> list[str]:
    """Writes every yes/no flag as `--flag=true` or `--flag=false`."""
    negations = {f"--no{dash}{s[2:]}": s for s in switches for dash in "-_"}
    spelled: list[str] = []
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        if token in negations:
            spelled.append(f"{negations[token]}=false")
        elif token in switches:
            value = rest.pop(0) if rest and rest[0].lower() in _WORDS else "true"
            spelled.append(f"{token}={value}")
        else:
            spelled.append(token)
    return spelled


def _without(tokens: list[str], names: list[str]) -> list[str]:
    """Tokens without a flag and its values."""
    kept: list[str] = []
    dropping = False
    for token in tokens:
        if token.startswith("-"):
            short = len(token) > 2 and token[:2] in names  # such as -hx
            dropping = short or token.split("=")[0] in names
        if not dropping:
            kept.append(token)
    return kept


def _unknown(token: str, flags: _Flags) -> str:
    name = token.split("=")[0]
    known = [s for action in flags.parser._actions for s in action.option_strings]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f": did you mean {near[0]}?" if near else ": see main.py --help"
    return f"{name} is no option{hint}"


def _read_config(flags: _Flags, name: str, problems: list[str]) -> dict[str, Any]:
    """Settings of a configuration; what is wrong with it goes to `problems`, under its name."""
    try:
        content = _load_config(name)
    except ValueError as error:
        problems.append(str(error))
        return {}
    settings, found = _from_mapping(flags, content)
    problems.extend(f"{name}: {problem}" for problem in found)
    return settings


def _load_config(name: str) -> dict[str, Any]:
    path = Path(name) if name.endswith((".yaml", ".yml")) else CONFIG_DIR / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(name.lower(), config_names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(
            f"{name!r} is neither a configuration nor the value of a flag: {hint}"
            "--list shows the configurations; a file of your own must end in .yaml"
        )
    try:
        content = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines")
    return content


def _from_mapping(flags: _Flags, content: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Settings by name, read as the tokens that would say the same on the command line."""
    problems: list[str] = []
    tokens = [token for key, value in content.items() for token in _tokens(flags, str(key), value)]
    settings = _parse(flags, tokens, problems)
    surplus = settings.pop("config", [])
    problems.extend(f"{value!r} is one value too many" for value in surplus)
    return settings, problems


def _tokens(flags: _Flags, key: str, value: Any) -> list[str]:
    flag = f"--{key}"
    if value is None:
        name = key.replace("-", "_")
        cannot_be_said = name not in flags.may_be_none and flags.defaults.get(name, "") is None
        return [] if cannot_be_said else [f"{flag}=none"]
    if isinstance(value, dict):
        return [flag, *(f"{k}={v}" for k, v in value.items())]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def _spellings(name: str) -> list[str]:
    bare = name[2:]
    return [f"--{bare.replace('_', '-')}", f"--{bare.replace('-', '_')}"]
