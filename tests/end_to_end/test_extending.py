"""The examples of docs/extending.md, run as a person runs them."""

import os
import re
import subprocess
import sys

import pytest
import torch

from cli.paths import ROOT
from helpers.tiny_flags import TINY_DIGITS

PAGE = (ROOT / "docs" / "extending.md").read_text()
SCRIPTS = {
    re.search(r"python (\w+)\.py", code)[1]: code
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
}

#: Flags that each example needs, and what it adds to a checkpoint.
CASES = {
    "my_selection": ("--diversify projected", {"prompt.projection.weight"}),
    "my_scenario": ("--scenario half-then-one --no-train_mask --num_tasks none "
                    "--classes_per_task none", set()),
    "my_head": ("", {"head.sums", "head.scale"}),
    "my_prefixes": ("", {"prefixes"}),
}  # fmt: skip


@pytest.fixture
def start(tmp_path, no_launcher):
    """Runs an example in a process of its own; gives its output and the model that it saved."""

    def run(name, flags, launcher=()):
        (tmp_path / f"{name}.py").write_text(SCRIPTS[name])
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, f"{name}.py", *TINY_DIGITS, "--output_dir", "out"]
        done = subprocess.run([*command, *flags.split()], cwd=tmp_path, env=environment,
                              capture_output=True, text=True, timeout=300)  # fmt: skip
        assert done.returncode == 0, done.stderr
        path = tmp_path / "out" / "checkpoint" / "task2_checkpoint.pth"
        return done.stdout, torch.load(path, weights_only=True)["model"]

    return run


def test_every_example_of_the_page_is_tried():
    assert SCRIPTS.keys() == CASES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_example_runs_is_saved_and_evaluates_to_the_same(name, start):
    flags, added = CASES[name]
    _, model = start(name, flags)
    assert added <= model.keys()
    assert "backbone" not in " ".join(model)
    output, _ = start(name, f"{flags} --eval")
    assert output.count("Reproduces the stored accuracies") >= 4
    assert "Differs" not in output


@pytest.mark.slow
def test_head_of_the_page_sees_the_same_in_two_processes(start):
    two = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    _, alone = start("my_head", "--batch-size 32")
    _, shared = start("my_head", "--batch-size 16", launcher=two)
    for name in ("head.sums", "head.scale", "prompt.prompt_key"):
        assert torch.allclose(alone[name], shared[name], rtol=1e-4, atol=1e-5), name


def test_head_of_the_page_counts_what_it_was_shown():
    names = {}
    exec(SCRIPTS["my_head"].replace("__main__", "elsewhere"), names)
    head = names["ClassMeansHead"](2, 3)
    head.observe(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0]]), torch.tensor([2, 2, 0]))
    assert head.sums.tolist() == [[0.0, 2.0], [0.0, 0.0], [4.0, 0.0]]
    assert head(torch.tensor([[5.0, 0.0]])).argmax().item() == 2
