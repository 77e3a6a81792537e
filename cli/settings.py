"""Every setting of a run: typed, frozen, declared once.

Each part of the program receives the group that it needs, such as `settings.optimizer`. Values that
follow from settings alone, without data or model (learning rate, vote group, ...), are properties
and methods here.
"""

import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.flags import Range, Role, between, command, compute, flag, flags_of, place
from cli.paths import ROOT, PathStr

#: What values must be. An upper end is what no machine can hold or no method needs.
COUNT = between(1, 10**9)
NATURAL = between(0, 10**9)
BATCH = between(1, 100_000)
STEPS = between(1, 10_000)
PIXELS = between(1, 4096)
QUALITY = between(1, 100)
POSITIVE = between(0, 1e9, above=True)
NOT_NEGATIVE = between(0, 1e9)
RATE = between(0, 1000)
POSITIVE_RATE = between(0, 1000, above=True)
SHARE: Range = ("must be in [0, 1)", lambda x: 0 <= x < 1)
PROBABILITY = between(0, 1)
SEED: Range = ("must be in [0, 2^32)", lambda x: 0 <= x < 2**32)
AREA: Range = ("must be two rising shares of the image, in (0, 1]", lambda x: 0 < x[0] <= x[1] <= 1)
RATIO: Range = ("must be two rising numbers in [0.01, 100]", lambda x: 0.01 <= x[0] <= x[1] <= 100)

#: Names of `--norm`; anything else is three means and three deviations, see `norm_numbers`.
NORM_NAMES = ("none", "half", "imagenet", "model")


def norm_numbers(text: str) -> tuple[float, ...]:
    """Mean and standard deviation of three channels, such as `0.5,0.5,0.5,0.2,0.2,0.2`; else ()."""
    try:
        numbers = tuple(map(float, text.split(",")))
    except ValueError:
        return ()
    in_range = all(0 <= one <= 1 for one in numbers) and all(numbers[3:])
    return numbers if in_range and len(numbers) == 6 else ()


NORM: Range = (
    f"must be {', '.join(NORM_NAMES)} or six numbers in [0, 1] with commas",
    lambda text: text in NORM_NAMES or bool(norm_numbers(text)),
)

#: Other names of settings, which the original has: the setting's name, and its value for each
#: value of the other name; None: the same values.
LEGACY_FLAGS: dict[str, tuple[str, dict[bool, str] | None]] = {
    "dr": ("decay_rate", None),
    "unscale_lr": ("lr_scale", {True: "per-device", False: "global"}),
    "use_prompt_mask": ("diversify", {True: "mask", False: "none"}),
}

#: Settings that the original has and this program has not, and why.
REMOVED_FLAGS = {
    "predefined_key": "the original does nothing with it; keys start from --prompt_key_init",
    "world_size": "the launcher starts the processes; use its own option, such as --nproc_per_node",
    "nproc_per_node": "it is torchrun's, before main.py: torchrun --nproc_per_node=4 main.py",
}


@dataclass(frozen=True)
class RunSettings:
    """Run."""

    list: bool = command(False, "show the configurations and overlays, then stop")
    list_models: tuple[str, ...] | None = command(
        None, "show the models that --model takes, all or those like 'vit_*'", at_least_one=False
    )
    output_dir: PathStr = compute("./output", "folder of what a run writes; empty: write nothing")
    seed: int = place(42, "seed of class order, initial values and augmentation", range=SEED)
    seeds: tuple[int, ...] | None = command(None, "train once for each, in its folder", range=SEED)
    device: str = compute("auto", "cuda, cuda:N, cpu, or auto: CUDA where there is one")
    dist_url: str = command("env://", "rendezvous of the processes; env://: what the launcher sets")
    local_rank: int | None = command(None, "", range=NATURAL)  # passed by torch.distributed.launch
    resume: PathStr | None = command(None, "a saved state: auto (newest in --output_dir) or a path")
    continue_from: PathStr | None = place(
        None, "learn more after a finished run: its folder, or a checkpoint of a task"
    )
    save_every: float = command(300.0, "seconds between two states inside an epoch", range=POSITIVE)
    dry_run: bool = command(False, "check data and weights, run one step, leave no results, stop")
    eval: bool = command(False, "evaluate the task checkpoints of --output_dir")
    checkpoint: PathStr | None = command(None, "with --eval: this checkpoint alone")
    speed_test: bool = command(False, "measure images/s, GMACs and memory before the run")
    speed_test_only: bool = command(False, "measure, then stop")


@dataclass(frozen=True)
class OutputSettings:
    """Output."""

    print_freq: int = compute(10, "steps between two progress lines of a log", range=COUNT)
    plots: bool = command(True, "draw figures at the end of a run")
    save_predictions: bool = command(False, "write what is predicted for each test image")
    tensorboard: bool = command(False, "log to TensorBoard, in --output_dir/tensorboard")
    wandb: bool = command(False, "log to Weights & Biases, if wandb is installed")


@dataclass(frozen=True)
class DataSettings:
    """Data."""

    dataset: str = flag(
        "CIFAR100",
        "CIFAR10, CIFAR100, MNIST, FashionMNIST, KMNIST, SVHN, NotMNIST, Flowers102, CORe50, "
        "Imagenet-R, digits (ships with scikit-learn) or ImageFolder; several, separated by "
        "commas, are learned one after the other; 5-datasets: five of them as in the original",
    )
    data_path: PathStr = place(
        "/local_datasets/",
        "folder of the data; ImageFolder: with [<domain>/]train/<class>/* and val/ or test/",
    )
    earlier_data: tuple[PathStr, ...] | None = place(
        None, "folders of the data of the runs that this one continues; none: where they were"
    )
    domains: tuple[str, ...] | None = flag(None, "domains to learn, in this order; none: all")
    file_lists: PathStr | None = flag(
        None, "CORe50: folder of published file lists that define the domains; none: its sessions"
    )
    images_per_class: int | None = flag(
        None, "training images of each class to use, drawn by --seed; none: all", range=COUNT
    )
    skip_damaged: bool = flag(False, "leave out damaged image files")
    num_workers: int = compute(4, "DataLoader worker processes; 0: none", range=between(0, 512))
    pin_mem: bool = compute(True, "page-locked memory for faster copies to a GPU")
    data_on_device: bool | str = compute(
        "auto", "store and transform all images on the device (auto: a GPU)", choices=("auto",)
    )
    eval_batch_size: int | None = compute(
        None, "test images of a batch; none: --batch-size, on a GPU at least 256", range=BATCH
    )
    test_cache: float = compute(2.0, "GB of test images that a process caches", range=NOT_NEGATIVE)


@dataclass(frozen=True)
class TaskSettings:
    """Tasks."""

    scenario: str = flag(
        "class-incremental",
        "class-incremental, domain-incremental (CORe50, ImageFolder), gaussian (task-free), "
        "dataset-incremental (chosen by itself for several data sets) or joint (as --joint)",
    )
    num_tasks: int | None = flag(
        None,
        "tasks that the classes are split into, or episodes of the gaussian scenario; none: 10, "
        "200 episodes, or as many as there are data sets or domains",
        range=STEPS,
    )
    classes_per_task: tuple[int, ...] | None = flag(
        None, "classes of a task, or of each task in turn; none: all classes, evenly", range=COUNT
    )
    first_task_classes: int | None = flag(
        None, "classes of the first task; none: as many as the others have", range=COUNT
    )
    shuffle: bool = flag(True, "shuffle the classes by --seed before the split")
    class_order: PathStr | None = flag(None, "file of the class order: ids or names, JSON or text")
    train_mask: bool = flag(True, "training predicts the task's own classes only")
    task_inc: bool = flag(False, "evaluation predicts among the classes of the image's task only")
    joint: bool = flag(False, "all tasks at once: the upper bound")
    eval_every: int = flag(1, "evaluate after every N-th task and the last", range=COUNT)
    gaussian_reading: str = flag(
        "paper",
        "variant of the gaussian schedule: episodes of --steps_per_task steps, every batch once "
        "(paper), or of whole epochs on all images of their classes (released)",
        choices=("paper", "released"),
    )
    steps_per_task: int = flag(5, "steps of an episode of the paper's variant", range=STEPS)
    gaussian_sigma: float = flag(
        50.0, "sigma of a class's presence, in steps", range=between(0.1, 1e6)
    )

    @property
    def schedule_steps(self) -> int:
        """Positions of the Gaussian schedule that an episode takes; the release has one."""
        return 1 if self.gaussian_reading == "released" else self.steps_per_task

    def images_per_episode(self, global_batch: int) -> int | None:
        """Images drawn for an episode of the Gaussian schedule; None: all of its classes."""
        if self.gaussian_reading == "released" or self.joint:
            return None
        return self.steps_per_task * global_batch


@dataclass(frozen=True)
class ReplaySettings:
    """Replay."""

    buffer_size: int | None = flag(None, "images of earlier tasks to store in all", range=COUNT)
    buffer_per_class: int | None = flag(None, "images to store of each class", range=COUNT)
    replay_batch: int | None = flag(
        None, "replayed images of a step, of each process; none: --batch-size", range=BATCH
    )

    @property
    def has_buffer(self) -> bool:
        """Whether images of earlier tasks are replayed."""
        return self.buffer_size is not None or self.buffer_per_class is not None


@dataclass(frozen=True)
class ModelSettings:
    """Model."""

    model: str = flag(
        "vit_base_patch16_224", "a ViT of timm, see --list_models, with or without a weights tag"
    )
    model_kwargs: dict[str, Any] = flag(
        {}, "arguments of timm's constructor, name=value", at_least_one=False
    )
    pretrained: bool | PathStr = place(
        True, "weights: true (of timm), false (random) or a .npz, .safetensors, .pth or .bin file"
    )
    drop: float = flag(0.0, "dropout of positions and projections, in training", range=SHARE)
    drop_path: float = flag(0.0, "stochastic depth, in training", range=SHARE)
    global_pool: str = flag(
        "token", "token: final norm, then mean; avg: mean, then fc_norm", choices=("token", "avg")
    )
    head: str = flag(
        "linear", "linear: trained by gradients; ncm: nearest class mean, of frozen features"
    )
    head_type: str = flag("prompt", "what the head pools: token, gap, prompt or token+prompt")
    head_init: str = flag(
        "trunc_normal", "initial weights of the head", choices=("trunc_normal", "zero")
    )
    prompt_position: str = flag(
        "class", "positions of prompts: the class token's, or none", choices=("class", "none")
    )
    freeze: tuple[str, ...] = flag(
        ("blocks", "patch_embed", "cls_token", "norm", "pos_embed"),
        "prefixes of the parameters that do not train; none: everything trains",
        at_least_one=False,
    )

    @property
    def weight_file(self) -> Path | None:
        """The local file of `--pretrained PATH`; shipped weights are found from any folder."""
        if isinstance(self.pretrained, bool):
            return None
        path = Path(self.pretrained)
        return ROOT / path if not path.exists() and (ROOT / path).exists() else path

    @property
    def weight_source(self) -> str:
        """Where the backbone's weights come from: a file's name, `timm` or `random`."""
        if self.weight_file is not None:
            return self.weight_file.name
        return "timm" if self.pretrained else "random"


@dataclass(frozen=True)
class PromptSettings:
    """Prompts."""

    prompt_pool: bool = flag(True, "learn prompts; false: the head and what is not frozen alone")
    size: int = flag(10, "prompts in the pool (M)", range=STEPS)
    length: int = flag(5, "tokens of a prompt (L)", range=between(1, 1000))
    top_k: int = flag(5, "prompts selected for an image (K)", range=between(1, 1000))
    initializer: str = flag(
        "uniform",
        "initial prompts: U(-1, 1), zeros, or U(0, 0.01) as the JAX release",
        choices=("uniform", "zero", "official"),
    )
    prompt_key: bool = flag(True, "keys are learned; false: the mean of the prompt's tokens")
    prompt_key_init: str = flag("uniform", "initial keys", choices=("uniform", "zero", "official"))
    diversify: str = flag(
        "none",
        "selection in training: none (top-k), mask (K prompts of its own for each task) or "
        "frequency (the paper's penalty on prompts that earlier tasks used)",
    )
    shared_prompt_pool: bool = flag(False, "a task's prompts start from those of the previous task")
    shared_prompt_key: bool = flag(False, "a task's keys start from those of the previous task")
    batchwise_prompt: bool = flag(True, "a vote group shares its most frequent prompts")
    vote_group_size: int | None = flag(
        None, "images that vote together; none: --batch-size", range=BATCH
    )
    vote_ties: str = flag(
        "lowest",
        "among equal votes or similarities: lowest id, or torch.topk's choice (original)",
        choices=("lowest", "topk"),
    )
    embedding_key: str = flag(
        "cls",
        "the query: class token (without one, timm's pooled feature), or mean, maximum, maximum "
        "+ 2 * mean of the patches",
        choices=("cls", "mean", "max", "mean_max"),
    )
    pull_constraint: bool = flag(True, "pull selected keys towards the query")
    pull_constraint_coeff: float = flag(0.1, "weight of the pull term", range=RATE)


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and learning rate."""

    batch_size: int = flag(16, "images of a step, of each process", range=BATCH)
    drop_last: bool = flag(False, "drop the last step of an epoch if its batch is incomplete")
    epochs: int = flag(5, "epochs of each task", range=STEPS)
    opt: str = flag("adam", "any optimizer of timm")
    opt_eps: float = flag(1e-8, "epsilon of the optimizer", range=between(1e-30, 1000))
    opt_betas: tuple[float, ...] | None = flag(None, "betas of the optimizer", range=SHARE)
    clip_grad: float | None = flag(1.0, "largest norm of the gradient; none: any", range=POSITIVE)
    momentum: float = flag(0.9, "momentum of SGD", range=SHARE)
    weight_decay: float = flag(0.0, "weight decay", range=RATE)
    reinit_optimizer: bool = flag(True, "a fresh optimizer for each task")
    smoothing: float = flag(0.0, "label smoothing over the predictable classes", range=SHARE)
    lr: float = flag(0.03, "learning rate for a batch of 256", range=POSITIVE_RATE)
    lr_scale: str = flag(
        "per-device",
        "factor of --lr: none (1), per-device (batch-size / 256), global (that * processes)",
        choices=("none", "per-device", "global"),
    )
    sched: str = flag(
        "constant",
        "schedule over the epochs of a task, started anew for each task",
        choices=("constant", "cosine", "tanh", "step", "multistep", "poly", "plateau"),
    )
    lr_noise: tuple[float, ...] | None = flag(
        None, "start and end of learning rate noise, as shares of the schedule", range=PROBABILITY
    )
    lr_noise_pct: float = flag(
        0.67, "limit of that noise, as a share of the learning rate", range=between(0.01, 1)
    )
    lr_noise_std: float = flag(1.0, "standard deviation of that noise", range=between(0, 3))
    warmup_lr: float = flag(1e-6, "learning rate at the start of the warm-up", range=RATE)
    min_lr: float = flag(1e-5, "lowest learning rate of cyclic schedules", range=RATE)
    decay_epochs: float = flag(30.0, "epochs between two decays (step)", range=POSITIVE)
    decay_milestones: tuple[int, ...] = flag((30, 60), "epochs of decays (multistep)", range=STEPS)
    warmup_epochs: int = flag(5, "epochs of warm-up (all but constant)", range=NATURAL)
    cooldown_epochs: int = flag(10, "epochs at the lowest rate after a cycle", range=NATURAL)
    patience_epochs: int = flag(10, "epochs without gain before a decay (plateau)", range=NATURAL)
    decay_rate: float = flag(0.1, "factor of a decay", range=POSITIVE_RATE)

    def learning_rate(self, global_batch: int) -> float:
        """The rate that the optimizer gets: `--lr`, scaled by the batch of one or all processes.

        Source: l2p-pytorch multiplies by the batch of one process / 256.
        """
        batches = {"none": 256, "per-device": self.batch_size, "global": global_batch}
        return self.lr * batches[self.lr_scale] / 256


@dataclass(frozen=True)
class TransformSettings:
    """Image transforms."""

    input_size: int = flag(224, "pixels a side; the patch size must divide it", range=PIXELS)
    augment: bool = flag(True, "random crops and flips in training; false: as test images")
    scale: tuple[float, float] = flag((0.08, 1.0), "range of the crop's area", range=AREA)
    ratio: tuple[float, float] = flag((3 / 4, 4 / 3), "range of width/height", range=RATIO)
    crop_rule: str = flag(
        "torchvision",
        "what is uniform in random crops: their area (torchvision) or their height (TensorFlow)",
        choices=("torchvision", "tensorflow"),
    )
    hflip: float = flag(0.5, "probability of a horizontal flip", range=PROBABILITY)
    train_interpolation: str = flag(
        "bilinear",
        "resampling of the crop; random: bilinear or bicubic for each image",
        choices=("nearest", "bilinear", "bicubic", "random"),
    )
    train_resize: int | None = flag(None, "pixels a side before the crop", range=PIXELS)
    train_jpeg: int | None = flag(None, "quality of a JPEG round trip before crops", range=QUALITY)
    test_interpolation: str = flag(
        "bicubic", "resampling of test images (JAX: bilinear)", choices=("bilinear", "bicubic")
    )
    color_jitter: float | None = flag(None, "strength of colour jitter", range=RATE)
    aa: str | None = flag(None, "timm's augmentation policy, such as rand-m9-mstd0.5-inc1")
    reprob: float = flag(0.0, "probability of random erasing", range=PROBABILITY)
    remode: str = flag("pixel", "what fills an erased box", choices=("const", "rand", "pixel"))
    recount: int = flag(1, "number of erased boxes", range=between(1, 100))
    norm: str = flag(
        "none",
        "pixel values: none ([0, 1], the original), half ([-1, 1]), imagenet, model (what "
        "timm's weights of --model had), or mean and deviation: 0.5,0.5,0.5,0.2,0.2,0.2",
        range=NORM,
    )


@dataclass(frozen=True)
class PrecisionSettings:
    """Precision and compilation."""

    amp: str | None = flag(
        None,
        "mixed precision of the backbone: bf16, fp16, or none (fp32, the original)",
        choices=("bf16", "fp16"),
    )
    tf32: bool = flag(False, "TensorFloat-32 products on a GPU, in place of full fp32")
    compile: bool = compute(False, "compile the passes through the backbone, with CUDA graphs")
    grad_checkpointing: bool = compute(False, "save memory: recompute activations for gradients")

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients would underflow without a scale on the loss."""
        return self.amp == "fp16"


@dataclass(frozen=True)
class Given:
    """What a command line said: configurations, in order; flags; names that either of them set."""

    configurations: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    explicit: frozenset[str] = frozenset()
    own: frozenset[str] = frozenset()  # flags, and what a file of one's own sets to no default


@dataclass(frozen=True)
class Settings:
    """All settings of one command line, by group."""

    run: RunSettings = field(default_factory=RunSettings)
    data: DataSettings = field(default_factory=DataSettings)
    tasks: TaskSettings = field(default_factory=TaskSettings)
    replay: ReplaySettings = field(default_factory=ReplaySettings)
    model: ModelSettings = field(default_factory=ModelSettings)
    prompts: PromptSettings = field(default_factory=PromptSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    transforms: TransformSettings = field(default_factory=TransformSettings)
    precision: PrecisionSettings = field(default_factory=PrecisionSettings)
    output: OutputSettings = field(default_factory=OutputSettings)
    given: Given = field(default_factory=Given)

    def __getitem__(self, name: str) -> Any:
        """A setting by the name of its flag."""
        return getattr(getattr(self, _GROUP_OF[name]), name)

    def replace(self, given: Given | None = None, **values: Any) -> "Settings":
        """The same settings with other values, by name."""
        groups: dict[str, Any] = {"given": given or self.given}
        for name, value in values.items():
            group = groups.get(_GROUP_OF[name], getattr(self, _GROUP_OF[name]))
            new = {name: tuple(value) if isinstance(value, list) else value}
            groups[_GROUP_OF[name]] = dataclasses.replace(group, **new)
        return dataclasses.replace(self, **groups)

    def for_seed(self, seed: int) -> "Settings":
        """The settings of one run of `--seeds`, in a folder of its own."""
        return self.replace(seed=seed, output_dir=os.path.join(self.run.output_dir, f"seed{seed}"))

    def stored(self) -> dict[str, Any]:
        """Settings that describe the run, by name, as plain values for files."""
        return {name: plain(self[name]) for name in names_of("method", "place", "compute")}

    def command(self) -> dict[str, Any]:
        """Configurations and flags of the command line that say what is learned, and where."""
        stored = {*names_of("method", "place")}
        flags = {name: plain(v) for name, v in self.given.flags.items() if name in stored}
        return {"configurations": list(self.given.configurations), "flags": flags}

    @property
    def output_folder(self) -> Path | None:
        """Folder of results and checkpoints; None: nothing is written."""
        return Path(self.run.output_dir) if self.run.output_dir else None

    @property
    def vote_group_size(self) -> int:
        """V, images that vote for prompts together: the batch of one process unless set."""
        return self.prompts.vote_group_size or self.optimizer.batch_size

    @property
    def replayed_per_group(self) -> int:
        """R, the replayed images that join each vote group; 0 without a buffer."""
        if not self.replay.has_buffer:
            return 0
        batch = self.optimizer.batch_size
        return (self.replay.replay_batch or batch) * self.vote_group_size // batch


#: The groups in the order in which `--help` shows them, by their name in `Settings`.
GROUPS: dict[str, type] = {
    name: kind for name, kind in typing.get_type_hints(Settings).items() if name != "given"
}

#: Every setting by name, group by group; and the name of its group.
FLAGS = {one.name: one for group in GROUPS.values() for one in flags_of(group)}
_GROUP_OF = {one.name: name for name, group in GROUPS.items() for one in flags_of(group)}


def names_of(*roles: Role) -> Iterator[str]:
    """Names of the settings of some roles."""
    return (name for name, one in FLAGS.items() if one.role in roles)


def plain(value: Any) -> Any:
    """A value as files hold it: lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value
