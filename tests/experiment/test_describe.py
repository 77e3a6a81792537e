"""What a run says of itself at its start and at its end."""

import re

import pytest
from torch import nn

import main
from experiment import describe
from helpers.tiny_flags import TINY
from prompt import SELECTION_RULES, Prompt

pytestmark = pytest.mark.usefixtures("restore_logging")


def run(image_folder, output, *flags):
    places = ["--data-path", str(image_folder), "--output_dir", str(output)]
    return main.main([*TINY, "--dataset", "ImageFolder", *places, "--no-plots", *flags])


def lines(text):
    """The lines of the summary by label."""
    block = text[text.index("L2P: ") :]
    return dict(re.findall(r"^  (\w+): +(.*)$", block, re.MULTILINE))


@pytest.fixture
def said(image_folder, tmp_path, capsys):
    """What a dry run says, given flags."""

    def say(*flags, code=0):
        assert run(image_folder, tmp_path / "out", "--dry_run", *flags) == code
        return capsys.readouterr().out

    return say


def test_start_tells_what_will_happen(said, tmp_path):
    text = said("--seed", "7")
    assert text.startswith("L2P: --model vit_tiny_patch16_224 --model_kwargs patch_size=8 ")
    assert ", seed 7\n" in text
    found = lines(text)
    assert list(found) == [
        "Data", "Tasks", "Model", "Backbone", "Trains", "Training", "Precision", "Processes",
        "Output",
    ]  # fmt: skip
    assert found["Data"] == "ImageFolder: 32 training images, 12 test images in 2 test sets"
    assert re.fullmatch(
        r"2 of 2 classes, class-incremental; classes \d \d \| \d \d", found["Tasks"]
    )
    assert found["Model"] == (
        "vit_tiny_patch16_224, 16 pixels; 4 prompts of 2 tokens, 2 for an image; head pools prompt"
    )
    assert re.fullmatch(r"weights random, sha256 [0-9a-f]{12}; frozen", found["Backbone"])
    # 4 * 2 * 16 prompts, 4 * 16 keys, a head from 16 to 4
    assert found["Trains"] == "number of params: 260 (prompts 128, keys 64, head 68)"
    assert found["Training"] == (
        "adam, learning rate 0.0078125 (--lr 0.5, scaled per-device), constant; 2 epochs a task, "
        "4 images a step, vote group of 4"
    )
    assert found["Precision"].startswith("fp32; ")
    assert found["Processes"] == "1 on cpu"
    assert found["Output"] == str(tmp_path / "out")


@pytest.mark.parametrize(
    ("flags", "label", "text"),
    [
        (["--buffer_per_class", "3"], "Replay", "3 images of each class, 4 replayed images"),
        (["--buffer_size", "9"], "Replay", "9 images, 4 replayed images with each vote group"),
        (["--amp", "bf16"], "Precision", "bf16; "),
        (["--freeze", "head"], "Backbone", "trains, the query comes from an untouched copy"),
        (["--freeze", "head"], "Trains", "backbone "),
        (["--joint"], "Tasks", "1 of 4 classes, class-incremental (joint); classes"),
        (["--vote_group_size", "2"], "Training", "4 images a step, vote group of 2"),
        (["--no-prompt_pool", "--head_type", "token"], "Model", "no prompts; head pools token"),
        (["--no-prompt_pool", "--head_type", "token"], "Trains", "number of params: 68 (head 68)"),
        (["--output_dir", ""], "Output", "none: nothing is written"),
    ],
)
def test_start_tells_what_is_special(said, flags, label, text):
    assert text in lines(said(*flags))[label]


@pytest.mark.parametrize(
    "flags",
    [["--no-prompt_pool", "--head_type", "token"], ["--no-batchwise_prompt"], ["--size", "2"]],
    ids=" ".join,
)
def test_start_tells_no_votes_where_there_are_none(said, flags):
    assert "vote group" not in lines(said(*flags))["Training"]


def test_start_warns_of_tasks_that_have_nothing_to_tell_apart(said):
    many = ["--num_tasks", "4"]
    assert "there is nothing to learn" in said(*many)
    assert "4 of 1 class, class-incremental" in said(*many)
    assert "nothing to learn" not in said(*many, "--no-train_mask")
    assert "nothing to learn" not in said()


def test_evaluation_tells_what_it_evaluates(image_folder, tmp_path, capsys):
    assert run(image_folder, tmp_path, "--epochs", "1") == 0
    capsys.readouterr()
    assert main.main(["--eval", "--output_dir", str(tmp_path), "--device", "cpu"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("L2P: evaluation of checkpoints\n")
    assert lines(text)["Votes"] == "vote group of 4"
    assert "Trains" not in lines(text)


def test_start_counts_modules_of_a_selection_rule_by_name(said, monkeypatch):
    class Projected(Prompt):
        def __init__(self, settings, embed_dim):
            super().__init__(settings, embed_dim)
            self.projection = nn.Linear(embed_dim, embed_dim, bias=False)

    monkeypatch.setitem(SELECTION_RULES, "projected", Projected)
    text = lines(said("--diversify", "projected"))["Trains"]
    assert text.endswith("(prompts 128, keys 64, projection 256, head 68)")


def test_start_names_the_configurations(capsys, tmp_path):
    argv = ["digits_l2p", "single_prompt", "--dry_run", "--output_dir", str(tmp_path / "out")]
    assert main.main([*argv, "--device", "cpu"]) == 0
    assert capsys.readouterr().out.startswith("L2P: digits_l2p single_prompt, seed 42\n")


def test_start_tells_which_weights_a_bare_name_means(said):
    small = ["embed_dim=16", "depth=1", "num_heads=2", "patch_size=8"]
    text = said("--model", "vit_base_patch16_224", "--model-kwargs", *small)
    assert "--model vit_base_patch16_224 means vit_base_patch16_224.orig_in21k" in text


def test_end_tells_where_everything_lies(image_folder, tmp_path, capsys):
    folder = tmp_path / "a run"
    assert run(image_folder, folder, "--epochs", "1") == 0
    text = capsys.readouterr().out
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"), (7.26, "7.3 s"), (59.9, "59.9 s"), (60, "1 min 0 s"), (125, "2 min 5 s"),
        (3599.6, "1 h 0 min"), (3600, "1 h 0 min"), (12_345, "3 h 25 min"),
    ],
)  # fmt: skip
def test_duration_is_said_as_people_say_it(seconds, text):
    assert describe._duration(seconds) == text
