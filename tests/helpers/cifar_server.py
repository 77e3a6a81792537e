"""The `cifar` fixture: a tiny CIFAR-100 in its original format, on a server of this machine."""

import pickle
from hashlib import md5

import numpy as np
import pytest
from torchvision.datasets import CIFAR100

from helpers.archives import write_tar
from helpers.http_server import serve


def cifar_files(num_train=200, num_test=100):
    """CIFAR-100 as its authors pickled it: three files; an image is a row, plane by plane."""
    rng = np.random.default_rng(0)

    def split(n):
        return {
            "data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            "fine_labels": [i % 100 for i in range(n)],
            "coarse_labels": [i % 20 for i in range(n)],
            "filenames": [f"{i}.png" for i in range(n)],
            "batch_label": "tiny",
        }

    meta = {
        "fine_label_names": [f"class_{i:02}" for i in range(100)],
        "coarse_label_names": [f"super_{i}" for i in range(20)],
    }
    return {"train": split(num_train), "test": split(num_test), "meta": meta}


@pytest.fixture
def cifar(monkeypatch, tmp_path):
    """A tiny CIFAR-100 that torchvision's reader takes for the true one, and its server."""
    contents = cifar_files()
    raw = {name: pickle.dumps(content) for name, content in contents.items()}
    (tmp_path / "server").mkdir()
    archive = tmp_path / "server" / CIFAR100.filename
    write_tar(archive, {f"cifar-100-python/{name}": data for name, data in raw.items()})
    (tmp_path / "server" / "login.html").write_text("log in to the wireless network")
    sums = {name: md5(data).hexdigest() for name, data in raw.items()}
    monkeypatch.setattr(CIFAR100, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(CIFAR100, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(CIFAR100, "meta", {**CIFAR100.meta, "md5": sums["meta"]})
    monkeypatch.setattr(CIFAR100, "tgz_md5", md5(archive.read_bytes()).hexdigest())
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "server") as server:
        monkeypatch.setattr(CIFAR100, "url", f"{server.address}/{CIFAR100.filename}")
        yield contents, raw, server
