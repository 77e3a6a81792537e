import errno
import io
import logging
import os
import stat
import tarfile
import time
import zipfile
from hashlib import md5, sha256
from pathlib import Path

import pytest
from filelock import FileLock

from continual_datasets.readers import storage
from continual_datasets.readers.storage import fetch, new_folder, one_at_a_time, unpack
from helpers.archives import write_tar, write_zip
from helpers.forked_calls import finish, start
from helpers.http_server import serve

CONTENTS = {"flowers/rose/1.txt": b"red" * 9000, "flowers/daisy/1.txt": b"white"}


def wait_until(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def server(tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    write_tar(tmp_path / "server" / "flowers.tgz", CONTENTS)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(tmp_path / "server") as server:
        yield server


def checksum(server):
    archive = Path(server.RequestHandlerClass.keywords["directory"]) / "flowers.tgz"
    return f"sha256:{sha256(archive.read_bytes()).hexdigest()}"


def prepare(data_path, server):
    """What a reader of a data set does."""
    with one_at_a_time(data_path):
        if not (data_path / "flowers").exists():
            with new_folder(data_path / "flowers") as tmp_dir:
                url = f"{server.address}/flowers.tgz"
                unpack(fetch(url, checksum(server), tmp_dir, data_path), tmp_dir)


def prepare_and_log(data_path, server, log):
    logging.basicConfig(filename=log, level=logging.INFO, force=True)
    prepare(data_path, server)


def content(folder):
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# Several processes


def test_processes_that_start_together_download_once(server, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WAIT_UNTOLD", 0.1)
    server.pause()
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    data_path = tmp_path / "new" / "data"
    together = [start(prepare_and_log, data_path, server, log) for log in logs]
    told = f"another process prepares {data_path}: waiting"
    wait_until(lambda: told in "".join(log.read_text() for log in logs if log.exists()))
    assert server.half_sent.wait(20)
    assert not (data_path / "flowers").exists()
    server.go_on.set()
    for process in together:
        finish(process)
    assert server.downloads == ["/flowers.tgz"]
    assert names(data_path) == [".l2p.lock", "flowers"]
    assert content(data_path) == {**CONTENTS, ".l2p.lock": b""}
    assert "".join(log.read_text() for log in logs).count("waiting") == 1


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_processes_without_locks_prepare_one_whole_folder(server, tmp_path, monkeypatch, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    server.pause()
    data_path = tmp_path / "data"
    logs = [tmp_path / "0.log", tmp_path / "1.log"]
    together = [start(prepare_and_log, data_path, server, log) for log in logs]
    wait_until(lambda: len(server.downloads) == 2)
    server.go_on.set()
    for process, log in zip(together, logs, strict=True):
        finish(process)
        assert f"{data_path} cannot be locked" in log.read_text()
    assert content(data_path / "flowers").keys() == {"rose/1.txt", "daisy/1.txt"}
    assert set(names(data_path)) <= {".l2p.lock", "flowers"}


def test_killed_download_is_in_nobodys_way(server, tmp_path):
    data_path = tmp_path / "data"
    server.pause()
    killed = start(prepare, data_path, server)
    assert server.half_sent.wait(20)
    killed.kill()
    killed.join(20)
    server.go_on.set()
    (left_over,) = data_path.glob(".l2p-unfinished-*")
    assert not (data_path / "flowers").exists()
    prepare(data_path, server)
    assert len(server.downloads) == 2
    assert names(data_path) == sorted([".l2p.lock", left_over.name, "flowers"])
    assert content(data_path / "flowers").keys() == {"rose/1.txt", "daisy/1.txt"}


# Locks


def test_one_at_a_time_goes_on_in_a_folder_it_cannot_write(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    (tmp_path / "file").touch()
    with one_at_a_time(tmp_path / "file" / "data"):
        entered = True
    assert entered
    assert f"{tmp_path}/file/data cannot be locked" in caplog.text


def test_one_at_a_time_passes_errors_on_and_ends_the_lock(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    lock = FileLock(tmp_path / ".l2p.lock")  # one that lives on does not end by itself
    monkeypatch.setattr(storage, "FileLock", lambda *_, **__: lock)
    with pytest.raises(OSError, match="disk is full"), one_at_a_time(tmp_path):
        raise OSError("disk is full")
    monkeypatch.undo()
    other = start(hold, tmp_path)
    finish(other)
    assert caplog.text == ""


def hold(folder):
    with one_at_a_time(folder):
        pass


# Folders put in place


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o002])
@pytest.mark.parametrize("archive_mode", [0o600, 0o777])
@pytest.mark.parametrize("kind", ["tgz", "zip"])
def test_permissions_are_those_of_the_umask(tmp_path, umask, archive_mode, kind):
    if kind == "tgz":
        archive = write_tar(tmp_path / "a.tgz", CONTENTS, archive_mode)
    else:
        archive = write_zip(tmp_path / "a.zip", CONTENTS, stat.S_IFREG | archive_mode)
    data_path = tmp_path / "new" / "data"
    before = os.umask(umask)
    try:
        with one_at_a_time(data_path), new_folder(data_path / "flowers") as tmp_dir:
            assert stat.S_IMODE(tmp_dir.stat().st_mode) == 0o700
            unpack(archive, tmp_dir)
    finally:
        os.umask(before)
    for path in (data_path.parent, data_path, *data_path.rglob("*")):
        expected = (0o777 if path.is_dir() else 0o666) & ~umask
        assert stat.S_IMODE(path.stat().st_mode) == expected, path
    assert content(data_path / "flowers").keys() == {"rose/1.txt", "daisy/1.txt"}


def make(tmp_dir, text):
    (tmp_dir / "flowers").mkdir(parents=True)
    (tmp_dir / "flowers" / "note").write_text(text)


def test_new_folder_after_an_error_leaves_what_was_there(tmp_path):
    make(tmp_path, "old")
    with pytest.raises(FileExistsError), new_folder(tmp_path / "flowers") as tmp_dir:
        [make(tmp_dir, "new") for _ in range(2)]
    assert content(tmp_path) == {"flowers/note": b"old"}
    assert names(tmp_path) == ["flowers"]


def test_new_folder_moves_what_was_there_aside(tmp_path, caplog):
    make(tmp_path, "old")
    with new_folder(tmp_path / "flowers") as tmp_dir:
        make(tmp_dir, "new")
        assert content(tmp_path / "flowers") == {"note": b"old"}
    assert content(tmp_path / "flowers") == {"note": b"new"}
    (aside,) = tmp_path.glob("flowers.damaged-*")
    assert content(aside) == {"note": b"old"}
    assert names(tmp_path) == ["flowers", aside.name]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"{tmp_path}/flowers is incomplete or damaged: moved to {aside}" in caplog.text


@pytest.mark.parametrize("dangling", [False, True])
def test_new_folder_moves_a_link_aside_and_not_what_it_names(tmp_path, dangling):
    if not dangling:
        make(tmp_path / "elsewhere", "old")
    (tmp_path / "flowers").symlink_to("elsewhere/flowers")
    with new_folder(tmp_path / "flowers") as tmp_dir:
        make(tmp_dir, "new")
    assert not (tmp_path / "flowers").is_symlink()
    assert content(tmp_path / "flowers") == {"note": b"new"}
    (aside,) = tmp_path.glob("flowers.damaged-*")
    assert aside.readlink() == Path("elsewhere/flowers")
    assert dangling or content(tmp_path / "elsewhere/flowers") == {"note": b"old"}


@pytest.mark.parametrize("damaged", [False, True])
def test_new_folder_keeps_what_another_process_was_faster_with(tmp_path, damaged):
    if damaged:
        make(tmp_path, "old")
    with new_folder(tmp_path / "flowers") as tmp_dir:
        make(tmp_dir, "ours")
        if damaged:
            (tmp_path / "flowers").rename(tmp_path / "aside")
        make(tmp_path, "theirs")
    assert content(tmp_path / "flowers") == {"note": b"theirs"}
    assert names(tmp_path) == (["aside", "flowers"] if damaged else ["flowers"])


def test_new_folder_that_was_not_made_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError), new_folder(tmp_path / "flowers"):
        pass
    assert names(tmp_path) == []


def test_new_folder_removes_old_left_overs_only(tmp_path):
    day = 24 * 3600
    ages = {".l2p-unfinished-old": 1.1 * day, ".l2p-unfinished-new": 0.9 * day, ".l2p": 9 * day}
    for name, age in ages.items():
        (tmp_path / name / "part").mkdir(parents=True)
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    with new_folder(tmp_path / "flowers") as tmp_dir:
        make(tmp_dir, "new")
    assert names(tmp_path) == [".l2p", ".l2p-unfinished-new", "flowers"]


# Downloads


def test_fetch_rejects_another_checksum(server, tmp_path):
    url, expected = f"{server.address}/flowers.tgz", f"sha256:{'0' * 64}"
    with pytest.raises(ValueError) as caught:
        fetch(url, expected, tmp_path, tmp_path)
    for part in (url, expected, checksum(server)):
        assert part in str(caught.value)


@pytest.mark.parametrize("algorithm", [md5, sha256], ids=["md5", "sha256"])
def test_fetch_takes_a_file_that_was_put_there(server, tmp_path, algorithm):
    (tmp_path / "data").mkdir()
    (tmp_path / "work").mkdir()
    by_hand = tmp_path / "data" / "flowers.tgz"
    by_hand.write_bytes((tmp_path / "server" / "flowers.tgz").read_bytes())
    expected = f"{algorithm().name}:{algorithm(by_hand.read_bytes()).hexdigest()}"
    url = f"{server.address}/flowers.tgz"
    assert fetch(url, expected, tmp_path / "work", by_hand.parent) == by_hand
    assert server.downloads == []
    by_hand.write_bytes(b"something else")
    fetched = fetch(url, expected, tmp_path / "work", by_hand.parent)
    assert fetched == tmp_path / "work" / "flowers.tgz"
    assert fetched.read_bytes() == (tmp_path / "server" / "flowers.tgz").read_bytes()
    assert by_hand.read_bytes() == b"something else"


# Archives


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tar.bz2", "tar.xz", "zip"])
def test_unpack_knows_archives_by_their_content(tmp_path, suffix):
    archive = tmp_path / "archive"
    if suffix == "zip":
        write_zip(archive, CONTENTS)
    else:
        with tarfile.open(archive, f"w:{suffix[4:]}") as tar:
            for name, data in CONTENTS.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    unpack(archive, tmp_path / "folder")
    assert content(tmp_path / "folder") == CONTENTS


@pytest.mark.parametrize("suffix", ["tgz", "zip"])
def test_unpack_makes_empty_folders_and_takes_folders_in_any_order(tmp_path, suffix):
    archive = tmp_path / f"archive.{suffix}"
    if suffix == "zip":
        write_zip(archive, {**CONTENTS, "empty/": b"", "flowers/": b""})
    else:
        folder = (tarfile.DIRTYPE, "")
        write_tar(archive, CONTENTS, empty=folder, flowers=folder)
    unpack(archive, tmp_path / "folder")
    assert names(tmp_path / "folder") == ["empty", "flowers"]
    assert names(tmp_path / "folder" / "empty") == []
    assert content(tmp_path / "folder") == CONTENTS


@pytest.mark.parametrize("suffix", ["tgz", "zip"])
def test_unpack_rejects_a_damaged_archive(tmp_path, suffix):
    archive = tmp_path / f"archive.{suffix}"
    (write_zip if suffix == "zip" else write_tar)(archive, CONTENTS)
    damaged = bytearray(archive.read_bytes())
    if suffix == "zip":
        damaged[damaged.index(b"redredred")] ^= 1
    else:
        del damaged[len(damaged) // 2 :]
    archive.write_bytes(damaged)
    with pytest.raises((zipfile.BadZipFile, EOFError), match=r"CRC|ended"):
        unpack(archive, tmp_path / "folder")


def evil_archives(folder, outside):
    """Write archives with a member that must be rejected; return its name by archive."""
    archives = {}
    for i, name in enumerate(["../evil", "flowers/../../evil", f"{outside}/evil"]):
        archives[write_tar(folder / f"{i}.tgz", {**CONTENTS, name: b"evil"})] = name
        archives[write_zip(folder / f"{i}.zip", {**CONTENTS, name: b"evil"})] = name
    links = {
        "symlink": (tarfile.SYMTYPE, str(outside)),
        "inside": (tarfile.SYMTYPE, "flowers"),
        "hardlink": (tarfile.LNKTYPE, "flowers/rose/1.txt"),
        "fifo": (tarfile.FIFOTYPE, ""),
        "device": (tarfile.CHRTYPE, ""),
    }
    for name, link in links.items():
        archives[write_tar(folder / f"{name}.tgz", CONTENTS, **{name: link})] = name
    symlink = {"symlink": str(outside).encode()}
    archives[write_zip(folder / "symlink.zip", symlink, stat.S_IFLNK | 0o777)] = "symlink"
    return archives


def test_unpack_rejects_members_that_leave_the_folder(tmp_path):
    for name in ("archives", "outside", "data"):
        (tmp_path / name).mkdir()
    for archive, member in evil_archives(tmp_path / "archives", tmp_path / "outside").items():
        target = tmp_path / "data" / "flowers"
        with pytest.raises(ValueError) as caught, new_folder(target) as tmp_dir:
            unpack(archive, tmp_dir)
        assert archive.name in str(caught.value)
        assert repr(member) in str(caught.value)
        assert names(tmp_path) == ["archives", "data", "outside"]
        assert names(tmp_path / "data") == names(tmp_path / "outside") == []
