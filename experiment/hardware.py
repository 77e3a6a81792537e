"""The machine that a process computes on: what results name of it, and what its GPU cannot do."""

import platform
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import torch
from torch.nn.attention import SDPBackend

from cli.settings import Settings
from cli.terminal import reason
from experiment.precision import AMP_DTYPES
from training.state import Run

#: What the driver of NVIDIA says of itself; there is no such file without one.
_DRIVER = Path("/proc/driver/nvidia/version")


def record(run: Run) -> dict[str, Any]:
    """What computes a run, see `machine`; `attention` is the kernel of the prompted pass.

    It is None without a GPU, and where attention is not fused.
    """
    on_cuda = run.device.type != "cpu"
    return {**machine(run.device), "attention": _attention(run) if on_cuda else None}


def machine(device: torch.device) -> dict[str, Any]:
    """What computes: `cpu`, `threads`, and the GPU; what concerns a GPU is None without one.

    `gpu` is its name, `gpu_memory` in GiB, `compute_capability`, `driver`, `cuda` and `cudnn` are
    versions.
    """
    names = re.findall(r"model name\s*: (.+)", _read(Path("/proc/cpuinfo")))
    found = {"cpu": names[0] if names else platform.machine(), "threads": torch.get_num_threads()}
    if device.type == "cpu":
        ours = "gpu", "gpu_memory", "compute_capability", "driver", "cuda", "cudnn"
        return {**found, **dict.fromkeys(ours)}
    properties = torch.cuda.get_device_properties(device)
    driver = re.search(r"Module.*?(\d+\.[\d.]+)", _read(_DRIVER))
    return {
        **found,
        "gpu": properties.name,
        "gpu_memory": round(properties.total_memory / 2**30, 1),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "driver": driver[1] if driver else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def problem(device: torch.device) -> str | None:
    """Why torch cannot compute on a device; None: it can."""
    if device.type == "cpu":
        return None
    with catch_warnings():
        simplefilter("ignore")  # torch's own of the same, in ten lines
        properties = torch.cuda.get_device_properties(device)
    why = missing_kernels(properties.major, properties.minor)
    return why and f"--device {device}, {properties.name}: {why}, or use --device cpu"


def missing_kernels(major: int, minor: int) -> str | None:
    """That torch has no kernels for GPUs of a compute capability; None: it has, or is unknown.

    `torch.cuda.get_arch_list` names none on a machine without a GPU, such as a login node.
    """
    known = (getattr(torch._C, "_cuda_getArchFlags", str)() or "").split()
    for arch in known if torch.version.cuda else ():
        kind, number = arch.split("_")[0], int(re.sub(r"\D", "", arch))
        is_own = number // 10 == major and number % 10 <= minor
        if is_own or (kind == "compute" and number <= 10 * major + minor):
            return None
    if not known or not torch.version.cuda:
        return None
    return (
        f"torch {torch.__version__} has no kernels for compute capability {major}.{minor} (it has "
        f"{', '.join(known)}): install one for another version of CUDA"
    )


def notes(settings: Settings, device: torch.device) -> Iterator[str]:
    """What people may not expect of the device, a line each."""
    if device.type == "cpu":
        if settings.run.device == "auto" and (why := _why_no_gpu()):
            yield f"--device auto: on the CPU, although there is a driver of NVIDIA ({why})"
        if (amp := settings.precision.amp) and not _has_products(amp):
            yield f"--amp {amp}: this CPU has no instructions for it: leave it out, fp32 is faster"
        return
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return
    gpu = f"{torch.cuda.get_device_name(device)}, whose compute capability is below 8.0"
    if settings.precision.amp == "bf16":
        yield f"--amp bf16 is emulated on {gpu}: --amp fp16 is faster"
    if settings.precision.tf32:
        yield f"--tf32 has no effect on {gpu}"


def _has_products(amp: str) -> bool:
    """Whether a CPU multiplies matrices of a type of `--amp` by oneDNN, and not number by number.

    torch has no public function for that.
    """
    return bool(getattr(torch.ops.mkldnn, f"_is_mkldnn_{amp}_supported", lambda: True)())


def _why_no_gpu() -> str | None:
    """Why torch finds no GPU where a driver is; None: there is no driver, or nothing is wrong."""
    if not (_DRIVER.exists() or shutil.which("nvidia-smi")):
        return None
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the latter without CUDA
        return reason(error)
    return None


def _attention(run: Run) -> str | None:
    """The kernel of attention in a training step, such as FLASH_ATTENTION; None: not fused.

    torch has no public function for that: those of torch.backends.cuda say what is possible.
    """
    vit, choose = run.model.backbone, getattr(torch, "_fused_sdp_choice", None)
    attention: Any = getattr(vit.blocks[0], "attn", None)
    if choose is None or not getattr(attention, "fused_attn", False):
        return None
    heads = attention.num_heads
    tokens = vit.patch_embed.num_patches + vit.num_prefix_tokens + run.model.num_prompt_tokens
    amp = run.settings.precision.amp
    dtype = torch.float32 if amp is None else AMP_DTYPES[amp]
    shape = (1, heads, tokens, vit.embed_dim // heads)
    q = torch.empty(shape, dtype=dtype, device=run.device, requires_grad=True)
    bias = q.new_empty(tokens, tokens) if hasattr(vit, "rel_pos_bias") else None
    return SDPBackend(choose(q, q, q, bias)).name


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""
