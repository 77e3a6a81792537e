"""Selection rules and poolings that a project adds are usable from the command line."""

import pytest
import torch

import main
from experiment.training_run import Checkpointer
from helpers.finished_runs import Run
from helpers.tiny_flags import TINY_DIGITS
from helpers.tiny_model import differing
from prompt import SELECTION_RULES, Prompt, selection_rule
from vision_transformer import POOLINGS, Pooling

pytestmark = pytest.mark.usefixtures("restore_logging")


def train(folder, flags, code=0):
    assert main.main([*TINY_DIGITS, *flags.split(), "--output_dir", str(folder)]) == code
    return Run(folder) if code == 0 else None


def assert_reproduces(folder, caplog):
    here = ["--eval", "--device", "cpu", "--num_workers", "0", "--output_dir", str(folder)]
    assert main.main(here) == 0
    assert caplog.text.count("Reproduces the stored accuracies") == 4


@pytest.fixture
def in_turn(monkeypatch):
    """A rule by which a task trains the prompts behind those of the task before."""
    monkeypatch.setattr("prompt.SELECTION_RULES", dict(SELECTION_RULES))

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
def test_selection_rule_trains_evaluates_and_resumes_with_its_memory(tmp_path, caplog, monkeypatch):
    flags = "--diversify in_turn --size 4"
    run, folder = train(tmp_path / "whole", flags), tmp_path / "out"
    assert run.results["config"]["diversify"] == "in_turn"
    assert run.model["prompt.tasks"] == 2
    none, first, both, second = run.model["prompt.served"].tolist()
    assert (none, both) == (0, first + second)  # prompts 1 and 2, then 2 and 3
    assert min(first, second) > 0
    assert_reproduces(run.folder, caplog)
    at_boundary = Checkpointer.at_boundary

    def stop_in_second_task(checkpointer, state, update, stop=False):
        at_boundary(checkpointer, state, update, stop or (state.task, state.step) == (1, 2))

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "at_boundary", stop_in_second_task)
        train(folder, flags, code=75)
    assert not differing(train(folder, f"{flags} --resume auto").model, run.model)


def test_pooling_trains_and_evaluates(tmp_path, caplog, monkeypatch):
    pooling = Pooling(lambda num_prompts: slice(1 + num_prompts, None))
    monkeypatch.setitem(POOLINGS, "patches", pooling)
    run = train(tmp_path / "out", "--head_type patches")
    assert run.results["config"]["head_type"] == "patches"
    assert_reproduces(run.folder, caplog)


@pytest.mark.usefixtures("in_turn")
def test_selection_rule_reports_its_problems(tmp_path, capsys):
    train(tmp_path / "out", "--diversify in_turn --size 2", code=2)
    assert "--size 2: needs more prompts than 2 tasks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "choices"),
    [("--diversify in_turn", "none, mask, frequency"),
     ("--head_type patches", "token, prompt, token+prompt, gap")],
)  # fmt: skip
def test_unknown_name_is_rejected_with_all_names(tmp_path, capsys, flags, choices):
    train(tmp_path / "out", flags, code=2)
    assert f"{flags} is unknown: choose one of {choices}\n" in capsys.readouterr().err
