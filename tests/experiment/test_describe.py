"""What a run says of itself at its start and at its end."""

import re
from types import SimpleNamespace

import pytest
from torch import nn

import main
from cli.parser import parse
from experiment import describe
from prompt import SELECTION_RULES, Prompt

pytestmark = pytest.mark.usefixtures("restore_logging")


def lines(text):
    """The lines of the summary by label."""
    block = text[text.index("L2P: ") :]
    return dict(re.findall(r"^  (\w+): +(.*)$", block, re.MULTILINE))


@pytest.fixture
def said(command, tmp_path, capsys):
    """What a dry run says, given flags."""

    def say(*flags):
        assert (
            main.main([*command, "--dry_run", "--output_dir", str(tmp_path / "out"), *flags]) == 0
        )
        return capsys.readouterr().out

    return say


def test_start_tells_what_will_happen(said, tmp_path):
    text = said("--seed", "7")
    assert text.startswith("L2P: --model vit_tiny_patch16_224 --model_kwargs patch_size=8 ")
    assert ", seed 7\n" in text
    found = lines(text)
    patterns = {
        "Data": "ImageFolder: 32 training images, 12 test images in 2 test sets",
        "Tasks": r"2 of 2 classes, class-incremental; classes \d \d \| \d \d",
        "Model": "vit_tiny_patch16_224, 16 pixels; 4 prompts of 2 tokens, 2 for an image; "
        "head pools prompt",
        "Backbone": "weights random, sha256 [0-9a-f]{12}; frozen",
        # 4 * 2 * 16 prompts, 4 * 16 keys, a head from 16 to 4
        "Trains": r"number of params: 260 \(prompts 128, keys 64, head 68\)",
        "Training": r"adam, learning rate 0.015625 \(--lr 0.5, scaled per-device\), constant; "
        "2 epochs a task, 8 images a step, vote group of 8",
        "Precision": "fp32; .*",
        "Processes": "1 on cpu",
        "Output": re.escape(str(tmp_path / "out")),
    }
    assert list(found) == list(patterns)
    for label, pattern in patterns.items():
        assert re.fullmatch(pattern, found[label]), found[label]


@pytest.mark.parametrize(
    ("flags", "texts"),
    [
        (
            "--buffer_per_class 3 --amp bf16 --no-batchwise_prompt",
            ["Replay: 3 images of each class, 8 replayed images with each", "Precision: bf16; "],
        ),
        (
            "--buffer_size 9 --freeze head --vote_group_size 2",
            ["Replay: 9 images, 2 replayed images with each vote group from", "backbone ",
             "; trains, the query comes from an untouched copy", "images a step, vote group of 2"],
        ),
        ("--joint --size 2", ["Tasks: 1 of 4 classes, class-incremental (joint); classes"]),
        (
            "--no-prompt_pool --head_type token --output_dir=",
            [", 16 pixels, no prompts; head pools token", "number of params: 68 (head 68)",
             "Output: none: nothing is written"],
        ),
    ],
)  # fmt: skip
def test_start_tells_what_is_special(said, flags, texts):
    found = lines(said(*flags.split()))
    text = "\n".join(f"{label}: {line}" for label, line in found.items())
    assert [part for part in texts if part not in text] == []
    votes = "vote_group" in flags  # the others leave the vote nothing to change
    assert ("vote group" in found["Training"]) == votes


def test_start_warns_of_tasks_that_have_nothing_to_tell_apart(said):
    many = ["--num_tasks", "4"]
    assert "nothing to learn" not in said(*many, "--no-train_mask")
    text = said(*many)
    assert "there is nothing to learn" in text
    assert "4 of 1 class, class-incremental" in text


def test_start_counts_modules_of_a_selection_rule_by_name(said, monkeypatch):
    class Projected(Prompt):
        def __init__(self, settings, embed_dim):
            super().__init__(settings, embed_dim)
            self.projection = nn.Linear(embed_dim, embed_dim, bias=False)

    monkeypatch.setitem(SELECTION_RULES, "projected", Projected)
    text = lines(said("--diversify", "projected"))["Trains"]
    assert text.endswith("(prompts 128, keys 64, projection 256, head 68)")


def test_start_names_the_configurations(monkeypatch, caplog):
    monkeypatch.setattr(describe, "_lines", lambda run: {"Data": "some", "Votes": "none"})
    monkeypatch.setattr(describe, "_warn", lambda run: None)
    settings, _ = parse(["digits_l2p", "single_prompt"])
    with caplog.at_level("INFO"):
        describe.describe(SimpleNamespace(settings=settings))
    assert caplog.messages == ["L2P: digits_l2p single_prompt, seed 42\n  Data:      some"]


def test_start_tells_which_weights_a_bare_name_means(said):
    small = ["embed_dim=16", "depth=1", "num_heads=2", "patch_size=8"]
    text = said("--model", "vit_base_patch16_224", "--model-kwargs", *small)
    assert "--model vit_base_patch16_224 means vit_base_patch16_224.orig_in21k" in text


def test_end_tells_where_everything_is_and_an_evaluation_what_it_evaluates(
    command, tmp_path, capsys
):
    folder = tmp_path / "a run"
    assert main.main([*command, "--epochs", "1", "--output_dir", str(folder)]) == 0
    text = capsys.readouterr().out
    assert "nothing to learn" not in text
    end = text[text.index("Time: ") :]
    stages = re.match(
        r"Time: training [\d.]+ s, evaluation [\d.]+ s, loading [\d.]+ s, saving [\d.]+ s, "
        r"figures [\d.]+ s; ([\d.]+) s since this start\n",
        end,
    )
    assert float(stages[1]) > 0
    named = re.findall(r"^  (\S+)  ", end, re.MULTILINE)
    assert f"Written to {folder}:\n" in end
    assert sorted(named) == sorted(path.name for path in folder.iterdir())
    assert f"python main.py '{folder}'/config.yaml runs it again" in end
    assert end.endswith(f"Evaluate again: python main.py --eval --output_dir '{folder}'\n")
    assert main.main(["--eval", "--output_dir", str(folder), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("L2P: evaluation of checkpoints\n")
    found = lines(text)
    assert list(found) == ["Data", "Tasks", "Model", "Votes", "Precision", "Processes"]
    assert found["Votes"] == "vote group of 8"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (7.26, "7.3 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (125, "2 min 5 s"),
        (3599.6, "1 h 0 min"), (3600, "1 h 0 min"), (12_345, "3 h 25 min"),
    ],
)  # fmt: skip
def test_duration_is_said_as_people_say_it(seconds, text):
    assert describe._duration(seconds) == text
