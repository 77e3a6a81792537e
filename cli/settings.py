"""Every setting of a run: typed, frozen, declared once.

Each part of the program receives the group that it needs, such as `settings.optimizer`. Values that
follow from settings alone, without data or model (learning rate, vote group, ...), are properties
and methods here.
"""

import dataclasses
import functools
import os
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cli.flags import (
    ASPECT_RATIO,
    CROP_AREA,
    LIMIT,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    QUALITY,
    SEED,
    SHARE,
    Flag,
    Role,
    at_least,
    flag,
    flags_of,
)
from cli.paths import ROOT

#: Other names of settings, which the original has: the setting's name, and its value for each
#: value of the other name; None: the same values.
LEGACY_FLAGS: dict[str, tuple[str, dict[bool, str] | None]] = {
    "dr": ("decay_rate", None),
    "unscale_lr": ("lr_scale", {True: "per-device", False: "global"}),
    "use_prompt_mask": ("diversify", {True: "mask", False: "none"}),
}


@dataclass(frozen=True)
class RunSettings:
    """Run."""

    list: bool = flag(False, "show the configurations and overlays, then stop", role="command")
    output_dir: str = flag(
        "./output",
        "folder of results and checkpoints; empty: write nothing",
        role="compute",
        synonyms=("out_dir", "save_dir", "log_dir", "out", "output"),
    )
    seed: int = flag(
        42, "seed of class order, initial values and augmentation", range=SEED, role="place"
    )
    seeds: tuple[int, ...] | None = flag(
        None,
        "train once for each of these seeds, in a folder of its own",
        range=SEED,
        role="command",
    )
    device: str = flag(
        "auto",
        "cuda, cuda:N, cpu, or auto: CUDA where there is one",
        role="compute",
        synonyms=("gpu", "gpus", "gpu_id", "cuda"),
    )
    dist_url: str = flag(
        "env://", "rendezvous of the processes; env://: what the launcher sets", role="command"
    )
    world_size: int | None = flag(
        None, "number of processes; compared with the launcher's", role="command"
    )
    local_rank: int | None = flag(
        None, "", role="command", dashed=True
    )  # what torch.distributed.launch passes without --use_env
    resume: str | None = flag(
        None,
        "resume from a saved state: auto (the newest in --output_dir) or a path",
        role="command",
        synonyms=("load", "restore", "resume_from", "continue"),
    )
    save_every: float = flag(
        300.0, "seconds between two states inside an epoch", range=POSITIVE, role="command"
    )
    dry_run: bool = flag(
        False, "check data and weights, run one step, leave no results, stop", role="command"
    )
    eval: bool = flag(
        False,
        "evaluate the task checkpoints of --output_dir",
        role="command",
        synonyms=("evaluate", "test", "test_only", "eval_only"),
    )
    checkpoint: str | None = flag(
        None, "with --eval: this checkpoint alone", role="command", synonyms=("ckpt", "weights")
    )
    speed_test: bool = flag(
        False, "measure images/s, GMACs and memory before the run", role="command"
    )
    speed_test_only: bool = flag(False, "measure, then stop", role="command")


@dataclass(frozen=True)
class OutputSettings:
    """Output."""

    print_freq: int = flag(
        10,
        "steps between two progress lines in a log file or pipe",
        range=at_least(1),
        role="compute",
        synonyms=("log_interval", "log_every"),
    )
    plots: bool = flag(True, "draw figures at the end of a run", role="command")
    tensorboard: bool = flag(
        False, "log to TensorBoard, in --output_dir/tensorboard", role="command"
    )
    wandb: bool = flag(False, "log to Weights & Biases, if wandb is installed", role="command")


@dataclass(frozen=True)
class DataSettings:
    """Data."""

    dataset: str = flag(
        "CIFAR100",
        "CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, NotMNIST, Flowers102, CORe50, Imagenet-R, "
        "digits (ships with scikit-learn) or ImageFolder; several, separated by commas, are "
        "learned one after the other; 5-datasets: five of them as in the original",
        synonyms=("data", "data_set", "dataset_name"),
    )
    data_path: str = flag(
        "/local_datasets/",
        "folder of the data; ImageFolder: with train/<class>/* and val/ or test/; its domains: "
        "with <domain>/train/<class>/*",
        role="place",
        dashed=True,
        synonyms=("data_dir", "data_root", "root", "datadir", "dataset_path", "data_folder"),
    )
    domains: tuple[str, ...] | None = flag(None, "domains to learn, in this order; none: all")
    file_lists: str | None = flag(
        None, "CORe50: folder of published file lists that define the domains; none: its sessions"
    )
    num_workers: int = flag(
        4,
        "DataLoader worker processes; 0: load in the main process",
        range=at_least(0),
        role="compute",
        synonyms=("workers", "j"),
    )
    pin_mem: bool = flag(
        True,
        "page-locked memory for faster copies to a GPU",
        role="compute",
        dashed=True,
        synonyms=("pin_memory",),
    )
    data_on_device: bool | str = flag(
        "auto",
        "store all images on the device, and crop and resize there: true, false, or auto (on a "
        "GPU, where they fit and the image transforms allow it)",
        choices=("auto",),
        role="compute",
    )
    eval_batch_size: int | None = flag(
        None,
        "test images of a batch, in whole vote groups; none: --batch-size, on a GPU at least 256",
        range=at_least(1),
        role="compute",
        synonyms=("test_batch_size", "val_batch_size"),
    )
    test_cache: float = flag(
        2.0,
        "gigabytes of decoded test images that a process caches",
        range=NOT_NEGATIVE,
        role="compute",
    )


@dataclass(frozen=True)
class TaskSettings:
    """Tasks."""

    scenario: str = flag(
        "class-incremental",
        "class-incremental, domain-incremental (CORe50, ImageFolder), gaussian (task-free), "
        "dataset-incremental (chosen by itself for several data sets) or joint (as --joint)",
        synonyms=("setting", "protocol"),
    )
    num_tasks: int | None = flag(
        None,
        "tasks that the classes are split into, or episodes of the gaussian scenario; none: 10, "
        "200 episodes, or as many as there are data sets or domains",
        range=at_least(1),
        synonyms=("tasks", "n_tasks", "num_sessions"),
    )
    classes_per_task: int | None = flag(
        None,
        "classes of a task; none: all classes, evenly",
        synonyms=("increment", "num_classes_per_task"),
    )
    shuffle: bool = flag(True, "shuffle the classes by --seed before the split")
    class_order: str | None = flag(
        None, "file with the order of classes (ids or names; JSON or text)"
    )
    train_mask: bool = flag(
        True, "training predicts the task's own classes only", synonyms=("class_mask", "mask")
    )
    task_inc: bool = flag(
        False,
        "task-incremental evaluation: predict among the classes of the image's task",
        synonyms=("til", "task_incremental"),
    )
    joint: bool = flag(False, "all tasks at once: the upper bound")
    eval_every: int = flag(
        1, "tasks between two evaluations; the last is always evaluated", range=at_least(1)
    )
    gaussian_reading: str = flag(
        "paper",
        "variant of the gaussian schedule: episodes of --steps_per_task steps, every batch once "
        "(paper), or of whole epochs on all images of their classes (released)",
        choices=("paper", "released"),
    )
    steps_per_task: int = flag(5, "steps of an episode of the paper's variant", range=at_least(1))
    gaussian_sigma: float = flag(
        50.0, "standard deviation of a class's presence, in steps", range=POSITIVE
    )

    @property
    def schedule_steps(self) -> int:
        """Positions of the Gaussian schedule that an episode takes.

        The released configuration gives no number of steps, which its arithmetic takes for one.
        """
        return 1 if self.gaussian_reading == "released" else self.steps_per_task

    def images_per_episode(self, global_batch: int) -> int | None:
        """Images drawn for an episode of the Gaussian schedule; None: all of its classes."""
        if self.gaussian_reading == "released" or self.joint:
            return None
        return self.steps_per_task * global_batch


@dataclass(frozen=True)
class ReplaySettings:
    """Replay."""

    buffer_size: int | None = flag(
        None,
        "images of earlier tasks to store, shared by the classes",
        range=at_least(1),
        synonyms=("memory_size", "mem_size", "buffer"),
    )
    buffer_per_class: int | None = flag(
        None, "images of each earlier class to store", range=at_least(1)
    )
    replay_batch: int | None = flag(
        None,
        "replayed images of a step, of each process, on top of --batch-size; none: as many",
        range=at_least(1),
    )

    @property
    def has_buffer(self) -> bool:
        """Whether images of earlier tasks are replayed."""
        return self.buffer_size is not None or self.buffer_per_class is not None


@dataclass(frozen=True)
class ModelSettings:
    """Model."""

    model: str = flag(
        "vit_base_patch16_224",
        "any plain timm ViT, with or without a weights tag",
        synonyms=("arch", "backbone", "net", "model_name"),
    )
    model_kwargs: dict[str, Any] = flag(
        {}, "arguments of timm's constructor, name=value", dashed=True, at_least_one=False
    )
    pretrained: bool | str = flag(
        True,
        "weights: true (timm fetches them), false (random), or a local .npz, .safetensors, .pth "
        "or .bin file",
        role="place",
        synonyms=("weights_path", "pretrained_weights"),
    )
    drop: float = flag(
        0.0,
        "dropout of positions and projections, in training",
        range=SHARE,
        synonyms=("dropout", "drop_rate"),
    )
    drop_path: float = flag(
        0.0,
        "stochastic depth, in training",
        range=SHARE,
        dashed=True,
        synonyms=("drop_path_rate", "stochastic_depth"),
    )
    global_pool: str = flag(
        "token",
        "token: final norm, then mean; avg: mean, then fc_norm",
        choices=("token", "avg"),
    )
    head_type: str = flag(
        "prompt",
        "output tokens that the head pools: token, gap, prompt or token+prompt",
        synonyms=("head", "pooling"),
    )
    head_init: str = flag(
        "trunc_normal", "initial weights of the head", choices=("trunc_normal", "zero")
    )
    prompt_position: str = flag(
        "class",
        "position embeddings of prompt tokens: copies of the class token's (class) or none "
        "(official_v2)",
        choices=("class", "none"),
    )
    freeze: tuple[str, ...] = flag(
        ("blocks", "patch_embed", "cls_token", "norm", "pos_embed"),
        "prefixes of the parameters that do not train; none: everything trains",
        at_least_one=False,
        synonyms=("frozen", "freeze_layers"),
    )

    @property
    def weight_file(self) -> Path | None:
        """The local file of `--pretrained PATH`; shipped weights are found from any folder."""
        if isinstance(self.pretrained, bool):
            return None
        path = Path(self.pretrained).expanduser()
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

    prompt_pool: bool = flag(
        True, "learn prompts; false: train the head and whatever is not frozen"
    )
    size: int = flag(
        10, "prompts in the pool (M)", range=at_least(1), synonyms=("pool_size", "num_prompts")
    )
    length: int = flag(
        5,
        "tokens of a prompt (L)",
        range=at_least(1),
        synonyms=("prompt_length", "prompt_len", "num_tokens"),
    )
    top_k: int = flag(
        5,
        "prompts selected for an image (K)",
        range=at_least(1),
        synonyms=("topk", "k", "num_selected"),
    )
    initializer: str = flag(
        "uniform",
        "initial prompts: U(-1, 1), zeros, or U(0, 0.01) as the JAX release",
        choices=("uniform", "zero", "official"),
        synonyms=("prompt_init",),
    )
    prompt_key: bool = flag(True, "keys are learned; false: the mean of the prompt's tokens")
    prompt_key_init: str = flag(
        "uniform", "initial keys", choices=("uniform", "zero", "official"), synonyms=("key_init",)
    )
    diversify: str = flag(
        "none",
        "selection in training: none (top-k), mask (task t trains the prompts [t*K, (t+1)*K) "
        "only) or frequency (the paper's penalty on prompts that earlier tasks used)",
    )
    shared_prompt_pool: bool = flag(False, "a task's prompts start from those of the previous task")
    shared_prompt_key: bool = flag(False, "a task's keys start from those of the previous task")
    batchwise_prompt: bool = flag(True, "a vote group shares its most frequent prompts")
    vote_group_size: int | None = flag(
        None, "images that vote together; none: --batch-size", range=at_least(1)
    )
    vote_ties: str = flag(
        "lowest",
        "who wins a tied vote: lowest (id), or topk (as the original)",
        choices=("lowest", "topk"),
    )
    embedding_key: str = flag(
        "cls",
        "the query: class token, or mean, maximum, maximum + 2 * mean of the patches",
        choices=("cls", "mean", "max", "mean_max"),
        synonyms=("query",),
    )
    predefined_key: str = flag("", "rejected: the original accepts it and does nothing with it")
    pull_constraint: bool = flag(True, "pull selected keys towards the query")
    pull_constraint_coeff: float = flag(
        0.1, "weight of the pull term", range=NOT_NEGATIVE, synonyms=("pull_coeff", "lambda")
    )

    @property
    def pull_coeff(self) -> float:
        """Weight of the pull term; 0 leaves it out."""
        return self.pull_constraint_coeff if self.pull_constraint else 0.0


@dataclass(frozen=True)
class OptimizerSettings:
    """Optimizer and learning rate."""

    batch_size: int = flag(
        16,
        "images of a step, of each process",
        range=at_least(1),
        dashed=True,
        synonyms=("bs", "b", "batch", "train_batch_size"),
    )
    drop_last: bool = flag(False, "drop the last step of an epoch if its batch is incomplete")
    epochs: int = flag(
        5, "epochs of each task", range=at_least(1), synonyms=("num_epochs", "n_epochs")
    )
    opt: str = flag("adam", "any optimizer of timm", synonyms=("optimizer", "optim"))
    opt_eps: float = flag(1e-8, "epsilon of the optimizer", range=POSITIVE, dashed=True)
    opt_betas: tuple[float, ...] | None = flag(
        None, "betas of the optimizer", dashed=True, synonyms=("betas", "adam_betas")
    )
    clip_grad: float | None = flag(
        1.0,
        "largest norm of the gradient; none: no limit",
        range=LIMIT,
        dashed=True,
        synonyms=("grad_clip", "max_norm", "clip", "max_grad_norm"),
    )
    momentum: float = flag(0.9, "momentum of SGD", range=SHARE)
    weight_decay: float = flag(
        0.0, "weight decay", range=NOT_NEGATIVE, dashed=True, synonyms=("wd",)
    )
    reinit_optimizer: bool = flag(True, "a fresh optimizer for each task")
    smoothing: float = flag(
        0.0,
        "label smoothing over the classes that may be predicted",
        range=SHARE,
        synonyms=("label_smoothing",),
    )
    lr: float = flag(
        0.03,
        "learning rate for a batch of 256",
        range=POSITIVE,
        synonyms=("learning_rate", "base_lr", "blr"),
    )
    lr_scale: str = flag(
        "per-device",
        "what --lr is multiplied by: none (1), per-device (batch-size / 256) or global "
        "(batch-size * processes / 256)",
        choices=("none", "per-device", "global"),
    )
    sched: str = flag(
        "constant",
        "schedule over the epochs of a task, started anew for each task",
        choices=("constant", "cosine", "tanh", "step", "multistep", "poly", "plateau"),
        synonyms=("scheduler", "lr_scheduler", "schedule"),
    )
    lr_noise: tuple[float, ...] | None = flag(
        None, "start and end of learning rate noise, as shares of the schedule", dashed=True
    )
    lr_noise_pct: float = flag(
        0.67, "limit of that noise, as a share of the learning rate", dashed=True
    )
    lr_noise_std: float = flag(1.0, "standard deviation of that noise", dashed=True)
    warmup_lr: float = flag(
        1e-6, "learning rate at the start of the warm-up", range=NOT_NEGATIVE, dashed=True
    )
    min_lr: float = flag(
        1e-5, "lowest learning rate of cyclic schedules", range=NOT_NEGATIVE, dashed=True
    )
    decay_epochs: float = flag(30.0, "epochs between two decays (step)", dashed=True)
    decay_milestones: tuple[int, ...] = flag(
        (30, 60), "epochs of the decays (multistep)", dashed=True, synonyms=("milestones",)
    )
    warmup_epochs: int = flag(
        5, "epochs of warm-up, unless the schedule is constant", range=at_least(0), dashed=True
    )
    cooldown_epochs: int = flag(
        10,
        "epochs at the lowest learning rate after a cyclic schedule",
        range=at_least(0),
        dashed=True,
    )
    patience_epochs: int = flag(
        10, "epochs without gain before a decay (plateau)", dashed=True, synonyms=("patience",)
    )
    decay_rate: float = flag(
        0.1, "factor of a decay", range=POSITIVE, dashed=True, synonyms=("gamma",)
    )

    def learning_rate(self, global_batch: int) -> float:
        """The rate that the optimizer gets: `--lr` scaled by the batch.

        Args:
            global_batch: Images of all processes in a training step.

        Source: l2p-pytorch multiplies by the batch of one process / 256.
        """
        if self.lr_scale == "none":
            return self.lr
        batch = global_batch if self.lr_scale == "global" else self.batch_size
        return self.lr * batch / 256


@dataclass(frozen=True)
class TransformSettings:
    """Image transforms."""

    input_size: int = flag(
        224,
        "pixels a side; the patch size must divide it",
        range=at_least(1),
        dashed=True,
        synonyms=("img_size", "image_size", "resolution", "imgsz"),
    )
    scale: tuple[float, float] = flag(
        (0.08, 1.0), "range of the random crop's area", range=CROP_AREA
    )
    ratio: tuple[float, float] = flag(
        (3 / 4, 4 / 3), "range of the random crop's width/height", range=ASPECT_RATIO
    )
    hflip: float = flag(0.5, "probability of a horizontal flip", range=PROBABILITY)
    train_interpolation: str = flag(
        "bilinear",
        "resampling of the crop; random: bilinear or bicubic for each image",
        choices=("nearest", "bilinear", "bicubic", "random"),
        dashed=True,
        synonyms=("interpolation",),
    )
    train_resize: int | None = flag(
        None, "pixels a side before the crop (the JAX release: 256)", range=at_least(1)
    )
    train_jpeg: int | None = flag(
        None, "quality of a JPEG round trip before the crop", range=QUALITY
    )
    test_interpolation: str = flag(
        "bicubic",
        "resampling of test images: bicubic, or bilinear (the JAX release)",
        choices=("bilinear", "bicubic"),
    )
    color_jitter: float | None = flag(
        None, "strength of colour jitter", range=NOT_NEGATIVE, dashed=True
    )
    aa: str | None = flag(
        None,
        "timm's augmentation policy, such as rand-m9-mstd0.5-inc1",
        synonyms=("auto_augment", "autoaugment"),
    )
    reprob: float = flag(0.0, "probability of random erasing", range=PROBABILITY)
    remode: str = flag(
        "pixel", "what an erased box is filled with", choices=("const", "rand", "pixel")
    )
    recount: int = flag(1, "number of erased boxes", range=at_least(1))
    norm: str = flag(
        "none",
        "pixel values: none ([0, 1], the original), half ([-1, 1]) or imagenet",
        choices=("none", "half", "imagenet"),
        synonyms=("normalize", "normalization"),
    )


@dataclass(frozen=True)
class PrecisionSettings:
    """Precision and compilation."""

    amp: str | None = flag(
        None,
        "mixed precision of the backbone: bf16, fp16, or none (fp32, the original)",
        choices=("bf16", "fp16"),
        synonyms=("mixed_precision", "precision", "dtype", "fp16", "bf16"),
    )
    tf32: bool = flag(False, "TensorFloat-32 products on a GPU, in place of full fp32")
    compile: bool = flag(
        False, "compile the passes through the backbone, with CUDA graphs", role="compute"
    )
    grad_checkpointing: bool = flag(
        False, "recompute activations in the backward pass to save memory", role="compute"
    )

    @property
    def loss_scaling(self) -> bool:
        """Whether gradients would underflow without a scale on the loss."""
        return self.amp == "fp16"


@dataclass(frozen=True)
class Given:
    """What a command line said.

    Attributes:
        configurations: Names or paths, in order.
        flags: Values by name that flags set.
        explicit: Names that flags and configurations set.
    """

    configurations: tuple[str, ...] = ()
    flags: Mapping[str, Any] = field(default_factory=dict)
    explicit: frozenset[str] = frozenset()


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
        return getattr(getattr(self, group_of(name)), name)

    def replace(self, given: Given | None = None, **values: Any) -> "Settings":
        """The same settings with other values, by name."""
        changed: dict[str, dict[str, Any]] = {}
        for name, value in values.items():
            if isinstance(value, list):
                value = tuple(value)
            changed.setdefault(group_of(name), {})[name] = value
        groups = {
            group: dataclasses.replace(getattr(self, group), **named)
            for group, named in changed.items()
        }
        return dataclasses.replace(self, **groups, given=given or self.given)

    def for_seed(self, seed: int) -> "Settings":
        """The settings of one run of `--seeds`, in a folder of its own."""
        return self.replace(seed=seed, output_dir=os.path.join(self.run.output_dir, f"seed{seed}"))

    def stored(self) -> dict[str, Any]:
        """Settings that describe the run, by name, as plain values for files."""
        return {one.name: plain(self[one.name]) for one in all_flags() if one.role != "command"}

    def command(self) -> dict[str, Any]:
        """What the command line said of the run: names of configurations, and flags with values.

        What only says where and how fast it is computed is left out.
        """
        flags = {
            name: plain(value)
            for name, value in self.given.flags.items()
            if find_flag(name).role not in ("command", "compute")
        }
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


@functools.cache
def all_flags() -> tuple[Flag, ...]:
    """Every setting, group by group."""
    return tuple(one for group in GROUPS.values() for one in flags_of(group))


@functools.cache
def _by_name() -> dict[str, Flag]:
    return {one.name: one for one in all_flags()}


@functools.cache
def _groups() -> dict[str, str]:
    return {one.name: name for name, group in GROUPS.items() for one in flags_of(group)}


def is_setting(name: str) -> bool:
    """Whether there is a setting of that name."""
    return name in _by_name()


def find_flag(name: str) -> Flag:
    """The declaration of a setting."""
    return _by_name()[name]


def group_of(name: str) -> str:
    """Which group of `Settings` holds a setting."""
    return _groups()[name]


def names_of(*roles: Role) -> Iterator[str]:
    """Names of the settings of some roles."""
    return (one.name for one in all_flags() if one.role in roles)


def plain(value: Any) -> Any:
    """A value as files hold it: lists in place of tuples."""
    return list(value) if isinstance(value, tuple) else value
