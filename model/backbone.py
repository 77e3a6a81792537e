"""A timm ViT as the frozen backbone: names, construction, weights, identity.

Source of the default: l2p-pytorch loads Google's `ViT-B_16.npz` (ImageNet-21k, neither AugReg nor
fine-tuned) under the name `vit_base_patch16_224`. In timm 1.x that bare name means another network.
"""

import hashlib
import inspect
import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Annotated, Any
from unittest import mock
from warnings import catch_warnings, simplefilter

import numpy as np
import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from cli import kinds
from cli.flags import between
from cli.options import near
from cli.paths import open_regular
from cli.settings import SHARE, ModelSettings, Settings
from cli.terminal import one_line, printable, reason
from continual_datasets.transforms import NORMS
from model.families import Backbone, Family, family_of, family_of_name, model_names
from utils import is_out_of_memory

#: Bare names that meant other weights in l2p-pytorch than they mean in timm today.
ORIGINAL_TAGS = {"vit_base_patch16_224": "vit_base_patch16_224.orig_in21k"}

#: Endings of weight files that `--pretrained PATH` reads.
WEIGHT_SUFFIXES = (".npz", ".safetensors", ".pth", ".pt", ".bin")

#: Types of numbers that weights are stored in.
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_Size = Annotated[int, between(1, 65536)]
_Count = Annotated[int, between(1, 256)]
_Few = Annotated[int, between(0, 4096)]
_Rate = Annotated[float, SHARE]
_Factor = Annotated[float, between(0, 256, above=True)]
_Pair = Annotated[tuple[_Size, ...], ("must be two numbers", lambda x: len(x) == 2)]


def _one_of(names: str) -> Any:
    known = names.split()
    return Annotated[str, (f"must be one of {', '.join(known)}", lambda x: x in known)]


#: Arguments of timm's constructors that `--model-kwargs` may give, by their type and range.
_ARGUMENTS: dict[Any, str] = {
    _Size | _Pair: "patch_size",
    _Size: "embed_dim num_heads",
    _Count: "depth",
    _Few: "reg_tokens num_reg_tokens",
    _Factor: "mlp_ratio",
    _Factor | None: "init_values",
    _Rate: "pos_drop_rate patch_drop_rate proj_drop_rate attn_drop_rate drop_path_rate",
    bool: "qkv_bias qk_norm scale_attn_norm scale_mlp_norm proj_bias no_embed_class pre_norm "
    "final_norm fix_init swiglu_mlp scale_mlp scale_attn_inner use_abs_pos_emb use_rot_pos_emb "
    "use_rel_pos_bias use_shared_rel_pos_bias",
    _one_of("learn none"): "pos_embed",
    _one_of("reset skip jax moco"): "weight_init",
    _one_of("layernorm rmsnorm simplenorm"): "norm_layer embed_norm_layer",
    _one_of("gelu gelu_tanh quick_gelu relu relu6 leaky_relu elu selu silu mish"): "act_layer",
    _one_of("cat mixed dinov3"): "rope_type",
}


def arguments_of(family: Family) -> dict[str, Any]:
    """What `--model-kwargs` may give to a ViT of a family, by type and range."""
    known = {name: kind for kind, names in _ARGUMENTS.items() for name in names.split()}
    takes = inspect.signature(family.kind).parameters.keys() - {*family.unsupported}
    return {name: kind for name, kind in known.items() if name in takes}


#: What to give instead of others.
_INSTEAD = {
    "--input-size": "img_size dynamic_img_size dynamic_img_pad",
    "--global_pool or --head_type": "global_pool fc_norm pool_include_prefix",
    "--drop": "drop_rate",
    "--pretrained": "pretrained pretrained_cfg pretrained_cfg_overlay pretrained_strict "
    "checkpoint_path",
    "nothing, images have three channels": "in_chans",
    "nothing, the data decide": "num_classes",
    "nothing, the model decides": "class_token",
    "nothing, layers are timm's own": "block_fn mlp_layer attn_layer embed_layer",
}


class WeightsError(ValueError):
    """A backbone that cannot be built, or weights that cannot be read or do not fit the model."""


def resolve_name(name: str) -> str:
    """Adds the weights tag that the original meant, where the bare timm name means another."""
    return ORIGINAL_TAGS.get(name, name)


def own_norm(name: str) -> str:
    """What `--norm` must be for the pixels that timm's weights of a model were trained on.

    Raises WeightsError if timm does not know the name.
    """
    _check_name(name)
    cfg: Any = timm.get_pretrained_cfg(resolve_name(name))
    own = tuple(cfg.mean), tuple(cfg.std)
    if own == ((0,) * 3, (1,) * 3):
        return "none"
    return next((n for n, norm in NORMS.items() if norm == own), ",".join(map(str, sum(own, ()))))


def with_own_norm(settings: Settings) -> Settings:
    """Settings with the model's own mean and deviation in the place of `--norm model`.

    They are what files store, whatever timm says later. Raises WeightsError as `own_norm`.
    """
    if settings.transforms.norm != "model":
        return settings
    return settings.replace(norm=own_norm(settings.model.model))


def build_backbone(
    settings: ModelSettings, input_size: int = 224, *, pretrained: bool = False
) -> Backbone:
    """The timm ViT that the settings name, without classifier; with their weights if `pretrained`.

    Raises:
        WeightsError: If timm does not know the name, an argument is not allowed, or the weights
            cannot be fetched; if it is no ViT of a family; if the patch size does not divide
            `input_size`, the pixels a side; if the weight file does not fit.
    """
    name, fetched = settings.model, pretrained and settings.pretrained is True
    family = _check_name(name)
    if problems := list(_argument_problems(settings.model_kwargs, family)):
        raise WeightsError("; ".join(problems))
    drops = {"pos_drop_rate": settings.drop, "proj_drop_rate": settings.drop}
    kwargs: dict[str, Any] = {"num_classes": 0, "img_size": input_size, **drops}
    kwargs |= {"drop_path_rate": settings.drop_path, **settings.model_kwargs}
    try:
        with mock.patch.dict(os.environ, TORCH_FORCE_WEIGHTS_ONLY_LOAD="1"):
            os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # timm 1.0.20 loads unsafely
            vit: Any = timm.create_model(resolve_name(name), pretrained=fetched, **kwargs)
        family_of(vit)  # not so with TIMM_USE_NAFLEX=1
        if rope := getattr(vit, "rope", None):
            rope.aug_active = False  # random rotations in training, which some models bring along
    except Exception as error:  # timm checks little, and a damaged file can raise anything
        if is_out_of_memory(error):
            raise
        raise WeightsError(_why_not_built(settings, fetched, error)) from error
    height, width = vit.patch_embed.patch_size
    if input_size % height or input_size % width:
        below, above = input_size // height * height, -(-input_size // height) * height
        near = f"{below} or {above}" if below else f"{above}"
        raise WeightsError(
            f"--input-size {input_size} is not divisible by the patch size {height}: use {near}"
        )
    if pretrained and settings.weight_file is not None:
        load_backbone_file(vit, settings.weight_file)
    return vit


def _check_name(name: str) -> Family:
    """The family of a name of timm: of no file, folder or address, which may hold code."""
    bare, _, tag = name.partition(".")
    known = timm.is_model(bare)
    if not known or (family := family_of_name(bare)) is None:
        problem, hint = "is no model of timm", near(bare, model_names())
        if known:
            module = timm.model_entrypoint(bare).__module__.rpartition(".")[2]
            problem = f"takes no prompts: it is of timm's {module}, no ViT with plain blocks, EVA's"
            problem += " or BEiT's"
        elif {*name} & set(":/"):
            hint = ": give the name of a model, and a file of weights with --pretrained PATH"
        hint = hint or ": choose one of --list_models"
        raise WeightsError(f"--model {printable(name)} {problem}{hint}")
    try:
        timm.get_pretrained_cfg(resolve_name(name))
    except RuntimeError:
        tags = [one.partition(".")[2] for one in timm.list_models(f"{bare}.*", pretrained=True)]
        hint = near(tag, tags or ["none"], most=99)
        raise WeightsError(
            f"--model {printable(name)}: timm has no weights of this tag{hint}"
        ) from None
    return family


def _argument_problems(arguments: Mapping[str, Any], family: Family) -> Iterator[str]:
    """What of `--model-kwargs` is not allowed: unknown, not for the command line, out of range."""
    allowed = arguments_of(family)
    known = {name: value for name, value in arguments.items() if name in allowed}
    yield from (f"--model-kwargs: {problem}" for problem in kinds.problems(allowed, known))
    for name in (name for name in arguments if name not in known):
        instead = next((flag for flag, names in _INSTEAD.items() if name in names.split()), None)
        hint = near(name, [*allowed]) or ": it takes arguments of the network alone"
        hint = f": give {instead}" if instead else hint
        yield f"--model-kwargs {printable(name)} is not allowed{hint}"


def _why_not_built(settings: ModelSettings, fetched: bool, error: Exception) -> str:
    name, kwargs = resolve_name(settings.model), settings.model_kwargs
    if fetched and (file := _cached_weights(name)) is not None:
        return (
            f"the weights of --model {name} in {file} are damaged or do not fit: {reason(error)}; "
            "delete the file to download it again, or give another with --pretrained PATH"
        )
    if fetched:
        return (
            f"timm could not fetch the weights of --model {name}: {reason(error)}. Without a "
            "network give a local file: --pretrained PATH (.npz, .safetensors, .pth or .bin)"
        )
    given = " ".join(f"{key}={value}" for key, value in kwargs.items())
    with_kwargs = f" with --model-kwargs {printable(given)}" if kwargs else ""
    return f"timm cannot build --model {settings.model}{with_kwargs}: {reason(error)}"


def _cached_weights(name: str) -> Path | None:
    """The file in a cache of downloads that timm reads the weights of a model from, if any."""
    from huggingface_hub import try_to_load_from_cache

    cfg: Any = timm.get_pretrained_cfg(name)
    known = (cfg.hf_hub_filename, "model.safetensors", "pytorch_model.bin")
    names = filter(None, known if cfg.hf_hub_id else ())
    found = (try_to_load_from_cache(cfg.hf_hub_id, file) for file in names)
    paths = (Path(one).resolve() for one in found if isinstance(one, str))
    return next(filter(Path.is_file, paths), None)


@contextmanager
def without_memory() -> Iterator[None]:
    """Builds models in its body without weights, to check names, arguments and sizes."""
    with torch.device("meta"), _NumbersOnCPU():
        yield


class _NumbersOnCPU(TorchFunctionMode):
    """Keeps `torch.linspace` real: timm 1.0.20 reads numbers from it while it builds a model."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        device = {"device": "cpu"} if func is torch.linspace else {}
        return func(*args, **{**(kwargs or {}), **device})


def identify(vit: Backbone, name: str, source: str) -> dict[str, str]:
    """Which network a ViT is, wherever it was loaded from, for result files and checkpoints.

    Returns `name` (of timm, with tag), `source` (a file's name, `timm` or `random`), and `sha256`
    of names, types, shapes and values of all its tensors.
    """
    digest = hashlib.sha256()
    for key, value in sorted(vit.state_dict().items()):
        digest.update(f"{key} {tuple(value.shape)} {value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return {"name": resolve_name(name), "source": source, "sha256": digest.hexdigest()}


def load_backbone_file(vit: Backbone, path: Path) -> None:
    """Loads Google's `.npz` or a state dict into a ViT, but for the classifier; runs no code.

    Positions are resampled where the grid differs. Raises WeightsError if there is no such file, or
    it is damaged or does not fit, naming file, tensor, expected and found.
    """
    if not path.is_file():
        raise WeightsError(f"there is no weight file {path}: give its place with --pretrained")
    load = _load_npz if path.suffix == ".npz" else _load_state_dict
    try:
        load(vit, path)
    except WeightsError:
        raise
    except Exception as error:  # a damaged file can make the readers raise anything
        raise WeightsError(f"{path} is damaged or does not fit --model: {reason(error)}") from error


def _load_state_dict(vit: Backbone, path: Path) -> None:
    with open_regular(path) as file, catch_warnings():
        simplefilter("ignore")  # of a pickle, or of TorchScript, that is rejected
        check_checksums(file)
        state = timm.models.load_state_dict(str(path), weights_only=True)
        assert all(isinstance(value, Tensor) for value in state.values()), "no state dict in it"
        state = family_of(vit).checkpoint_filter(state, vit)
    state = {name: value for name, value in state.items() if not name.startswith("head")}
    copy_state(dict(vit.named_parameters()), state, str(path))


def _load_npz(vit: Any, path: Path) -> None:
    """Loads an `.npz` by timm, after depth, heads and width, which timm would not compare."""
    with np.load(path) as arrays:
        for name in arrays.files:
            values = arrays[name]
            if values.ndim and not (values.dtype.kind == "f" and np.isfinite(values).all()):
                raise ValueError(f"{name} holds other values than finite floating point numbers")
        parts = {part for name in arrays.files for part in name.split("/")}
        blocks = [part for part in parts if part.startswith("encoderblock_")]
        if len(blocks) != len(vit.blocks):
            raise ValueError(f"it has {len(blocks)} blocks, expected {len(vit.blocks)}")
        block: Any = vit.blocks[0]
        width, heads, hidden = vit.embed_dim, block.attn.num_heads, block.mlp.fc1.out_features
        shapes = {"query/kernel": (width, heads, width // heads), "Dense_0/kernel": (width, hidden)}
        for ending, wanted in shapes.items():
            for name in (name for name in arrays.files if name.endswith(ending)):
                if (shape := arrays[name].shape) != wanted:
                    raise ValueError(f"{name} is {shape}, expected {wanted}")
    vit.load_pretrained(str(path))


def check_checksums(file: IO[bytes]) -> None:
    """Makes sure of the checksums that torch.save writes; torch.load ignores them.

    Raises:
        BadZipFile: Naming the first part whose checksum is wrong.
    """
    if zipfile.is_zipfile(file):  # torch.save wrote other files before version 1.6
        with zipfile.ZipFile(file) as parts:
            if damaged := parts.testzip():
                raise zipfile.BadZipFile(f"the checksum of {damaged} in it is wrong")
    file.seek(0)


def copy_state(tensors: dict[str, Tensor], state: dict[str, Tensor], source: str) -> None:
    """Copies a state into tensors of the same names and shapes, all or none.

    Raises WeightsError that names `source` and every missing, unknown or misshapen tensor.
    """
    problems = [f"{name} is missing" for name in tensors if name not in state]
    for name, value in state.items():
        if name not in tensors:
            problems.append(f"{name} has no place in this model")
        elif problem := _misfit(value, tensors[name]):
            problems.append(f"{name} {problem}")
    if problems:
        shown = "; ".join(problems[:8]) + (f"; and {len(problems) - 8} more" * (len(problems) > 8))
        raise WeightsError(f"{source} does not fit the model: {one_line(shown)}")
    with torch.no_grad():
        for name, value in state.items():
            tensors[name].copy_(value)


def is_dense(value: object) -> bool:
    """Whether something is a tensor with plain values: not sparse, quantized, meta or nested."""
    if not isinstance(value, Tensor) or value.is_quantized or value.is_nested:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _misfit(value: object, tensor: Tensor) -> str | None:
    """Why a stored value does not fit a tensor; None: it does."""
    if not isinstance(value, Tensor) or not is_dense(value):
        return "is no dense tensor"
    if tensor.shape != value.shape:
        return f"is {tuple(value.shape)}, expected {tuple(tensor.shape)}"
    if value.dtype not in (_FLOATS if tensor.is_floating_point() else (tensor.dtype,)):
        return f"holds numbers of type {value.dtype}, expected {tensor.dtype}"
    if not value.to(tensor.dtype).isfinite().all():
        return "holds values that are no finite numbers"
    return None
