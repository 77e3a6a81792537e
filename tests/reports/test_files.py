import json
import os
import stat

import pytest

from reports import files


def test_write_whole_makes_folder_and_replaces_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"long first content", b"second"):
        files.write_whole(path, lambda file, content=content: file.write(content))
        assert path.read_bytes() == content
    assert os.listdir(path.parent) == ["file"]


class FullDiskError(OSError):
    pass


def half_and_fail(file):
    file.write(b"half")
    raise FullDiskError


@pytest.mark.parametrize("existed", [True, False])
def test_write_whole_leaves_old_file_when_writing_fails(tmp_path, existed):
    path = tmp_path / "file"
    if existed:
        path.write_bytes(b"old")
    with pytest.raises(FullDiskError):
        files.write_whole(path, half_and_fail)
    assert os.listdir(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_write_whole_cleans_up_on_interrupt(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_whole(tmp_path / "file", interrupted)
    assert os.listdir(tmp_path) == []


def test_write_whole_cleans_up_when_renaming_fails(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        files.write_whole(tmp_path / "folder", lambda file: file.write(b"content"))
    assert os.listdir(tmp_path) == ["folder"]


def test_write_whole_is_invisible_under_its_name_until_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    files.write_whole(path, write)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_write_whole_permissions_follow_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "file", "content")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_write_text_is_utf8(tmp_path):
    files.write_text(tmp_path / "file", "Größe\n")
    assert (tmp_path / "file").read_bytes() == "Größe\n".encode()


def test_write_json_round_trips(tmp_path):
    content = {"matrix": [[1.5, None], [2, 3]], "name": "a"}
    files.write_json(tmp_path / "file", content)
    text = (tmp_path / "file").read_text()
    assert json.loads(text) == content
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_rejects_values_that_json_lacks(tmp_path, value):
    files.write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "file", {"a": [value]})
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}
