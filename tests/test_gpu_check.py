import json
import sys
import time

import pytest

from benchmarks import gpu_check
from cli.paths import ROOT
from helpers.commands import command
from helpers.tables import assert_says, cases

#: What the first stage finds on a machine without a GPU.
ON_CPU = {"device": "cpu", "gpus": 0, "cores": 2, "cudnn_works": True, "computes": True}
BEGIN = """
import json, os, sys

def find(*failures, **found):
    with open({file!r}, "w") as file:
        json.dump({{"found": found, "failures": failures}}, file)

"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs a command line whose stages execute some code; gives exit code and results."""

    def command_of(name, folder, ends, tiny):
        code = BEGIN.format(file=str(folder / f"{name}.json")) + works[name]
        return [sys.executable, "-c", code]

    def run(*argv, **more):
        works.update(more)
        only = ",".join(more) or "images"
        code = gpu_check.main(["--out", str(tmp_path), "--only", only, *argv])
        return code, json.loads(next(tmp_path.rglob("report.json")).read_text())["stages"]

    works = {"device": f"find(**{ON_CPU})"}
    monkeypatch.setattr(gpu_check, "command", command_of)
    return run


def test_a_stage_that_fails_or_dies_ends_no_other(run, tmp_path, capsys):
    code, results = run(
        "--tiny", images="find('values differ', rate=0.3)", memory="",
        attention="os._exit(7)", step="sys.exit('no\\nmemory')",
        loaders="find(lines=[1, 2], rates={'a': 2.0, 'b': 1})",
    )  # fmt: skip
    assert code == 1
    assert_says(
        [f"{name} {result['status']} {result['why']}" for name, result in results.items()],
        ["device passed", "images failed values differ", "attention failed ended with 7",
         "step failed ended with 1: memory", "memory not run needs CUDA", "loaders passed"],
    )  # fmt: skip
    assert results["images"]["found"] == {"rate": 0.3}
    text = next(tmp_path.rglob("summary.md")).read_text()
    assert text in capsys.readouterr().out
    assert "| memory | not run |  | needs CUDA |" in text
    assert "- lines:\n  - 1\n  - 2\n- rates: a 2.0, b 1\n" in text


@pytest.mark.parametrize("found", ["", "find(device='cuda:0')"])
def test_no_stage_runs_without_what_the_first_finds(run, found):
    code, results = run(device=f"{found}\nsys.exit('no driver')", images="")
    assert (code, list(results)) == (1, ["device"])
    assert results["device"]["why"] == "ended with 1: no driver"


@pytest.mark.slow
def test_a_stage_that_hangs_is_ended_with_all_that_it_started(run, tmp_path, monkeypatch):
    left_over = tmp_path / "left_over"
    wait = f"import time; time.sleep(1); open({str(left_over)!r}, 'w')"
    hangs = f"import subprocess\nfind(rate=1)\nsubprocess.run([sys.executable, '-c', {wait!r}])"
    for name, seconds in {"device": 0.5, "images": 0, "attention": 60}.items():
        monkeypatch.setitem(gpu_check.STAGES, name, (seconds, ""))
    code, results = run("--tiny", images=hangs, attention="")
    assert (code, results["images"]["found"]) == (1, {"rate": 1})
    assert "ended at its deadline, after 0 s" in results["images"]["why"]
    assert results["attention"]["status"] == "passed"
    time.sleep(1)
    assert not left_over.exists()


@pytest.mark.parametrize("computes", [False, True])
def test_values_of_kernels_that_do_nothing_are_not_compared(tmp_path, monkeypatch, computes):
    gpu_check.Check(tmp_path, "device", 0).note(device="cuda:0", computes=computes)
    check = gpu_check.Check(tmp_path, "images", 0)
    check.note(rate=1.23456, no_number=float("nan"))
    check.expect("values", False)
    check.expect("exit code", False, of_values=False)
    assert check.failures == ["values", "exit code"][not computes :]
    found = check.earlier("images")
    assert (found["rate"], found["no_number"], "values" in found) == (1.235, "NaN", not computes)


def test_an_error_of_a_stage_is_a_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_check.STAGES, "images", (1, "gpu_check.no_such_stage"))
    gpu_check.work("images", str(tmp_path), 0, True)
    (failure,) = json.loads((tmp_path / "images.json").read_text())["failures"]
    assert failure.startswith("AttributeError: ")
    assert f"{failure}\n" in capsys.readouterr().err


def test_cells_of_the_documentation():
    device = {"gpu": "H", "driver": "1", "cuda": "13", "versions": {}, "bf16 TFLOP/s": 700.0}
    step = {"images/s": 2000.4, "share of the matrix rate": 0.456}
    run = {"whole run, seconds": 90.0, "two copies": {"whole run, seconds": 1800.4}}
    parts = {"device": device, "compile": {"at 16": step}, "run": run}
    stages = {name: {"status": "passed", "why": "", "found": one} for name, one in parts.items()}
    *_, big, small, ours, copies = gpu_check.summary("now", stages, cells=True).splitlines()
    assert big.endswith("matrix rate |  |")
    assert small.endswith("| 2000 images/s, 46% of 700 TFLOP/s |")
    assert (ours[-22:], copies[-24:]) == ("| 90 s, extrapolated |", "| 1800 s, extrapolated |")


REJECTED = cases("""
--minutes 0 --only images,speed also --seconds
    --minutes 0: must be at least 0.1
    --only: 'speed' is none of device, tests, images
    --seconds is no option
    also: there are flags only
--only images
    torch finds no GPU here: --tiny tries the check without one
""")


@pytest.mark.parametrize(("line", "expected"), REJECTED)
def test_what_cannot_run_is_rejected_in_one_message(run, tmp_path, capsys, line, expected):
    assert gpu_check.main([*line.split(), "--out", str(tmp_path)]) == 2
    assert_says(capsys.readouterr().err.splitlines()[1:], expected)


@pytest.mark.slow
def test_whole_check_passes_on_the_cpu(tmp_path):
    """As a person starts it, from another folder."""
    script = ROOT / "benchmarks" / "gpu_check.py"
    argv = ["--tiny", "--minutes", "60", "--out", tmp_path]
    done = command(sys.executable, script, *argv, CUDA_VISIBLE_DEVICES="", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("| passed |") == len(gpu_check.STAGES) - 3
