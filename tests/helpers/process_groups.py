"""Several processes that meet through the environment, as those of a launcher do.

They are forked from a server that has loaded the program, which saves seconds for each.
"""

import multiprocessing
import os
import random
import socket
import sys
import time
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait

import pytest
import torch

import utils
from cli.paths import ROOT
from helpers.launcher_environment import launcher_names

#: Seconds after a failure until the other processes are ended.
_GRACE = 3


@dataclass
class Ended:
    """How processes ended: exit code and output of each."""

    codes: list
    texts: list

    @property
    def text(self):
        """All output."""
        return "\n".join(self.texts)


def together(folder, count, work, environment=None, within=60):
    """Runs `work(rank)` in so many processes; none may still run after so many seconds.

    When one of them fails, the others get SIGTERM a little later, as from a launcher.
    """
    environment = environment or by_launcher(count)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"process{rank}.txt" for rank in range(count)]
    group = [
        context().Process(target=_process, args=(partial(work, rank), environment(rank), path))
        for rank, path in enumerate(paths)
    ]
    for process in group:
        process.start()
    latest = time.monotonic() + within
    while left := [process for process in group if process.is_alive()]:
        failed = any(process.exitcode for process in group)
        seconds = min(_GRACE if failed else within, latest - time.monotonic())
        if seconds <= 0:
            break
        if not wait([process.sentinel for process in left], seconds) and failed:
            for process in left:
                process.terminate()
    for process in left:
        process.kill()
    for process in group:
        process.join()
    codes, texts = [p.exitcode for p in group], [p.read_text() for p in paths]
    hanging = [group.index(process) for process in left]
    assert not hanging, f"processes {hanging} of {count} hang after {within} s:\n{texts}"
    return Ended(codes, texts)


def by_launcher(count, port=None):
    """Environment of every process, as torch.distributed.launch gives it."""
    port = port or free_port()
    return lambda rank: {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip


def by_mpi(count):
    """Environment of every process, as mpirun gives it."""
    job, name = {"PMIX_NAMESPACE": str(random.randrange(10**7))}, "OMPI_COMM_WORLD"
    size = {f"{name}_SIZE": str(count), f"{name}_LOCAL_SIZE": str(count)}
    return lambda rank: {
        **job, **size, f"{name}_RANK": str(rank), f"{name}_LOCAL_RANK": str(rank)
    }  # fmt: skip


def by_nobody(rank):
    """The environment of a process without a launcher."""
    return {}


def by_slurm(count, **more):
    """Environment of every task of a step of one node, as srun gives it."""
    while True:  # until the port that follows from the job's number is free
        job = {"SLURM_JOB_ID": str(random.randrange(10**7)), "SLURM_STEP_ID": "0"}
        step = {**job, "SLURM_STEP_NUM_TASKS": str(count), "SLURM_STEP_NODELIST": "localhost"}
        launch = utils.find_launch({**step, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", **more})
        with socket.socket() as one:
            if one.connect_ex(("localhost", int(launch.meeting_point.rpartition(":")[2]))):
                break
    return lambda rank: {**step, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), **more}


def free_port():
    """A port of this machine that nobody uses."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def context():
    """Where processes are forked from: a server that does not know what pytest has done since."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["helpers.process_runs", "experiment.session"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")  # as main.py, which is too late here
        multiprocessing.forkserver.ensure_running()
    return server


def _process(work, environment, path):
    for name in launcher_names(os.environ):
        del os.environ[name]
    os.environ.update(environment)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    multiprocessing.set_start_method("fork", force=True)  # of workers, as in a process of its own
    torch.set_num_threads(1)
    sys.exit(work())
