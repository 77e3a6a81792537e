"""How the processes of a run meet, and make sure that all of them do the same.

They meet in a store that process 0, or torchrun's agent, serves. Each writes its settings there,
and why it ends, so that no other waits for it in vain; to meet, they wait for a minute at most.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from queue import Empty, Queue
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

import utils
from cli import terminal
from cli.flags import Flag
from cli.parser import UsageError, shown
from cli.paths import open_regular
from cli.settings import FLAGS, Settings
from cli.terminal import printable
from continual_datasets.images import DataError, sha256
from experiment.run_record import versions
from training.state import Run
from utils import LostProcessError, Processes

#: Settings in which processes may differ: where they compute, and where each finds its inputs. What
#: they find is compared by `check_same_run`.
_OWN = (
    "device", "dist_url", "local_rank", "num_workers", "pin_mem", "test_cache", "data_path",
    "file_lists", "class_order", "pretrained",
)  # fmt: skip

#: Seconds: until all must have met; that process 0 serves the reason of its end to late processes,
#: and to those that have met; until the store must answer; between two looks into it.
_PATIENCE, _LATE, _GRACE, _ANSWER, _POLL = 60.0, 15.0, 2.0, 5.0, 0.05


def join(
    settings: Settings, outside_of_python: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Processes:
    """Joins the process group that a launcher describes in the environment, if one does.

    Its device becomes torch's current one, so that no other GPU is touched. Waits until all
    processes have come and their settings are the same. Then torch connects them; Python's signal
    handlers do not run meanwhile, which is when `outside_of_python` is entered.

    Raises:
        ValueError: As `utils.choose_device` and `utils.find_meeting_point`.
        UsageError: If processes have different settings, with each difference.
        LostProcessError: If a process does not come, ends, or has the rank of another.
    """
    launch = utils.find_launch()
    place = (launch or Processes())._replace(
        device=utils.choose_device(settings.run.device, launch)
    )
    if place.device.type == "cuda":
        torch.cuda.set_device(place.device)
    if launch is None or launch.world_size == 1:
        return place
    store = _open(launch, settings.run.dist_url, _PATIENCE)
    try:
        meet(store, launch, {**_described(settings), "the device": place.device.type})
        with outside_of_python():
            utils.init_processes(place)
    except dist.DistError as error:
        raise LostProcessError(
            f"the processes cannot connect ({terminal.reason(error)})"
        ) from error
    return place


def meet(store: dist.Store, launch: Processes, values: dict[str, str]) -> None:
    """Waits in a store until all processes have come, with the same values; raises as `join`."""
    world_size = str(launch.world_size)
    if store.add(f"came/{launch.rank}", 1) > 1:
        problem = f"there are two processes {launch.rank} of {world_size}"
        if not store.check(["met"]):  # else those of a run that is under way
            store.set("ended", problem)
        advice = "give each process a RANK, each run a MASTER_PORT, or new --dist_url, of its own"
        raise LostProcessError(f"{problem}: {advice}")
    utils.store = store
    if (other := store.compare_set("world_size", "", world_size).decode()) != world_size:
        problem = f"process {launch.rank} is one of {world_size}, another one of {other}"
        raise LostProcessError(f"{problem}: give all of them the same WORLD_SIZE")
    if differences := list(_differences(_exchange(store, launch, "settings", values))):
        advice = "start all processes with the same command line and libraries"
        raise UsageError([f"{'; '.join(differences)}: {advice}"])
    _exchange(store, launch, "joins", {})  # settings may be those of a process that was killed
    store.set("met", "")


def check_same_run(run: Run) -> None:
    """Makes sure that all processes have the same data, classes and weights; else DataError."""
    if utils.is_alone():
        return
    stream = run.stream
    parameters = [value.numpy().tobytes() for value in run.model.trained_state().values()]
    sizes = [source.sizes() for source in (stream.train, *stream.test_sources)]
    _check_same(
        {
            "the number of training images (--data-path)": len(stream.train),
            "the names or content of training images (--data-path)": stream.train_digest[:12],
            "the number of test images (--data-path)": [len(p.data) for p in stream.test_sets],
            "the names or content of test images (--data-path)": stream.test_digest[:12],
            "the sizes of image files (--data-path)": sha256(str(sizes).encode())[:12],
            "the order of the classes (--class_order)": stream.class_order,
            "the run that this one continues": [one.sha256[:12] for one in stream.earlier],
            "the backbone's sha256 (--pretrained)": run.backbone["sha256"][:12],
            "the sha256 of the initial prompts and head": sha256(*parameters)[:12],
        }
    )


def check_same_checkpoints(paths: Iterable[Path]) -> None:
    """Makes sure that all processes evaluate the same files; else DataError."""
    if utils.is_alone():
        return
    found = {}
    for path in paths:
        with open_regular(path) as file:
            found[f"the sha256 of {path.name}"] = sha256(file.read())[:12]
    _check_same(found)


def _check_same(values: Mapping[str, object]) -> None:
    texts = {name: str(value) for name, value in values.items()}
    if differences := list(_differences(utils.gather(texts))):
        raise DataError(f"{'; '.join(differences)}: give all processes the same data and weights")


def leave(error: BaseException, why: str, dist_url: str) -> None:
    """Reports why this process ends, to torchrun and the others, also those that come later."""
    with suppress(ValueError, RuntimeError, OSError, KeyboardInterrupt):
        if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # which torchrun prints at the end
            content = {"message": f"error: {why}", "timestamp": int(time.time())}
            Path(report).write_text(json.dumps(content))
        launch, store = utils.find_launch(), utils.store
        if launch is None or launch.world_size == 1:
            return
        if store is None:
            if isinstance(error, LostProcessError) or not isinstance(error, Exception):
                return
            store = _open(launch, dist_url, _LATE)
            if store.check(["met"]):
                return  # they are of another run
        have_met, is_lost = store.check(["met"]), isinstance(error, LostProcessError)
        if not (have_met and is_lost) and utils.noted_end(store) is None:
            why = why if why.startswith("process ") else f"process {launch.rank}: {why}"
            store.set("ended", printable(why).replace("\n", " "))
        store.add("left", 1)
        utils.disconnect()
        deadline = time.monotonic() + (_GRACE if have_met else _LATE)
        is_read = launch.rank == 0 and not _has_agent(dist_url) and utils.noted_end(store)
        while is_read and store.add("left", 0) < launch.world_size and time.monotonic() < deadline:
            time.sleep(_POLL)
    utils.store = None


def _open(launch: Processes, dist_url: str, patience: float) -> dist.Store:
    """The store in which the processes of a launch meet."""
    url = urlsplit(utils.find_meeting_point(launch, dist_url))
    host, port = url.hostname or "", url.port or 0
    serves = launch.rank == 0 and not _has_agent(dist_url)
    problem = "cannot listen at" if serves else "finds no process 0 of this program at"
    try:
        if url.scheme == "file":
            problem = "cannot meet the others at"
            open_regular(url.path, "ab").close()  # torch would try again for minutes
            store: dist.Store = dist.FileStore(url.path, launch.world_size)
        else:
            if not serves:
                _wait_for_port(launch, host, port, patience)
            store = _connect("127.0.0.1" if serves else host, port, serves)
    except LostProcessError:
        raise
    except (OSError, RuntimeError) as error:
        advice = "another program may use the port: give another MASTER_PORT"
        raise LostProcessError(
            f"process {launch.rank} {problem} {url.netloc or url.path} ({terminal.reason(error)}); "
            f"{advice if port else 'give another --dist_url'}"
        ) from error
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"l2p/{attempt}", store)


def _has_agent(dist_url: str) -> bool:
    """Whether torchrun's agent serves the store, in place of process 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and dist_url == "env://"


def _connect(host: str, port: int, serves: bool) -> dist.Store:
    """Serves or joins a store; torch itself would wait forever for a program that never answers."""
    answer: Queue[dist.Store | RuntimeError] = Queue()

    def connect() -> None:
        seconds, waits = timedelta(seconds=_ANSWER), {"wait_for_workers": False}
        try:
            answer.put(dist.TCPStore(host, port, is_master=serves, timeout=seconds, **waits))
        except RuntimeError as error:
            answer.put(error)

    threading.Thread(target=connect, daemon=True).start()
    try:
        found = answer.get(timeout=3 * _ANSWER)  # torch tries several times
    except Empty:
        raise TimeoutError("no answer") from None
    if isinstance(found, RuntimeError):
        raise found
    return found


def _wait_for_port(launch: Processes, host: str, port: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        left = deadline - time.monotonic()
        try:
            return socket.create_connection((host, port), max(left, _POLL)).close()
        except (OSError, UnicodeError) as error:  # the latter of a name that cannot be one
            if left <= _POLL:
                raise LostProcessError(
                    f"process {launch.rank} of {launch.world_size} waited {patience:g} s for "
                    f"process 0 to listen at {host}:{port} ({terminal.reason(error)}): start it, "
                    "or correct MASTER_ADDR and MASTER_PORT"
                ) from error
        time.sleep(_POLL)


def _exchange(
    store: dist.Store, launch: Processes, name: str, values: dict[str, str]
) -> list[dict[str, str]]:
    """Writes values to the store under a name; returns those of every process, by rank."""
    keys = [f"{name}/{rank}" for rank in range(launch.world_size)]
    store.set(keys[launch.rank], json.dumps(values))
    deadline = time.monotonic() + _PATIENCE
    while not store.check(keys):
        if reason := utils.noted_end(store):
            raise LostProcessError(f"another process of the run is gone ({reason})")
        if time.monotonic() > deadline:
            missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
            raise LostProcessError(
                f"process {launch.rank} waited {_PATIENCE:g} s for {len(missing)} of "
                f"{launch.world_size} processes, which did not come: {shown(missing[:9])}; "
                "start all of them, each with a RANK of its own"
            )
        time.sleep(_POLL)
    return [json.loads(store.get(key)) for key in keys]


def _differences(everyone: Sequence[dict[str, str]]) -> Iterator[str]:
    """In what the values of the processes differ, each with the first process that does."""
    for name, value in everyone[0].items():
        for rank, other in enumerate(everyone):
            if other.get(name) != value:
                there = _brief(other.get(name, "unknown"))
                yield f"{name} is {_brief(value)} in process 0, {there} in process {rank}"
                break


def _brief(value: str) -> str:
    return value if len(value) <= 80 else f"{value[:70]}..."


def _described(settings: Settings) -> dict[str, str]:
    """What must be the same in all processes before they assemble a run."""
    flags: dict[str, Flag] = {name: one for name, one in FLAGS.items() if name not in _OWN}
    return {one.spelling: shown(settings[name]) for name, one in flags.items()} | versions()
