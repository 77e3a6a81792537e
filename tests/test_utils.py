import io
import json
import logging
import os
import re
import stat
import sys

import pytest

import utils

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")


@pytest.fixture
def root_logger():
    """The root logger, from which handlers that the program added go again."""
    root = logging.getLogger()
    level = root.level
    yield root
    for handler in [h for h in root.handlers if isinstance(h, utils._OwnHandler)]:
        root.removeHandler(handler)
        handler.close()
    root.setLevel(level)


# Files


def test_write_whole_makes_folder_and_replaces_file(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    for content in (b"long first content", b"second"):
        utils.write_whole(path, lambda file, content=content: file.write(content))
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
        utils.write_whole(path, half_and_fail)
    assert os.listdir(tmp_path) == (["file"] if existed else [])
    assert not existed or path.read_bytes() == b"old"


def test_write_whole_cleans_up_on_interrupt(tmp_path):
    def interrupted(file):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        utils.write_whole(tmp_path / "file", interrupted)
    assert os.listdir(tmp_path) == []


def test_write_whole_cleans_up_when_renaming_fails(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        utils.write_whole(tmp_path / "folder", lambda file: file.write(b"content"))
    assert os.listdir(tmp_path) == ["folder"]


def test_write_whole_is_invisible_under_its_name_until_complete(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def write(file):
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"

    utils.write_whole(path, write)
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_write_whole_permissions_follow_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        utils.write_text(tmp_path / "file", "content")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_write_text_is_utf8(tmp_path):
    utils.write_text(tmp_path / "file", "Größe\n")
    assert (tmp_path / "file").read_bytes() == "Größe\n".encode()


def test_write_json_round_trips(tmp_path):
    content = {"matrix": [[1.5, None], [2, 3]], "name": "a"}
    utils.write_json(tmp_path / "file", content)
    text = (tmp_path / "file").read_text()
    assert json.loads(text) == content
    assert text.endswith("}\n")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_write_json_refuses_values_that_json_lacks(tmp_path, value):
    utils.write_json(tmp_path / "file", {"a": 1})
    with pytest.raises(ValueError):
        utils.write_json(tmp_path / "file", {"a": [value]})
    assert json.loads((tmp_path / "file").read_text()) == {"a": 1}


# Progress


def progress_lines(caplog, total, print_freq, step=lambda progress, item: None):
    progress = utils.Progress("Train: Epoch[1/5]", print_freq)
    items = []
    with caplog.at_level(logging.INFO, logger="utils"):
        for number, item in progress.over((f"item {i}" for i in range(total)), total):
            items.append((number, item))
            step(progress, number)
    assert items == [(i, f"item {i}") for i in range(total)]
    return [record.getMessage() for record in caplog.records]


def test_progress_lines_come_every_print_freq_steps_and_at_the_end(caplog):
    lines = progress_lines(caplog, total=24, print_freq=10)
    assert [re.search(r"\[ *(\d+)/24\]", line)[1] for line in lines] == ["0", "10", "20", "23"]
    assert all(line.startswith("Train: Epoch[1/5]  [") for line in lines)


def test_progress_lines_name_last_step_once(caplog):
    assert len(progress_lines(caplog, total=11, print_freq=10)) == 2


def test_progress_lines_estimate_the_time_left(caplog, monkeypatch):
    clock = iter(range(0, 10**6, 60))  # a minute between any two looks
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    lines = progress_lines(caplog, total=100, print_freq=50)
    # Looks: at the start 0:00, after step 0 1:00, after step 50 2:00, after step 99 3:00.
    etas = [re.search(r"eta: (\S+)", line)[1] for line in lines]
    assert etas == ["1:39:00", "0:01:55", "0:00:00"]


def test_progress_lines_show_last_value_and_average(caplog):
    lines = progress_lines(
        caplog, 3, 1, lambda progress, number: progress.update({"Loss": float(number)})
    )
    shown = [line.split("Loss: ")[1] for line in lines]
    assert shown == ["0.0000 (0.0000)", "1.0000 (0.5000)", "2.0000 (1.0000)"]


def test_progress_averages_weigh_counts():
    progress = utils.Progress("", 10)
    progress.update({"Acc@1": 100.0, "Acc@5": 50.0}, count=3)
    progress.update({"Acc@1": 0.0}, count=1)
    progress.update({"Loss": 1.0})
    progress.update({"Loss": 4.0})
    assert progress.averages() == {"Acc@1": 75.0, "Acc@5": 50.0, "Loss": 2.5}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_progress_shows_a_bar_instead_of_lines_on_a_terminal(root_logger, tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stdout", terminal)
    utils.setup_logging()
    utils.log_to_file(tmp_path / "log.txt")
    progress = utils.Progress("Train: Epoch[1/5]", print_freq=1)
    for _ in progress.over(range(4), 4):
        progress.update({"Loss": 0.5})
    assert re.search(r"Train: Epoch\[1/5\]: +0%\|", terminal.getvalue())
    assert "eta:" not in terminal.getvalue()
    assert (tmp_path / "log.txt").read_text().count("eta:") == 4


def test_progress_draws_no_bar_into_a_pipe(caplog, capsys):
    progress_lines(caplog, total=5, print_freq=1)
    captured = capsys.readouterr()
    assert "%|" not in captured.out + captured.err


def test_progress_is_silent_outside_the_main_process(caplog, monkeypatch):
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    assert progress_lines(caplog, total=5, print_freq=1) == []


# Logging


def test_setup_logging_writes_plain_lines_to_output(root_logger, capsys):
    utils.setup_logging()
    utils.logger.info("accuracy %s", 12)
    utils.logger.debug("details")
    assert capsys.readouterr().out == "accuracy 12\n"


def test_log_to_file_adds_lines_to_file_and_keeps_output(root_logger, capsys, tmp_path):
    path = tmp_path / "new" / "log.txt"
    utils.setup_logging()
    utils.logger.info("before")
    utils.log_to_file(path)
    utils.logger.info("Größe %s", 12)
    assert capsys.readouterr().out == "before\nGröße 12\n"
    assert path.read_text(encoding="utf-8") == "Größe 12\n"


def test_setup_logging_twice_says_everything_once_and_ends_the_file(root_logger, capsys, tmp_path):
    utils.setup_logging()
    utils.log_to_file(tmp_path / "log.txt")
    utils.setup_logging()
    utils.logger.info("once")
    assert capsys.readouterr().out == "once\n"
    assert (tmp_path / "log.txt").read_text() == ""


def test_setup_logging_of_other_processes_shows_warnings_only(root_logger, capsys, monkeypatch):
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    monkeypatch.setattr(root_logger, "handlers", [])  # without those of pytest
    utils.setup_logging()
    utils.logger.info("accuracy")
    utils.logger.warning("trouble")
    captured = capsys.readouterr()
    assert "accuracy" not in captured.out + captured.err
    assert "trouble" in captured.err


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OSError("first line\nsecond"), "OSError: first line"),
        (EOFError(), "EOFError"),
        (ValueError("  \n"), "ValueError"),
    ],
)
def test_reason_is_the_name_and_the_first_line(error, shown):
    assert utils.reason(error) == shown
