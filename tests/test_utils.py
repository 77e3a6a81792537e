import io
import logging
import re
import sys
from pathlib import Path

import pytest

import utils
from cli.terminal import printable

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def progress_lines(caplog):
    """Lines of a loop of so many steps that each update the mean of their numbers."""

    def run(total, print_freq):
        progress = utils.Progress("Train: Epoch[1/5]", print_freq)
        with caplog.at_level(logging.INFO, logger="utils"):
            for number, item in progress.over((f"item {i}" for i in range(total)), total):
                assert item == f"item {number}"
                progress.update({"Loss": float(number)})
        assert number == total - 1
        return [record.getMessage() for record in caplog.records]

    return run


@pytest.mark.parametrize(
    ("total", "steps"), [(24, ["0", "10", "20", "23"]), (11, ["0", "10"]), (1, ["0"])]
)
def test_progress_lines_come_every_print_freq_steps(progress_lines, capsys, total, steps):
    lines = progress_lines(total, print_freq=10)
    assert [re.search(rf"\[ *(\d+)/{total}\]", line)[1] for line in lines] == steps
    assert all(line.startswith("Train: Epoch[1/5]  [") for line in lines)
    assert "%|" not in "".join(capsys.readouterr())  # no bar in a pipe


def test_progress_lines_show_time_left_last_value_and_average(progress_lines, monkeypatch):
    clock = iter(range(0, 10**6, 60))  # a minute between any two looks
    monkeypatch.setattr(utils.time, "monotonic", lambda: next(clock))
    lines = progress_lines(total=100, print_freq=50)
    # Looks: at the start 0:00, after step 0 1:00, after step 50 2:00, after step 99 3:00.
    etas = [re.search(r"eta: (\S+)", line)[1] for line in lines]
    assert etas == ["1:39:00", "0:01:55", "0:00:00"]
    shown = [line.split("Loss: ")[1] for line in lines]
    assert shown == ["0.0000 (0.0000)", "50.0000 (25.0000)", "99.0000 (49.5000)"]


def test_progress_averages_weigh_counts():
    progress = utils.Progress("", 10, {"Loss": [6.0, 2]})
    assert progress.averages() == {"Loss": 3.0}
    progress.update({"Acc@1": 100.0, "Acc@5": 50.0}, count=3)
    progress.update({"Acc@1": 0.0}, count=1)
    progress.update({"Loss": 1.0})
    progress.update({"Loss": 4.0})
    assert progress.averages() == {"Acc@1": 75.0, "Acc@5": 50.0, "Loss": 2.75}
    assert progress.sums() == {"Loss": [11.0, 4], "Acc@1": [300.0, 4], "Acc@5": [150.0, 3]}


def test_progress_shows_a_bar_instead_of_lines_on_a_terminal(tmp_path, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    utils.setup_logging()
    utils.log_to_file(tmp_path / "log.txt")
    progress = utils.Progress("Train: Epoch[1/5]", print_freq=1)
    for _ in progress.over(range(4), 4):
        progress.update({"Loss": 0.5})
    assert re.search(r"Train: Epoch\[1/5\]: +0%\|", terminal.getvalue())
    assert "eta:" not in terminal.getvalue()
    assert (tmp_path / "log.txt").read_text().count("eta:") == 4


def test_progress_is_silent_outside_the_main_process(progress_lines, monkeypatch):
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    assert progress_lines(total=5, print_freq=1) == []


def test_setup_logging_writes_plain_lines_to_output_and_then_to_a_file(capsys, tmp_path):
    path = tmp_path / "new" / "log.txt"
    utils.setup_logging()
    utils.logger.info("accuracy %s", 12)
    utils.logger.debug("details")
    utils.log_to_file(path)
    utils.logger.info("Größe")
    utils.setup_logging()  # ends the file
    utils.logger.info("once")
    assert capsys.readouterr().out == "accuracy 12\nGröße\nonce\n"
    assert path.read_text(encoding="utf-8") == "Größe\n"


def test_lines_are_escaped_as_wanted(capsys, tmp_path):
    utils.setup_logging(printable)
    utils.log_to_file(tmp_path / "log.txt")
    utils.logger.info("class %s", "\x1b[2J\udc80")
    line = "class \\x1b[2J\\udc80\n"
    assert (tmp_path / "log.txt").read_text() == capsys.readouterr().out == line


def test_log_file_on_a_full_disk_is_reported_once(capsys):
    utils.setup_logging()
    utils.log_to_file(Path("/dev/full"))
    utils.logger.info("line")
    utils.logger.info("another")
    utils.end_logging()
    first, said, second = capsys.readouterr().out.splitlines()
    assert (first, second) == ("line", "another")
    assert said == "/dev/full lacks lines ([Errno 28] No space left on device)"


def test_setup_logging_of_other_processes_shows_warnings_only(capsys, monkeypatch):
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # without those of pytest
    utils.setup_logging(printable)
    utils.logger.info("accuracy")
    utils.logger.warning("trouble with \x1b")
    assert capsys.readouterr() == ("", "trouble with \\x1b\n")
