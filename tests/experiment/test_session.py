"""The folder of a run is its own, and whatever ends a run is reported in a line."""

import errno
import itertools
import os
import shutil
import signal
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock
from weakref import ref

import numpy as np
import pytest
import torch

import main
from cli.parser import UsageError
from cli.settings import Settings
from continual_dataloader import LostWorkerError
from continual_datasets.images import DataError
from experiment import run_record, session
from experiment.session import Session
from experiment.signals import INTERRUPTED, StopSignals, interruptible, leave_on_interrupt
from helpers.killed_commands import exit_code, in_child

RESUMES = "the same command with --resume auto resumes from the last state that was saved"

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(session, "_WAIT_SECONDS", 0)


def owns(folder, **settings):
    """Exit code of a program that does no more than own its folder."""
    with Session(StopSignals()) as run:
        run.own(Settings().replace(output_dir=str(folder), **settings))
        assert settings or (folder / ".run.lock").exists()
    return run.code


# Two runs in one folder


@pytest.mark.parametrize("flags", [[], ["--resume", "auto"], ["--seeds", "7", "8"]])
def test_second_run_in_a_folder_is_rejected_and_changes_nothing(tmp_path, capsys, flags):
    own = tmp_path / "seed8" if "--seeds" in flags else tmp_path
    with Session(StopSignals()) as first:
        first.own(Settings().replace(output_dir=str(own)))
        (own / "results.json").write_text("of the first")
        files = sorted(own.iterdir())
        assert main.main(["digits_l2p", *flags, "--output_dir", str(tmp_path)]) == 2
        assert sorted(own.iterdir()) == files
    said = capsys.readouterr().err
    assert f"--output_dir {own}: another run writes there (process {os.getpid()} on " in said
    assert sorted(own.iterdir()) == [own / "results.json"]
    assert owns(own) == 0


@pytest.mark.parametrize("command", ["eval", "dry_run", "speed_test_only"])
def test_commands_that_only_read_disturb_no_run(tmp_path, command):
    with Session(StopSignals()) as first:
        first.own(Settings().replace(output_dir=str(tmp_path)))
        assert owns(tmp_path, **{command: True}) == 0
    assert first.code == 0


def test_lock_and_halves_of_files_of_a_killed_run_do_not_block(tmp_path):
    def killed():
        with Session(StopSignals()) as run:
            run.own(Settings().replace(output_dir=str(tmp_path)))
            (tmp_path / "checkpoint").mkdir()
            for name in (".config.yaml.unfinished-1", "checkpoint/.last.pth.unfinished-2"):
                (tmp_path / name).write_text("half")
            os.kill(os.getpid(), signal.SIGKILL)

    assert exit_code(in_child(killed)) == -signal.SIGKILL
    assert (tmp_path / ".run.lock").read_text().startswith("process ")
    assert owns(tmp_path) == 0
    assert list(tmp_path.rglob("*")) == [tmp_path / "checkpoint"]


def test_folder_that_has_become_a_file_ends_no_run_in_a_traceback(tmp_path):
    with Session(StopSignals()) as run:
        run.own(Settings().replace(output_dir=str(tmp_path / "run")))
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").touch()
    assert run.code == 0


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EPERM])
def test_file_system_without_locks_stops_no_run(tmp_path, monkeypatch, capsys, code):
    def no_locks(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", no_locks)
    assert owns(tmp_path) == 0
    assert f"{tmp_path} cannot be locked" in capsys.readouterr().out


@pytest.mark.parametrize("function", ["mkdir", "write_text"])
def test_folder_that_cannot_be_written_to_is_named(tmp_path, function, monkeypatch, capsys):
    full = OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
    monkeypatch.setattr(Path, function, Mock(side_effect=full))
    assert owns(tmp_path / "new", seed=1) == 2
    said = f"--output_dir {tmp_path / 'new'} cannot be written to: Disk quota exceeded"
    assert said in capsys.readouterr().err


def test_link_to_nowhere_is_rejected_as_folder(tmp_path, capsys):
    link = tmp_path / "link"
    link.symlink_to("nowhere")
    assert main.main(["digits_l2p", "--output_dir", str(link / "new")]) == 2
    assert f"{link} is a file or a link to nothing" in capsys.readouterr().err


def test_links_to_nowhere_in_a_folder_are_moved_aside(tmp_path):
    (tmp_path / "checkpoint").symlink_to("nowhere")
    aside = run_record.set_aside(tmp_path)
    assert os.readlink(aside / "checkpoint") == "nowhere"


# What ends a run

CAUGHT = "Caught X in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
DEVICE = "give --grad_checkpointing, --data_on_device false, a smaller --eval_batch_size"
HOST = "give --grad_checkpointing, --test_cache 0, fewer --num_workers, a smaller --eval_batch_size"


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), DEVICE),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), DEVICE),
        (RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"), DEVICE),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you"), HOST),
        (RuntimeError(f"{CAUGHT}  File\n_ArrayMemoryError: Unable to allocate 1 EiB"), HOST),
        (MemoryError(), HOST),
        (OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)), HOST),
    ],
)
def test_lack_of_memory_is_a_line_with_what_to_lower(capsys, error, advice):
    with StopSignals() as signals, Session(signals) as run:
        signals.saved = True
        raise error
    (line,) = capsys.readouterr().out.splitlines()
    said = str(error).splitlines()[-1:] or ["MemoryError"]
    assert line.startswith(f"error: out of memory ({said[0]}): ")
    assert line.endswith(f"{advice} or --batch-size; {RESUMES}")
    assert run.code == 1


def test_nothing_that_a_failed_loop_holds_outlives_the_run(capsys):
    """Such as the workers of a DataLoader, which the exit would wait for."""
    held = []

    def loop():
        workers = Mock()
        held.append(ref(workers))
        raise RuntimeError

    with StopSignals() as signals, Session(signals) as run:
        try:
            loop()
        except RuntimeError as error:
            raise LostWorkerError("killed") from error
    assert (run.code, held[0]()) == (1, None)
    assert capsys.readouterr().out == "error: killed\n"


@pytest.mark.parametrize("kind", [DataError, lambda text: UsageError([text])])
def test_error_that_repeats_a_name_of_any_length_is_cut(kind, capsys):
    with Session(StopSignals()) as run:
        raise kind("x" * 10**6)
    assert run.code in (1, 2)
    assert 1000 < len("".join(capsys.readouterr())) < 2100


def test_arrays_that_are_too_large_are_a_lack_of_memory():
    with pytest.raises(MemoryError) as numpy:
        np.ones(2**60, np.uint8)
    with pytest.raises(RuntimeError) as of_torch:
        torch.ones(2**60, dtype=torch.uint8)
    assert all("out of memory" in session.explain(e.value) for e in (numpy, of_torch))
    assert session.explain(RuntimeError("CUDA error: an illegal memory access")) is None


def test_lack_of_memory_behind_another_error_is_named_in_short():
    full = torch.OutOfMemoryError("CUDA out of memory. 1 GiB is free. Of the allocated memory 9")
    error = RuntimeError("CUDA error: operation failed due to a previous error during capture")
    error.__context__ = full
    assert "(CUDA out of memory. 1 GiB is free.): give --grad" in session.explain(error)
    other = session.LostProcessError("another process of the run is gone")
    other.__cause__ = full
    assert session.explain(other) == "another process of the run is gone"


@pytest.mark.parametrize(("code", "at"), [(errno.ENOSPC, 2), (errno.EDQUOT, 1)])
def test_full_disk_names_the_file_and_whether_the_run_can_resume(
    command, tmp_path, monkeypatch, capsys, code, at
):
    """The second of two epochs finds no room for its state, or the first."""
    save, calls = torch.save, itertools.count(1)

    def filling(content, file):
        if next(calls) == at:
            full = OSError(code, os.strerror(code))
            file = Mock(spec=["write"], write=Mock(side_effect=full))
        save(content, file)

    monkeypatch.setattr(torch, "save", filling)
    assert main.main([*command, "--output_dir", str(tmp_path)]) == 1
    path = tmp_path / "checkpoint" / "last.pth"
    said = f"error: [Errno {code}] {os.strerror(code)}: '{path}': make room there"
    assert said + (f"; {RESUMES}\n" if at == 2 else "\n") in capsys.readouterr().out
    assert path.exists() == (at == 2)
    assert not list(tmp_path.rglob("*unfinished*"))


def test_interrupt_ends_a_run_with_what_is_saved(command, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(main, "train", Mock(side_effect=KeyboardInterrupt))
    assert main.main([*command, "--output_dir", str(tmp_path)]) == INTERRUPTED
    assert "interrupted: nothing is saved\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("handler", "code", "said"),
    [(signal.default_int_handler, INTERRUPTED, "interrupted\n"), (signal.SIG_IGN, 1, "")],
)
def test_interrupt_outside_of_a_run_leaves_no_traceback(capfd, handler, code, said):
    """One that is ignored, as by a shell for what runs in the background, stays ignored."""

    def program():
        signal.signal(signal.SIGINT, handler)
        leave_on_interrupt()
        with interruptible(), suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
            return 1
        signal.raise_signal(signal.SIGINT)

    assert exit_code(in_child(program)) == code
    assert capfd.readouterr().err == said
