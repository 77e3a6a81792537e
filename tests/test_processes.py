"""Who a process is, and how several of them work and end together."""

import pytest
import torch

import processes


def test_init_processes_without_launcher_is_one_process(no_launcher):
    assert processes.init_processes("cpu") == processes.Processes(0, 1, torch.device("cpu"))
    assert not torch.distributed.is_initialized()
    assert processes.is_main_process()


def test_init_processes_ignores_an_interactive_slurm_shell(no_launcher, monkeypatch):
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert processes.init_processes("cpu").world_size == 1


def test_init_processes_joins_the_group_of_a_launcher(no_launcher, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.setenv("LOCAL_RANK", "0")
    try:
        place = processes.init_processes("cpu", dist_url=f"file://{tmp_path}/rendezvous")
        assert place == processes.Processes(0, 1, torch.device("cpu"))
        assert torch.distributed.is_initialized()
        assert processes.is_main_process()
        values = torch.ones(2)
        assert processes.sum_over_processes(values).tolist() == [1, 1]
    finally:
        processes.close_processes()
    assert not torch.distributed.is_initialized()


def test_device_auto_is_cpu_without_cuda(no_launcher, no_cuda):
    assert processes.init_processes("auto").device == torch.device("cpu")


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_device_cuda_without_cuda_is_an_error(no_launcher, no_cuda, device):
    with pytest.raises(ValueError, match=f"--device {device}: torch finds no CUDA device"):
        processes.init_processes(device)


@pytest.mark.parametrize(
    ("device", "local_rank", "index"), [("cuda", 3, 3), ("auto", 2, 2), ("cuda:1", 3, 1)]
)
def test_device_cuda_follows_local_rank_unless_numbered(monkeypatch, device, local_rank, index):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert processes.choose_device(device, processes.Launch(local_rank=local_rank)) == torch.device(
        "cuda", index
    )


def test_device_beyond_the_gpus_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="process 3 asks for GPU 3 of 2"):
        processes.choose_device("cuda", processes.Launch(local_rank=3))


@pytest.mark.parametrize("device", ["gpu", "cpu:x", "meta", "mps"])
def test_device_of_unknown_name_is_a_value_error(no_launcher, device):
    with pytest.raises(ValueError, match=device):
        processes.init_processes(device)


def test_sums_of_a_single_process_change_nothing():
    parameter = torch.nn.Parameter(torch.ones(2))
    assert processes.sum_over_processes(torch.tensor([1.0, 2.0])).tolist() == [1, 2]
    processes.sum_gradients([parameter])
    assert parameter.grad is None
