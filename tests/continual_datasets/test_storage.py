"""Downloads, archives and locks: what is there is used, the rest is made once, nothing is lost."""

import errno
import io
import logging
import os
import pickle
import shutil
import signal
import stat
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from filelock import FileLock
from torchvision.datasets import CIFAR100, MNIST

from continual_datasets.readers import downloaded, storage
from continual_datasets.readers.registry import count_classes
from continual_datasets.readers.storage import new_folder, one_at_a_time
from helpers.commands import wait_until
from helpers.data_server import NOWHERE, point
from helpers.killed_commands import exit_code, in_child
from helpers.pickled_code import Payload
from helpers.resumed_runs import contents
from helpers.true_formats import digest, load_one, rejected, write

ARCHIVE = "cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def sizes(name, data_path):
    train, test = load_one(name, data_path)
    return len(train), len(test)


def load_and_log(name, data_path, log):
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    load_one(name, data_path)


def start_two(tmp_path, name, data_path):
    """Two processes that load a data set; and a function that reads what both have logged."""
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    [log.touch() for log in logs]
    processes = [in_child(load_and_log, name, data_path, log) for log in logs]
    return processes, lambda: "".join(log.read_text() for log in logs)


# Several processes


def test_processes_that_start_together_download_once(cifar, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WAIT_UNREPORTED", 0.1)
    cifar.pause()
    data_path = tmp_path / "new" / "data"
    processes, logged = start_two(tmp_path, "CIFAR100", data_path)
    wait_until(lambda: f"another process prepares {data_path}: waiting" in logged())
    assert cifar.half_sent.wait(20)
    assert not (data_path / FOLDER).exists()
    cifar.go_on.set()
    assert [exit_code(process) for process in processes] == [0, 0]
    assert cifar.downloads == [ARCHIVE]
    assert names(data_path) == [".l2p.lock", FOLDER]
    assert contents(data_path / FOLDER) == contents(cifar.data / FOLDER)
    assert logged().count("waiting") == 1


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK])
def test_processes_without_locks_prepare_one_whole_folder(cifar, tmp_path, monkeypatch, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    cifar.pause()
    data_path = tmp_path / "data"
    processes, logged = start_two(tmp_path, "CIFAR100", data_path)
    wait_until(lambda: len(cifar.downloads) == 2)
    cifar.go_on.set()
    assert [exit_code(process) for process in processes] == [0, 0]
    assert logged().count(f"{data_path} cannot be locked") == 2
    assert contents(data_path / FOLDER) == contents(cifar.data / FOLDER)
    assert set(names(data_path)) <= {".l2p.lock", FOLDER}


def test_killed_download_is_not_taken_for_the_data(cifar, tmp_path):
    data_path = tmp_path / "data"
    cifar.pause()
    killed = in_child(load_one, "CIFAR100", data_path)
    assert cifar.half_sent.wait(20)
    os.kill(killed, signal.SIGKILL)
    assert exit_code(killed) == -signal.SIGKILL
    cifar.go_on.set()
    (left_over,) = data_path.glob(".l2p-unfinished-*")
    assert not (data_path / FOLDER).exists()
    assert sizes("CIFAR100", data_path) == (200, 100)
    assert cifar.downloads == [ARCHIVE] * 2
    assert names(data_path) == sorted([".l2p.lock", left_over.name, FOLDER])


def test_complete_folder_is_read_without_lock_or_write(cifar, tmp_path, monkeypatch):
    shutil.copytree(cifar.data / FOLDER, tmp_path / "data" / FOLDER)
    folders = [tmp_path / "data" / FOLDER, tmp_path / "data"]
    monkeypatch.setattr(downloaded, "one_at_a_time", lambda _: pytest.fail("took the lock"))
    before = [folder.stat().st_mtime_ns for folder in folders]
    load_one("CIFAR100", tmp_path / "data")
    assert [folder.stat().st_mtime_ns for folder in folders] == before
    assert cifar.downloads == []


# What is downloaded

IDX = [file for file, _ in MNIST.resources]

#: Files, where they belong, where they come from, and the number of images.
DOWNLOADS = {
    "CIFAR10": (["cifar-10-python.tar.gz"], ".", "www.cs.toronto.edu", (50, 20)),
    "CIFAR100": ([ARCHIVE], ".", "www.cs.toronto.edu", (200, 100)),
    "MNIST": (IDX, "MNIST/raw", "ossci-datasets", (50, 20)),
    "FashionMNIST": (IDX, "FashionMNIST/raw", "fashion-mnist", (50, 20)),
    "KMNIST": (IDX, "KMNIST/raw", "codh.rois.ac.jp", (50, 20)),
    "SVHN": (["train_32x32.mat", "test_32x32.mat"], "SVHN", "ufldl.stanford.edu", (50, 20)),
    "Flowers102": (["102flowers.tgz", "imagelabels.mat", "setid.mat"], "flowers-102",
                   "robots.ox.ac.uk", (204, 102)),
}  # fmt: skip


def copy_published(server, name, folder):
    """Copies the published files."""
    folder.mkdir(parents=True)
    for file in DOWNLOADS[name][0]:
        shutil.copy(server.folder / file, folder)


@pytest.mark.parametrize("name", DOWNLOADS)
def test_missing_data_are_downloaded_once_and_files_put_there_are_not(
    server, tmp_path, monkeypatch, name
):
    server.publish(name)
    files, place, url, expected = DOWNLOADS[name]
    data_path = tmp_path / "data"
    with monkeypatch.context() as offline:
        point(offline, NOWHERE)
        message = rejected(load_one, name, data_path)
    for part in (*files, url, f"put it in {data_path / place}, or", "--data-path", "refused"):
        assert part in message
    assert names(data_path) == [".l2p.lock"]
    assert sizes(name, data_path) == sizes(name, data_path) == expected
    assert server.downloads == files
    lock, folder = names(data_path)
    assert lock == ".l2p.lock"
    if name == "Flowers102":
        assert names(data_path / folder) == ["imagelabels.mat", "jpg", "setid.mat"]
    for other, put_there in (("belongs", place), ("beside", "")):
        copy_published(server, name, tmp_path / other / put_there)
        before = contents(tmp_path / other)
        assert sizes(name, tmp_path / other) == expected
        assert put_there or before.items() <= contents(tmp_path / other).items()
    assert server.downloads == files


@pytest.mark.parametrize(("name", "file", "downloads"), [
    ("CIFAR100", f"{FOLDER}/test", ARCHIVE),
    ("CIFAR100", f"{FOLDER}/meta", ARCHIVE),
    ("SVHN", "SVHN/test_32x32.mat", "test_32x32.mat"),
    ("Flowers102", "flowers-102/setid.mat", "setid.mat"),
    ("MNIST", f"MNIST/raw/{IDX[-1]}", IDX[-1]),
])  # fmt: skip
def test_damage_is_moved_aside_and_only_that_downloaded(
    server, tmp_path, caplog, name, file, downloads
):
    server.publish(name)
    _, place, _, expected = DOWNLOADS[name]
    if name == "CIFAR100":
        shutil.copytree(server.data / FOLDER, tmp_path / "data" / FOLDER)
    else:
        copy_published(server, name, tmp_path / "data" / place)
    (tmp_path / "data" / file).write_bytes(b"damaged")
    assert sizes(name, tmp_path / "data") == expected
    assert server.downloads == [downloads]
    (aside,) = (tmp_path / "data").glob("*.damaged-*")
    top, _, below = file.partition("/")
    assert aside.name.startswith(f"{top}.damaged-")
    assert (aside / below).read_bytes() == b"damaged"
    assert f"{tmp_path}/data/{top} is incomplete or damaged: moved to {aside}" in caplog.text


def test_every_mirror_is_tried(server, tmp_path, monkeypatch):
    server.publish("MNIST")
    gone = f"{server.address}gone/"
    monkeypatch.setattr(MNIST, "mirrors", [gone, server.address, NOWHERE])
    assert sizes("MNIST", tmp_path / "data") == (50, 20)
    assert server.downloads == IDX
    monkeypatch.setattr(MNIST, "mirrors", [gone, NOWHERE])
    message = rejected(load_one, "MNIST", tmp_path / "new")
    assert "404" in message
    assert "Connection refused" in message


# Checksums


@pytest.mark.parametrize(("number", "damaged"), [(0, "train"), (1, "test"), (2, "meta")])
def test_cifar_is_unpickled_only_with_the_right_checksum(
    cifar, tmp_path, monkeypatch, number, damaged
):
    path = tmp_path / "data" / FOLDER / damaged
    shutil.copytree(cifar.data / FOLDER, path.parent)
    path.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))
    before = contents(path.parent)
    point(monkeypatch, NOWHERE)
    message = rejected(load_one, "CIFAR100", tmp_path / "data")
    expected = [CIFAR100.train_list[0][1], CIFAR100.test_list[0][1], CIFAR100.meta["md5"]][number]
    assert f"{path}: checksum differs, MD5 {digest(path)} instead of {expected}" in message
    assert not (tmp_path / "unpickled").exists()
    assert contents(path.parent) == before
    pickle.loads(path.read_bytes())
    assert (tmp_path / "unpickled").exists()


def test_archive_with_another_checksum_is_named_and_left_alone(
    cifar, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO)
    published, half = cifar.folder / ARCHIVE, tmp_path / ARCHIVE
    right = published.read_bytes()
    half.write_bytes(right[:5000])
    named = f"{half}: checksum differs, MD5 {digest(half)} instead of {CIFAR100.tgz_md5}"
    with monkeypatch.context() as offline:
        point(offline, NOWHERE)
        assert f"is missing or damaged ({named})" in rejected(load_one, "CIFAR100", tmp_path)
    published.write_bytes(b"log in to the wireless network")
    again = f" {ARCHIVE}: checksum differs, MD5 {digest(published)} instead of {CIFAR100.tgz_md5})"
    assert again in rejected(load_one, "CIFAR100", tmp_path)
    assert names(tmp_path) == [".l2p.lock", ARCHIVE, "server"]
    published.write_bytes(right)
    assert sizes("CIFAR100", tmp_path) == (200, 100)
    assert named in caplog.text
    assert half.read_bytes() == right[:5000]


def test_file_without_permission_is_named_and_not_downloaded_anew(cifar, tmp_path, monkeypatch):
    def forbidden(path, *_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", forbidden)
    message = rejected(load_one, "CIFAR100", tmp_path)
    assert message == f"{tmp_path}/{FOLDER}/train: Permission denied"
    assert cifar.downloads == []


# Archives that people get by hand

BY_HAND = {
    "NotMNIST": ("notMNIST", "notMNIST.zip", 10, "Train/<A to J>", "Adversarial-Continual-Learn"),
    "CORe50": ("core50_128x128", "core50_128x128.zip", 50, "s1/o1/", "vlomonaco.github.io/core50"),
    "Imagenet-R": ("imagenet-r", "imagenet-r.tar", 200, "<n01443537", "hendrycks/imagenet-r"),
}


@pytest.mark.parametrize(
    ("name", "has_top_folder"),
    [("NotMNIST", True), ("CORe50", False), ("Imagenet-R", True), ("Imagenet-R", False)],
)
def test_archive_is_unpacked_once(tmp_path, name, has_top_folder):
    folder, archive, published_classes, *_ = BY_HAND[name]
    data_path = tmp_path / "data"
    write(name, data_path)
    num_classes, expected = count_classes(name, data_path), sizes(name, data_path)
    kind, top = ("tar" if archive.endswith("tar") else "zip"), data_path / folder
    root, base = (data_path, folder) if has_top_folder else (top, None)
    packed = Path(shutil.make_archive(str(tmp_path / "packed"), kind, root, base))
    packed.rename(data_path / archive)
    shutil.rmtree(top)
    before = names(data_path)
    assert count_classes(name, data_path) == published_classes
    assert names(data_path) == before
    processes, logged = start_two(tmp_path, name, data_path)
    assert [exit_code(process) for process in processes] == [0, 0]
    assert logged().count("unpacking") == 1
    assert names(data_path) == sorted([*before, ".l2p.lock", folder])
    assert (count_classes(name, data_path), sizes(name, data_path)) == (num_classes, expected)


@pytest.mark.parametrize("name", BY_HAND)
def test_missing_data_and_a_damaged_archive_are_named(tmp_path, name):
    folder, archive, _, layout, url = BY_HAND[name]
    message = rejected(count_classes, name, tmp_path)
    for part in (f"{tmp_path / folder}/{layout}", archive, url):
        assert part in message
    assert rejected(load_one, name, tmp_path) == message
    nowhere = rejected(count_classes, name, tmp_path / "nowhere")
    assert nowhere.startswith(message.split(" is not")[0])
    with zipfile.ZipFile(flipped := io.BytesIO(), "w") as zipped:
        zipped.writestr("Train/A/1.png", b"IDAT")
    for damaged in (b"half of it", flipped.getvalue().replace(b"IDAT", b"JDAT")):
        (tmp_path / archive).write_bytes(damaged)
        message = rejected(load_one, name, tmp_path)
        assert message.startswith(f"{tmp_path / archive} cannot be unpacked (")
        assert f"get it anew, or unpack it yourself so that {tmp_path / folder} is there" in message
        assert not (tmp_path / folder).exists()


def test_archive_with_a_member_outside_is_rejected(tmp_path):
    with tarfile.open(tmp_path / "imagenet-r.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("imagenet-r/n01443537/0.jpg"))
        tar.addfile(tarfile.TarInfo("../evil"))
    assert "'../evil'" in rejected(load_one, "Imagenet-R", tmp_path)
    assert names(tmp_path) == [".l2p.lock", "imagenet-r.tar"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o600), (0o027, 0o777)])
def test_unpacked_folders_have_the_permissions_of_the_umask(tmp_path, umask, mode):
    member = zipfile.ZipInfo("Train/A/1.png")
    member.external_attr = (stat.S_IFREG | mode) << 16
    with zipfile.ZipFile(tmp_path / "notMNIST.zip", "w") as zipped:
        zipped.writestr(member, b"")
    before = os.umask(umask)
    try:
        assert "no folder B" in rejected(load_one, "NotMNIST", tmp_path)
    finally:
        os.umask(before)
    for path in (tmp_path / "notMNIST", *(tmp_path / "notMNIST").rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


# Locks and folders put in place


def test_one_at_a_time_passes_errors_on_and_ends_the_lock(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    lock = FileLock(tmp_path / ".l2p.lock")  # one that lives on does not end by itself
    monkeypatch.setattr(storage, "FileLock", lambda *_, **__: lock)
    with pytest.raises(OSError, match="disk is full"), one_at_a_time(tmp_path):
        raise OSError("disk is full")
    monkeypatch.undo()
    with FileLock(tmp_path / ".l2p.lock", timeout=0):
        assert caplog.text == ""


def make(folder, text):
    (folder / "flowers").mkdir(parents=True)
    (folder / "flowers" / "note").write_text(text)


@pytest.mark.parametrize("link", ["elsewhere/flowers", "nowhere"])
def test_new_folder_moves_a_link_aside(tmp_path, link):
    make(tmp_path / "elsewhere", "old")
    (tmp_path / "flowers").symlink_to(link)
    with new_folder(tmp_path / "flowers") as tmp_dir:
        assert stat.S_IMODE(tmp_dir.stat().st_mode) == 0o700
        make(tmp_dir, "new")
    assert not (tmp_path / "flowers").is_symlink()
    assert contents(tmp_path / "flowers") == {"note": b"new"}
    (aside,) = tmp_path.glob("flowers.damaged-*")
    assert aside.readlink() == Path(link)
    assert contents(tmp_path / "elsewhere/flowers") == {"note": b"old"}


def test_new_folder_removes_old_left_overs_only_and_must_be_made(tmp_path):
    day = 24 * 3600
    ages = {".l2p-unfinished-old": 1.1 * day, ".l2p-unfinished-new": 0.9 * day, ".l2p": 9 * day}
    for name, age in ages.items():
        (tmp_path / name / "part").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "flowers"):
        pass
    assert names(tmp_path) == [".l2p", ".l2p-unfinished-new"]
