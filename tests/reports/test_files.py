import json
import os
import stat

import pytest

from reports import files


def test_write_whole_makes_folder_and_replaces_file_when_it_is_complete(tmp_path):
    path = tmp_path / "a" / "b" / "file"

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"long first content"

    files.write_bytes(path, b"long first content")
    files.write_whole(path, write)
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["file"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("existed", [True, False])
def test_write_whole_leaves_old_file_when_writing_fails(tmp_path, existed, error):
    path = tmp_path / "file"

    def write(file):
        file.write(b"half")
        raise error

    if existed:
        path.write_bytes(b"old")
    with pytest.raises(error) as raised:
        files.write_whole(path, write, keep=tmp_path / "before")
    assert error is not OSError or raised.value.filename == str(path)
    assert os.listdir(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_file_that_was_there_can_be_kept_under_another_name(tmp_path):
    for content in (b"first", b"second"):
        files.write_bytes(tmp_path / "file", content, keep=tmp_path / "before")
    assert (tmp_path / "file").read_bytes() == b"second"
    assert (tmp_path / "before").read_bytes() == b"first"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_permissions_follow_the_umask_which_is_never_changed(tmp_path, monkeypatch, umask, mode):
    """Not even for a moment: other threads create files, too."""
    before = os.umask(umask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", None)
            files.write_text(tmp_path / "file", "content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_temporary_file_of_another_writer_is_never_touched(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda num_bytes: "0")
    other = tmp_path / ".file.unfinished-0"
    other.write_text("of another writer")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "file", "content")
    assert other.read_text() == "of another writer"


def test_remove_unfinished_removes_what_a_killed_program_left(tmp_path, monkeypatch):
    files.write_text(tmp_path / "file", "content")
    monkeypatch.setattr(os, "replace", None)  # the file is whole, but has no name yet
    monkeypatch.setattr("pathlib.Path.unlink", lambda path, missing_ok: None)
    with pytest.raises(TypeError):
        files.write_text(tmp_path / "file", "new")
    monkeypatch.undo()
    assert len(os.listdir(tmp_path)) == 2
    files.remove_unfinished(tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_text_is_utf8_and_json_rejects_values_that_it_lacks(tmp_path):
    path, content = tmp_path / "file", {"matrix": [[1.5, None], [2, 3]], "name": "a"}
    files.write_text(path, "Größe\n")
    assert path.read_bytes() == "Größe\n".encode()
    files.write_json(path, content)
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError):
            files.write_json(path, {"a": [value]})
    assert json.loads(path.read_text()) == content
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "folder"])
def test_what_is_no_regular_file_is_not_replaced(tmp_path, kind):
    path, pipe = tmp_path / "file", tmp_path / "pipe"
    os.mkfifo(pipe)
    {"pipe": pipe.rename, "folder": os.mkdir}.get(kind, lambda path: path.symlink_to(pipe))(path)
    before = path.lstat()
    with pytest.raises(OSError, match=r"is no regular file: '.*/file'"):
        files.write_bytes(path, b"new")
    assert path.lstat() == before
