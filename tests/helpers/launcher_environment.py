"""The environment variables by which a launcher describes a process."""

import os

import pytest

#: What torch.distributed.launch and torchrun set.
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def launcher_names(environ):
    """Names of the variables that a launcher, Slurm or MPI has set."""
    prefixes = "SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_"
    return [name for name in environ if name.startswith(prefixes) or name in LAUNCHER]


@pytest.fixture
def no_launcher(monkeypatch):
    """The environment of a process that nobody launched."""
    for name in launcher_names(os.environ):
        monkeypatch.delenv(name)
