"""A server on this machine of tiny data sets in their published files."""

import gzip
import shutil
import threading
import urllib.request
from contextlib import suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from continual_datasets.readers.registry import SOURCES
from helpers.true_formats import take_for_published, write

LOCAL, NOWHERE = "http://127.0.0.1:", "http://127.0.0.1:1/"

#: Folders that are published as an archive.
PACKED = {
    "cifar-10-python.tar.gz": "cifar-10-batches-py",
    "cifar-100-python.tar.gz": "cifar-100-python",
    "102flowers.tgz": "flowers-102/jpg",
}

urlopen = urllib.request.urlopen


def point(monkeypatch, address):
    """Makes requests to other machines ask an address for the file of that name."""

    def redirected(request):
        if not request.full_url.startswith(LOCAL):
            request.full_url = address + Path(request.full_url).name
        return urlopen(request)

    monkeypatch.setattr("urllib.request.urlopen", redirected)


class DataServer(ThreadingHTTPServer):
    """Serves the published files in a folder; can stop in the middle of a download."""

    daemon_threads = True

    def __init__(self, folder, monkeypatch):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=folder))
        self.folder, self.data, self.monkeypatch = folder, folder / "data", monkeypatch
        self.address = f"{LOCAL}{self.server_port}/"
        self.downloads = []
        self.half_sent, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        point(monkeypatch, self.address)

    def pause(self):
        """Lets the next downloads stop half-way until `go_on` is set."""
        self.half_sent.clear()
        self.go_on.clear()

    def publish(self, name):
        """Writes a data set to `data`, and the files in which it is published."""
        write(name, self.data)
        for path in (Path(file) for file, _ in SOURCES[name].files):
            if path.name in PACKED:
                folder = self.data / PACKED[path.name]
                packed = shutil.make_archive(str(folder), "gztar", folder.parent, folder.name)
                shutil.move(packed, self.folder / path.name)
            elif path.suffix == ".gz":
                content = (self.data / path.with_suffix("")).read_bytes()
                (self.folder / path.name).write_bytes(gzip.compress(content))
            else:
                shutil.copy(self.data / path, self.folder)
        take_for_published(name, self.folder, self.monkeypatch)


class Handler(SimpleHTTPRequestHandler):
    """Sends a file in two halves, between which the server can pause."""

    def copyfile(self, source, outputfile):
        content = source.read()
        half = len(content) // 2
        is_download = self.headers["Method"] != "HEAD"  # so torchvision asks for redirections
        with suppress(ConnectionError):  # the other end was killed, or wants no more
            outputfile.write(content[:half])
            outputfile.flush()
            if is_download:
                self.server.downloads.append(Path(self.path).name)
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
