"""A server on this machine of tiny data sets in their published files."""

import shutil
import threading
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from torchvision.datasets import CIFAR10, CIFAR100, MNIST, SVHN, FashionMNIST, Flowers102

from helpers.true_formats import TRUE_FORMATS, digest, write_idx

NOWHERE = "http://127.0.0.1:1/"


class DataServer(ThreadingHTTPServer):
    """Serves a folder; counts the downloads, and can stop in the middle of them."""

    daemon_threads = True

    def __init__(self, folder, monkeypatch):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.folder, self.monkeypatch = folder, monkeypatch
        self.address = f"http://127.0.0.1:{self.server_port}/"
        self.downloads = []
        self.half_sent, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()

    def pause(self):
        """Lets the next downloads stop half-way until `go_on` is set."""
        self.half_sent.clear()
        self.go_on.clear()

    def publish(self, name):
        """Writes a data set to the folder, and makes torchvision expect it at this address."""
        folder, kind = self.folder, KINDS[name]
        if kind in (MNIST, FashionMNIST):
            write_idx(folder / name, packed=True)
            sums = [(file, digest(folder / name / file)) for file, _ in kind.resources]
            self.monkeypatch.setattr(kind, "resources", sums)
        else:
            TRUE_FORMATS[name](folder, self.monkeypatch)
        if kind in (CIFAR10, CIFAR100):
            archive = pack(folder / kind.filename, folder / kind.base_folder)
            self.monkeypatch.setattr(kind, "tgz_md5", digest(archive))
        if kind is Flowers102:
            top = folder / "flowers-102"
            archive = pack(top / "102flowers.tgz", top / "jpg")
            files = {**kind._file_dict, "image": (archive.name, digest(archive))}
            self.monkeypatch.setattr(kind, "_file_dict", files)
        point(self.monkeypatch, name, self.address)


def point(monkeypatch, name, *addresses):
    """Makes torchvision look for a data set at an address; several are mirrors of MNIST's."""
    kind, address = KINDS[name], addresses[0]
    if kind in (CIFAR10, CIFAR100):
        monkeypatch.setattr(kind, "url", address + kind.filename)
    elif kind is SVHN:
        files = {
            split: [f"{address}SVHN/{file}", file, md5]
            for split, (_, file, md5) in kind.split_list.items()
        }
        monkeypatch.setattr(kind, "split_list", files)
    elif kind is Flowers102:
        monkeypatch.setattr(kind, "_download_url_prefix", f"{address}flowers-102/")
    else:
        monkeypatch.setattr(kind, "mirrors", [f"{address}{name}/" for address in addresses])


KINDS = {kind.__name__: kind for kind in (CIFAR10, CIFAR100, MNIST, FashionMNIST, SVHN, Flowers102)}


def pack(archive, folder):
    """Packs a folder, by its name, into an archive beside it."""
    packed = shutil.make_archive(str(folder), "gztar", folder.parent, folder.name)
    return Path(shutil.move(packed, archive))


class Handler(SimpleHTTPRequestHandler):
    """Sends a file in two halves, between which the server can pause."""

    def do_GET(self):
        if self.headers["Method"] != "HEAD":  # so torchvision asks for redirections
            self.server.downloads.append(Path(self.path).name)
        super().do_GET()

    def copyfile(self, source, outputfile):
        content = source.read()
        half = len(content) // 2
        with suppress(ConnectionError):  # the other end was killed, or wants no more
            outputfile.write(content[:half])
            outputfile.flush()
            if self.headers["Method"] != "HEAD":
                self.server.half_sent.set()
                self.server.go_on.wait(20)
            outputfile.write(content[half:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of an empty folder."""
    (tmp_path / "server").mkdir()
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with DataServer(tmp_path / "server", monkeypatch) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go_on.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def cifar(server):
    """A server of a tiny CIFAR-100 that torchvision's reader takes for the true one."""
    server.publish("CIFAR100")
    return server
