"""Selection rules, scenarios, heads and poolings that a project adds; docs/extending.md."""

import re
import runpy
import sys
from functools import partial

import pytest
import torch

from cli.paths import ROOT
from helpers.finished_runs import Run, evaluate, rejected, typed
from helpers.process_groups import together
from helpers.resumed_runs import stop_when
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import close_by_name, differing
from prompt import SELECTION_RULES, Prompt, selection_rule
from vision_transformer import POOLINGS, Pooling

pytestmark = pytest.mark.usefixtures("restore_logging")

# The examples of the page, run as a person runs them

SCRIPTS = {
    re.search(r"python (\w+)\.py", code)[1]: code
    for code in re.findall(
        r"```python\n(.*?)```", (ROOT / "docs" / "extending.md").read_text(), re.DOTALL
    )
}

#: Flags that each example needs, and what it adds to a checkpoint.
EXAMPLES = {
    "my_selection": ("--diversify projected", {"prompt.projection.weight"}),
    "my_scenario": ("--scenario half-then-one --no-train_mask --num_tasks none "
                    "--classes_per_task none", set()),
    "my_head": ("ncm --head ridge", {"head.sums", "head.products"}),
    "my_prefixes": ("", {"prefixes"}),
}  # fmt: skip


@pytest.fixture
def start(tmp_path):
    """Runs an example in processes of its own; gives its output and the model that it saved."""

    def run(name, flags, count=1):
        path, folder = tmp_path / f"{name}.py", tmp_path / f"{count}"
        path.write_text(SCRIPTS[name])
        argv = [str(path), *TINY_DIGITS, *flags.split(), "--output_dir", str(folder)]
        environment = None if count > 1 else lambda rank: {}
        done = together(tmp_path / "logs", count, partial(run_script, argv), environment)
        assert done.codes == [0] * count, done.text
        return done.text, Run(folder).model

    return run


def run_script(argv, rank):
    sys.argv = argv
    runpy.run_path(argv[0], run_name="__main__")


def test_every_example_of_the_page_is_tried():
    assert SCRIPTS.keys() == EXAMPLES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_is_saved_and_evaluates_to_the_same(name, start):
    flags, added = EXAMPLES[name]
    _, model = start(name, flags)
    assert added <= model.keys()
    assert "backbone" not in " ".join(model)
    output, _ = start(name, f"{flags} --eval")
    assert output.count("Reproduces the stored accuracies") >= 4
    assert "Differs" not in output


@pytest.mark.slow
def test_head_of_the_page_sees_the_same_in_two_processes(start):
    _, alone = start("my_head", f"{EXAMPLES['my_head'][0]} --batch-size 32")
    _, shared = start("my_head", f"{EXAMPLES['my_head'][0]} --batch-size 16", count=2)
    close_by_name(shared, alone, rtol=1e-4, atol=1e-5)


# What a test adds is usable from the command line


def train(folder, flags, code=0):
    assert typed(*TINY_DIGITS, *flags.split(), "--output_dir", folder)[0] == code
    return Run(folder) if code == 0 else None


def assert_reproduced(run):
    assert evaluate(run.folder)[1].count("Reproduces the stored accuracies") == 4


@pytest.fixture
def in_turn(monkeypatch):
    """A rule by which a task trains the prompts behind those of the task before."""
    monkeypatch.setitem(SELECTION_RULES, "in_turn", Prompt)  # which takes the name away again

    @selection_rule("in_turn")
    class PromptInTurn(Prompt):
        def __init__(self, settings, embed_dim):
            super().__init__(settings, embed_dim)
            self.register_buffer("tasks", torch.zeros((), dtype=torch.int64))
            self.register_buffer("served", torch.zeros(self.size))

        @classmethod
        def problems(cls, settings, num_tasks):
            if settings.size <= num_tasks:
                yield f"--size {settings.size}: needs more prompts than {num_tasks} tasks"

        def select(self, similarity):
            if not self.training:
                return super().select(similarity)
            ids = (self.tasks + torch.arange(self.top_k)) % self.size
            return ids.expand(len(similarity), -1)

        def begin_task(self):
            self.tasks += 1

        def count_served(self, counts):
            self.served += counts


@pytest.mark.usefixtures("in_turn")
def test_selection_rule_trains_evaluates_and_resumes_with_its_memory(tmp_path, monkeypatch):
    flags = "--diversify in_turn --size 4"
    run, folder = train(tmp_path / "whole", flags), tmp_path / "out"
    assert run.results["config"]["diversify"] == "in_turn"
    assert run.model["prompt.tasks"] == 2
    none, first, both, second = run.model["prompt.served"].tolist()
    assert (none, both) == (0, first + second)  # prompts 1 and 2, then 2 and 3
    assert min(first, second) > 0
    assert_reproduced(run)
    with monkeypatch.context() as patch:
        stop_when(patch, lambda state, _: (state.task, state.step) == (1, 2))
        train(folder, flags, code=75)
    assert not differing(train(folder, f"{flags} --resume auto").model, run.model)


def test_pooling_trains_and_evaluates(tmp_path, monkeypatch):
    pooling = Pooling(lambda num_prompts: slice(1 + num_prompts, None))
    monkeypatch.setitem(POOLINGS, "patches", pooling)
    run = train(tmp_path / "out", "--head_type patches")
    assert run.results["config"]["head_type"] == "patches"
    assert_reproduced(run)


@pytest.mark.usefixtures("in_turn")
def test_selection_rule_reports_its_problems():
    error = rejected(*TINY_DIGITS, "--diversify", "in_turn", "--size", "2")
    assert "--size 2: needs more prompts than 2 tasks" in error
