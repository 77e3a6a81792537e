"""What all tests share: one thread, explicit attention, small models and data."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.layers import set_fused_attn

import utils

pytest.register_assert_rewrite("helpers")

pytest_plugins = ["helpers.data_server", "helpers.launcher_environment", "helpers.process_runs"]

torch.set_num_threads(1)


def pytest_collection_finish(session):
    """Lets the server of processes load the program while the first tests run."""
    from helpers import process_groups

    if len(session.items) > 1000:
        process_groups.context()


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def explicit_attention():
    """The original's arithmetic; fused attention differs in the last digits."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """Four classes of eight training and three test pictures, each class of a colour of its own."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    colors = rng.integers(0, 256, (4, 1, 1, 3))
    for split, count in (("train", 8), ("val", 3)):
        for name, color in zip("abcd", colors, strict=True):
            target = folder / split / name
            target.mkdir(parents=True)
            for i in range(count):
                noise = rng.integers(-60, 60, (20, 18, 3))
                pixels = np.clip(color + noise, 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def tiny(image_folder):
    """A command line without its folder: two tasks of two epochs, of four steps each."""
    from helpers.tiny_flags import TINY

    return [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder)]


@pytest.fixture(scope="session")
def trained(tiny, tmp_path_factory):
    """A finished run of that command line, with figures, which no test changes."""
    from helpers.finished_runs import Run, typed

    folder = tmp_path_factory.mktemp("trained")
    assert typed(*tiny, "--plots", "--output_dir", folder)[0] == 0
    return Run(folder)


@pytest.fixture
def yaml_file(tmp_path):
    """Writes a YAML file of one's own; gives its path."""

    def write(text, name="own"):
        path = tmp_path / f"{name}.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


@pytest.fixture
def no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def restore_logging():
    """Takes away the handlers that a command has added to the root logger."""
    yield
    utils.end_logging()
