"""What a GPU cannot do, on machines that have none or another."""

from types import SimpleNamespace

import pytest
import torch

import main
from cli.settings import Settings
from experiment import hardware
from helpers.tiny_flags import TINY_DIGITS

CPU, SECOND = torch.device("cpu"), torch.device("cuda", 1)


@pytest.fixture
def gpu(monkeypatch):
    """Lets torch see two GPUs of a compute capability; it has kernels as the flags say."""

    def see(capability, flags="sm_75 sm_80 sm_90"):
        major, minor = map(int, capability.split("."))
        properties = SimpleNamespace(name="A GPU", major=major, minor=minor)
        for name, value in {
            "is_available": True, "device_count": 2, "get_device_properties": properties,
            "current_device": 1, "get_device_name": "A GPU",
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
        monkeypatch.setattr(torch._C, "_cuda_getArchFlags", lambda: flags, raising=False)
        monkeypatch.setattr(torch.version, "cuda", flags and "13.2")

    return see


@pytest.mark.parametrize(
    ("capability", "flags", "has"),
    [
        ("7.0", "sm_75 sm_80 sm_90", False), ("7.5", "sm_75 sm_80 sm_90", True),
        ("8.9", "sm_75 sm_80 sm_90", True), ("9.0", "sm_75 sm_80 sm_90a", True),
        ("10.0", "sm_75 sm_80 sm_90", False), ("12.0", "sm_90 compute_90", True),
        ("8.6", "sm_90 compute_90", False), ("12.0", "sm_100 sm_120", True),
        ("7.0", "", True), ("7.0", None, True),
    ],
)  # fmt: skip
def test_kernels_that_torch_lacks_are_one_problem(gpu, capability, flags, has):
    gpu(capability, flags)
    found = hardware.problem(SECOND)
    assert (found is None) == has
    if not has:
        start = f"--device cuda:1, A GPU: torch {torch.__version__} has no kernels for compute"
        assert found.startswith(f"{start} capability {capability} (it has sm_")
        assert found.endswith("): install one for another version of CUDA, or use --device cpu")


def test_it_is_named_with_all_other_problems(gpu, capsys):
    gpu("7.0")
    argv = [flag if flag != "cpu" else "cuda:1" for flag in TINY_DIGITS]
    assert main.main([*argv, "--sched", "wave"]) == 2
    err = capsys.readouterr().err
    assert "--sched wave" in err
    assert "--device cuda:1, A GPU: torch" in err


@pytest.mark.parametrize(
    ("capability", "settings", "notes"),
    [
        ("7.5", {"amp": "bf16", "tf32": True}, ["--amp bf16 is emulated", "--tf32 has no effect"]),
        ("7.5", {"amp": "fp16"}, []),
        ("8.0", {"amp": "bf16", "tf32": True}, []),
    ],
)
def test_older_gpus_are_named_for_what_they_emulate(gpu, capability, settings, notes):
    gpu(capability)
    found = list(hardware.notes(Settings().replace(**settings), SECOND))
    for note, start in zip(found, notes, strict=True):
        assert note.startswith(f"{start} on A GPU, whose compute capability is below 8.0")


@pytest.mark.parametrize(
    ("amp", "supported", "number"), [("bf16", 0, 1), ("fp16", 1, 0), (None, 0, 0)]
)
def test_cpus_are_named_for_what_they_emulate(monkeypatch, amp, supported, number):
    for name in ("bf16", "fp16"):
        monkeypatch.setattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", lambda: supported)
    found = list(hardware.notes(Settings().replace(device="cpu", amp=amp), CPU))
    assert len(found) == number
    assert all(note.startswith("--amp bf16: this CPU has no instructions") for note in found)


@pytest.mark.parametrize("error", [RuntimeError("too old"), AssertionError("no CUDA"), None])
@pytest.mark.parametrize(("device", "has_driver"), [("auto", 1), ("auto", 0), ("cpu", 1)])
def test_cpu_beside_a_driver_has_a_reason(monkeypatch, tmp_path, device, has_driver, error):
    def init():
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setattr(hardware, "_DRIVER", tmp_path if has_driver else tmp_path / "none")
    monkeypatch.setattr("shutil.which", lambda _: None)
    found = list(hardware.notes(Settings().replace(device=device), CPU))
    assert len(found) == (device == "auto" and has_driver and error is not None)
    assert all(f"driver of NVIDIA ({type(error).__name__}: {error})" in note for note in found)


def test_driver_is_read_from_either_kind_of_module(gpu, monkeypatch, tmp_path):
    gpu("9.0")
    monkeypatch.setattr(hardware, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(hardware, "_attention", lambda _: None)
    properties = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    for line, version in (
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5",
            "550.54.15",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  R",
            "580.65.06",
        ),
        ("", None),
    ):
        (tmp_path / "version").write_text(f"{line}\nGCC version:  gcc version 12.2.0\n")
        found = hardware.record(SimpleNamespace(device=SECOND))
        assert found["driver"] == version
        assert (found["gpu_memory"], found["compute_capability"]) == (80.0, "9.0")
