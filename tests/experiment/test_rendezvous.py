import socket
import threading

import pytest
import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

import utils
from cli.settings import Settings
from experiment import rendezvous
from helpers.process_groups import by_launcher, free_port
from utils import LostProcessError, Processes


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    """Waits short, in an environment without a launcher."""
    monkeypatch.setattr(utils, "store", None)
    for name, seconds in (("_PATIENCE", 0.1), ("_LATE", 0.1), ("_ANSWER", 0.15)):
        monkeypatch.setattr(rendezvous, name, seconds)


def meet(processes, store=None):
    """Lets processes (rank, number, value of --lr) meet in threads; returns the error of each."""
    told, store = {}, store or dist.HashStore()

    def one(index, rank, world_size, lr):
        try:
            rendezvous.meet(store, Processes(rank, world_size), {"--lr": lr})
        except (LostProcessError, ValueError) as error:
            told[index] = str(error)

    threads = [threading.Thread(target=one, args=(i, *p)) for i, p in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return told


@pytest.mark.parametrize(
    ("processes", "all_are_told"),
    [
        ([(0, 2, "0.03"), (1, 2, "0.03")], None),
        ([(0, 2, "0.03"), (1, 2, "0.1")], "--lr is 0.03 in process 0, 0.1 in process 1: start all"),
        ([(0, 3, "0.03"), (2, 3, "0.03")], "for 1 of 3 processes, which did not come: 1; start"),
        ([(0, 3, "0.03"), (1, 3, "0.03"), (1, 3, "0.03")], "there are two processes 1 of 3"),
        ([(0, 3, "0.03"), (1, 2, "0.03")], ""),
    ],
)
def test_processes_meet_or_learn_why_not(monkeypatch, processes, all_are_told):
    if not (all_are_told == "" or "did not come" in str(all_are_told)):
        monkeypatch.setattr(rendezvous, "_PATIENCE", 20)
    told = meet(processes)
    assert len(told) == (0 if all_are_told is None else len(processes))
    assert all(all_are_told in text for text in told.values()), told
    if all_are_told == "":
        assert any("give all of them the same WORLD_SIZE" in text for text in told.values())


def test_one_that_waits_learns_why_another_ended():
    store = dist.HashStore()
    store.set("ended", "process 1: boom")
    assert meet([(0, 2, "")], store) == {0: "another process of the run is gone (process 1: boom)"}


def test_one_that_was_killed_has_not_come():
    store = dist.HashStore()
    store.set("settings/0", '{"--lr": ""}')
    assert "for 1 of 2 processes, which did not come: 0; start" in meet([(1, 2, "")], store)[0]


def test_another_run_does_not_end_one_that_is_under_way(monkeypatch):
    monkeypatch.setattr(rendezvous, "_PATIENCE", 20)
    store = dist.HashStore()
    assert meet([(0, 2, ""), (1, 2, "")], store) == {}
    assert "there are two processes 1 of 2" in meet([(1, 2, "")], store)[0]
    assert utils.noted_end(store) is None


@pytest.mark.parametrize(
    ("rank", "listens", "url", "problem"),
    [
        (1, False, "env://", "process 1 of 2 waited 0.1 s for process 0 to listen at 127.0.0.1:"),
        (1, False, "tcp://a..b:1", "process 0 to listen at a..b:1 .Unicode"),
        (1, True, "env://", "process 1 finds no process 0 of this program at 127.0.0.1:"),
        (0, True, "env://", "process 0 cannot listen at 127.0.0.1:"),
        (0, False, "env://", "process 0 waited 0.1 s for 1 of 2 processes, which did not come: 1"),
        (0, False, "file:///no/such/folder/x", "cannot meet the others at /no/such/folder/x"),
        (1, False, "file:///dev/zero", "cannot meet the others at /dev/zero .*no regular file"),
    ],
    ids=["nobody", "no host", "a stranger", "port in use", "alone", "no folder", "a device"],
)
def test_process_that_finds_no_other_says_where(monkeypatch, rank, listens, url, problem):
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        if listens:
            stranger.listen()
        port = stranger.getsockname()[1] if listens else free_port()
        for name, value in by_launcher(2, port)(rank).items():
            monkeypatch.setenv(name, value)
        with pytest.raises(LostProcessError, match=problem):
            rendezvous.join(Settings().replace(device="cpu", dist_url=url))


def test_device_of_a_single_process_becomes_the_current_one(monkeypatch, no_launcher):
    current = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    place = rendezvous.join(Settings().replace(device="cuda:1"))
    assert current == [place.device] == [torch.device("cuda:1")]


def test_only_paths_and_places_may_differ():
    one = rendezvous._described(Settings())
    assert {"--seed", "--epochs", "--resume", "--output_dir", "--eval", "torch"} <= one.keys()
    assert not {"--device", "--data-path", "--num_workers"} & one.keys()
    assert rendezvous._described(Settings().replace(data_path="x", num_workers=1)) == one


def test_end_is_noted_for_processes_that_have_yet_to_come(monkeypatch):
    def find_launch():
        return Processes(int(threading.current_thread() is not leaving), 2)

    for name, value in by_launcher(2)(0).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(utils, "find_launch", find_launch)
    monkeypatch.setattr(rendezvous, "_LATE", 5)
    leaving = threading.Thread(
        target=rendezvous.leave, args=(ValueError(), "no such data", "env://")
    )
    leaving.start()
    with pytest.raises(LostProcessError, match=r"is gone \(process 0: no such data\)"):
        rendezvous.join(Settings().replace(device="cpu"))
    utils.store.add("left", 1)
    leaving.join()


def test_torchrun_is_told_why_a_process_ends(monkeypatch, tmp_path, no_launcher):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    rendezvous.leave(ValueError(), "no such data", "env://")
    read = ProcessFailure(0, pid=1, exitcode=1, error_file=str(tmp_path / "error.json"))
    assert read.message == "error: no such data"
