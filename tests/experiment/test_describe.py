"""What a run says of itself at its start and at its end."""

import re
import shlex
from types import SimpleNamespace

import pytest
from torch import nn

import main
from cli import paths
from cli.settings import Settings
from experiment import describe
from helpers.tables import cases
from model.backbone import with_own_norm
from prompt import SELECTION_RULES, Prompt

pytestmark = pytest.mark.usefixtures("restore_logging")


def lines(text):
    """The lines of the summary by label."""
    return dict(re.findall(r"^  (\w+): +(.*)$", text, re.MULTILINE))


@pytest.fixture
def said(command, tmp_path, capsys):
    """What a dry run says, given flags."""

    def say(flags):
        argv = [*command, "--dry_run", "--output_dir", str(tmp_path / "out"), *flags.split()]
        assert main.main(argv) == 0
        return capsys.readouterr().out

    return say


def test_start_tells_what_will_happen(said, tmp_path):
    text = said("--seed 7")
    assert text.startswith("L2P: --model vit_tiny_patch16_224 --model_kwargs patch_size=8 ")
    assert ", seed 7\n" in text
    found = lines(text)
    patterns = {
        "Data": "ImageFolder: 32 training images, 12 test images in 2 test sets",
        "Tasks": r"2 of 2 classes, class-incremental; classes [a-d] [a-d] \| [a-d] [a-d]",
        "Model": r"vit_tiny_patch16_224 \(patch_size=8 embed_dim=16 depth=2 num_heads=2\), "
        "random weights, 16 pixels; 4 prompts of 2 tokens, 2 for an image; "
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


#: Flags; below, patterns of what is said.
SPECIAL = r"""
--buffer_per_class 3 --amp bf16 --no-batchwise_prompt
  Replay: +3 images of each class, 8 replayed images with each
  8 images a step$
  Precision: bf16;
--buffer_size 9 --freeze head --vote_group_size 2
  Replay: +9 images, 2 replayed images with each vote group from
  backbone \d+
  ; trains, the query comes from an untouched copy$
  images a step, vote group of 2$
--joint --size 2
  Tasks: +1 of 4 classes, class-incremental \(joint\); classes
  images a step$
linear_probe joint --seed 7 --output_dir=
  ^L2P: linear_probe joint --model vit_tiny_patch16_224 .*, seed 7$
  , 16 pixels, no prompts; head pools token$
  Trains: +number of params: 68 \(head 68\)$
  Output: +none: nothing is written$
ncm --num_tasks 4
  Trains: +number of params: 0 \(head ncm learns without gradients\)$
  Training: +2 epochs a task, 8 images a step$
--num_tasks 4 --no-train_mask
--min-lr 0.5
  ^Without effect: --min-lr 0.5 \(needs --sched cosine or tanh or poly or plateau\)$
--num_tasks 4
  Tasks: +4 of 1 class, class-incremental
  there is nothing to learn\. Give --num_tasks 2 --classes_per_task 2, or the overlay no_class_m
--model vit_base_patch16_224.mae --model-kwargs embed_dim=16 depth=1 num_heads=2 patch_size=8
  Model: +vit_base_patch16_224 \(embed_dim=16 depth=1 num_heads=2 patch_size=8\), random weights, 16
--model vit_base_patch16_224 --model-kwargs embed_dim=16 depth=1 num_heads=2 patch_size=8
  --model vit_base_patch16_224 means vit_base_patch16_224.orig_in21k
--diversify projected
  \(prompts 128, keys 64, projection 256, head 68\)$
"""


def test_start_tells_what_is_special(said, monkeypatch):
    class Projected(Prompt):
        def __init__(self, settings, embed_dim):
            super().__init__(settings, embed_dim)
            self.projection = nn.Linear(embed_dim, embed_dim, bias=False)

    monkeypatch.setitem(SELECTION_RULES, "projected", Projected)
    for flags, patterns in cases(SPECIAL):
        text = said(flags)
        assert [p for p in patterns if not re.search(p, text, re.MULTILINE)] == [], text
        assert ("nothing to learn" in text) == ("there is nothing" in " ".join(patterns))


@pytest.mark.slow
def test_tasks_of_a_class_are_warned_of_at_the_start_and_the_end(command, tmp_path, capsys):
    assert main.main([*command, "--num_tasks", "4", "--output_dir", str(tmp_path)]) == 0
    start, end = capsys.readouterr().out.split("Task 1 (1 of 4)")
    for text in (start, end):
        assert text.count("WARNING: each of 4 tasks is a single class") == 1


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
    called = paths.command("main.py")
    assert f"{called} '{folder}'/config.yaml runs it again" in end
    assert f"\nPredict:        {paths.command('predict.py', folder)} IMAGES ...\n" in end
    more = f"{called} --continue_from '{folder}' --data-path NEW_DATA --output_dir NEW_FOLDER\n"
    assert more in end
    again = end.rpartition(f"Evaluate again: {called} ")[2]
    assert again.startswith(f"--eval --output_dir '{folder}' --device cpu ")
    assert main.main(shlex.split(again)) == 0
    text = capsys.readouterr().out
    assert text.startswith("L2P: evaluation of checkpoints\n")
    found = lines(text)
    assert list(found) == ["Data", "Tasks", "Model", "Votes", "Precision", "Processes"]
    assert found["Votes"] == "vote group of 8"


def test_pixels_that_timms_weights_were_not_trained_on_are_named():
    name = "vit_small_patch16_dinov3.lvd1689m"
    run = SimpleNamespace(settings=Settings(), backbone={"name": name, "source": "timm"})
    wanted = f"--norm none; {name} was pretrained with --norm imagenet (--norm model)"
    assert describe._pixels(run) == wanted
    run.settings = with_own_norm(Settings().replace(model=name, norm="model"))
    assert describe._pixels(run) == ""


def test_duration_is_said_as_people_say_it():
    for seconds, text in {
        0.04: "0.0 s", 7.26: "7.3 s", 59.9: "59.9 s", 60: "1 min 0 s", 125: "2 min 5 s",
        3599.6: "1 h 0 min", 3600: "1 h 0 min", 12_345: "3 h 25 min",
    }.items():  # fmt: skip
        assert describe._duration(seconds) == text
