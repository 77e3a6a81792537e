"""The run that tests of stopping and resuming compare with."""

import pytest

import main


@pytest.fixture(scope="session")
def command(tiny):
    """A command line without its folder: two tasks, two epochs of two steps each."""
    return [*tiny, "--batch-size", "8"]


@pytest.fixture(scope="session")
def whole(command, tmp_path_factory):
    """The folder of a run that never stopped."""
    folder = tmp_path_factory.mktemp("whole")
    assert main.main([*command, "--output_dir", str(folder)]) == 0
    return folder
