import io
import logging
import re
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
