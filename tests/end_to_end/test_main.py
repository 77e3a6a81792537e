"""The command line as a person types it, on a small image folder and a tiny random ViT."""

import argparse
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch
import yaml
from timm.models import create_model

from experiment import checkpoints, resume
from helpers.command_lines import SHALLOW
from helpers.finished_runs import HERE, Run, evaluate, failed, read, rejected, typed
from helpers.tiny_model import differing
from reports import draw, metrics
from reports.metrics import SELECTIONS

pytestmark = pytest.mark.usefixtures("restore_logging")


@pytest.fixture
def copy(trained, tmp_path):
    """The folder of the finished run, without its figures, for a test to change."""
    ignored = shutil.ignore_patterns("plots")
    return shutil.copytree(trained.folder, tmp_path / "copy", ignore=ignored)


@pytest.fixture
def train(tiny, tmp_path):
    """Runs with further flags, of which the last of a kind holds."""

    def train(flags="", to="out"):
        code, out, err = typed(*tiny, *flags.split(), "--output_dir", tmp_path / to)
        assert (code, err) == (0, ""), out + err
        return Run(tmp_path / to)

    return train


# A run and what it leaves behind


@pytest.mark.smoke
def test_run_leaves_its_files(trained):
    folder = trained.folder
    figures = [f"plots/{name}.{end}" for name in draw.RUN_FIGURES for end in ("png", "svg")]
    states = "last last_but_one task1_checkpoint task2_checkpoint".split()
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "config.yaml", "log.txt", "log_stats.txt", "results.json",
        *figures, *(f"checkpoint/{name}.pth" for name in states),
    }  # fmt: skip


@pytest.mark.smoke
def test_results_follow_the_interface(trained):
    results = trained.results
    for name in SELECTIONS:
        rows = results[name]["accuracy_matrix"]
        matrix = metrics.from_lists(rows)
        assert np.isnan(matrix).tolist() == [[False, False], [True, False]]
        by_class = {n: results[name][n] for n in ("accuracy_by_class", "confusion_matrix")}
        numbers = {"accuracy_matrix": rows, **metrics.summarize(matrix, 1)}
        assert results[name] == {**numbers, **by_class}
        confusion = by_class["confusion_matrix"].values()
        assert [sum(row.values()) for row in confusion] == [3] * 4
        assert set(results[name]) >= {
            "average_accuracy", "forgetting", "forgetting_literature", "backward_transfer",
            "learning_accuracy", "average_incremental_accuracy",
        }  # fmt: skip
    assert sorted(c for task in results["class_order"] for c in task) == [0, 1, 2, 3]
    assert set(results["backbone"]) == {"name", "source", "sha256"}
    assert results["seed"] == 42
    assert results["config"]["top_k"] == 2
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert results["hardware"]["threads"] == torch.get_num_threads()
    assert results["hardware"]["gpu"] is None
    assert [t["task"] for t in results["timing"]] == [1, 2]
    for entry in results["prompt_usage"]:
        assert sum(entry["batch"]) == sum(entry["instance"]) == 2 * 2 * 3  # K * classes * images
        assert len(entry["key_similarity"]) == 4
        best = sum(sorted(entry["key_similarity"])[-2:]) / 2
        assert best <= entry["mean_similarity"] + 1e-6  # each image selects its own two best


def test_results_tell_the_command_and_what_follows_from_it(trained):
    command, flags = trained.results["command"], trained.results["command"]["flags"]
    assert command["configurations"] == []
    assert (flags["size"], flags["lr"], flags["dataset"]) == (4, 0.5, "ImageFolder")
    assert "resume" not in flags
    state = resume.load(trained.folder / "checkpoint/last.pth")
    assert trained.results["run"] == {
        "processes": 1,
        "images_per_step": 4,
        "learning_rate": 0.5 * 4 / 256,
        "trained_parameters": sum(tensor.numel() for tensor in trained.model.values()),
        "train_digest": state.train_digest,
    }


def test_log_stats_has_a_line_per_task_and_the_curve_every_epoch(trained):
    results, lines = trained.results, trained.stats
    curve = results["training_curve"]
    assert [(point["task"], point["epoch"]) for point in curve] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert curve[0]["Loss"] != curve[1]["Loss"]
    assert [line["task"] for line in lines] == [1, 2]
    names = "train_Lr train_Loss train_Acc@1 train_Acc@5 test_Acc@1 test_Acc@5 test_Loss epoch"
    for last, line in zip(curve[1::2], lines, strict=True):
        assert set(names.split()) <= set(line)
        assert last["Loss"] == line["train_Loss"]
        assert last["Acc@1"] == line["train_Acc@1"]
    assert lines[1]["average_Acc@1"] == pytest.approx(results["batch"]["average_accuracy"])
    assert lines[0]["forgetting"] is None
    assert lines[1]["forgetting"] == results["batch"]["forgetting"]
    assert lines[1]["instance_backward"] == results["instance"]["backward_transfer"]


def test_log_keeps_the_originals_lines(trained):
    for piece in (
        "[Average accuracy till task1]\tAcc@1: ", "[Average accuracy till task2]\tAcc@1: ",
        "\tForgetting: ", "\tBackward: ", "Train: Epoch[1/2]", "Test: [Task 2]", "* Acc@1 ",
        "Total training time: ", "number of params: ", "average accuracy",
    ):  # fmt: skip
        assert piece in trained.log, piece


def test_config_runs_again_to_the_same_results_and_the_first_are_moved_aside(trained, copy):
    config = yaml.safe_load((copy / "config.yaml").read_text())
    assert config["vote_group_size"] is None  # follows --batch-size when run again
    assert typed(copy / "config.yaml", "--no-plots", "--output_dir", copy)[0] == 0
    again = Run(copy)
    for key in (*SELECTIONS, "class_order", "backbone", "prompt_usage"):
        assert again.results[key] == trained.results[key]
    (kept,) = (copy / "previous").iterdir()
    assert Run(kept).results == trained.results
    assert not differing(again.model, trained.model)
    assert not differing(Run(kept).model, trained.model)


def test_run_in_another_folder_finds_shipped_weights_and_writes_there(
    image_folder, tmp_path, monkeypatch
):
    """Relative paths of a command line are those of the folder in which it was typed."""
    monkeypatch.chdir(tmp_path)
    data = f"--dataset ImageFolder --data-path {os.path.relpath(image_folder)} --num_tasks 2"
    flags = [*data.split(), "--epochs", "1", "--no-plots", "--device", "cpu"]
    code, out, _ = typed("digits_l2p", *flags, "--output_dir", "out")
    assert code == 0
    assert "Written to out:\n" in out
    assert Run(tmp_path / "out").results["backbone"]["source"] == "glyph_vit.safetensors"
    assert typed("--eval", "--output_dir", "out")[1].count("Reproduces the stored accuracies") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
def test_names_of_folders_may_be_no_text(trained, tiny, image_folder, tmp_path):
    data = shutil.copytree(image_folder, tmp_path / "caf\udce9")
    for split in ("train", "val"):
        (data / split / "d").rename(data / split / "d\udce9\n")
    out = tmp_path / "out\udce9"
    assert typed(*tiny, "--plots", "--data-path", data, "--output_dir", out)[0] == 0
    assert Run(out).results["class_names"] == ["a", "b", "c", "d\udce9\n"]
    place = "--data-path", data, "--output_dir", out, "--device", "cpu"
    for again in ([*tiny, "--resume", "auto"], ["--eval"], [out / "config.yaml", "--no-plots"]):
        assert typed(*again, *place)[0] == 0
        found, wanted = (run.results["instance"] for run in (Run(out), trained))
        assert found["accuracy_matrix"] == wanted["accuracy_matrix"]


# Options that change the course of a run

OPTIONS = """
--train_mask false | --no-reinit_optimizer | --pull_constraint_coeff 5 | --use_prompt_mask |
--initializer official | --prompt_key_init zero | --embedding_key mean_max | --head_type token |
--head_type gap | --head_init zero | --global_pool avg | --opt sgd --momentum 0.5 |
--clip-grad 0.01 | --weight-decay 0.1 --opt adamw | --opt-eps 0.1 | --opt-betas 0.5 0.9 |
--smoothing 0.3 | --lr 0.3 | --lr_scale none | --sched cosine --warmup-epochs 1 |
--scale 0.9 1.0 | --ratio 1 1 | --hflip 0 | --train-interpolation nearest | --color-jitter 0.4 |
--aa rand-m9-mstd0.5-inc1 | --reprob 1.0 --remode const | --norm half | --drop 0.5 |
--drop-path 0.5 | --no-prompt_key | --no-shuffle | --epochs 1 | --batch-size 2 | --length 1 |
--top_k 1
"""


@pytest.mark.slow
def test_every_option_changes_what_is_learned(trained, train):
    plain = trained.model
    for flags in map(str.strip, OPTIONS.split("|")):
        other = train(f"--eval_every 2 {flags}", to=flags.replace(" ", "_")).model
        shared = [k for k in plain if k in other and plain[k].shape == other[k].shape]
        assert any(not torch.equal(plain[k], other[k]) for k in shared), flags


#: A model of each family, and what files hold of its `--norm model`.
FAMILIES = {
    "vit_small_patch16_dinov3": "imagenet", "eva02_tiny_patch14_224.mim_in22k":
    "0.48145466,0.4578275,0.40821073,0.26862954,0.26130258,0.27577711",
    "beitv2_base_patch16_224": "imagenet", "vit_base_patch16_siglip_224": "half",
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_each_family_trains_evaluates_and_resumes(train, name):
    flags = f"--model {name} --norm model"
    run = train(flags)
    assert run.results["config"]["norm"] == FAMILIES[name]
    assert run.log.count("(prompts 128, keys 64, head 68)") == 1
    told, out = evaluate(run.folder, "--norm", "model")
    assert out.count("Reproduces the stored accuracies") == 4
    states = [run.folder / "checkpoint" / f"{name}.pth" for name in ("last", "last_but_one")]
    shutil.move(states[1], states[0])
    again = train(f"{flags} --resume auto")
    assert again.results["instance"] == run.results["instance"] == told["instance"]
    assert not differing(again.model, run.model)


# Evaluation of checkpoints


def test_eval_needs_nothing_but_the_folder_and_a_second_keeps_the_first(trained, copy):
    code, out, _ = typed("--eval", "--output_dir", copy)
    assert code == 0
    assert out.count("Reproduces the stored accuracies") == 4
    first = (copy / "eval_results.json").read_bytes()
    assert all(json.loads(first)[name] == trained.results[name] for name in SELECTIONS)
    assert Run(copy).results == trained.results
    told, _ = evaluate(copy, "--task_inc")
    assert (copy / "eval_results_before.json").read_bytes() == first
    assert told != json.loads(first)
    found, _ = evaluate(copy, "--batch-size", "8", "--num_workers", "2")
    assert found["batch"] == trained.results["batch"]


def test_eval_of_one_checkpoint_writes_into_its_run_beside_it_or_as_wanted(trained, copy, tmp_path):
    stored = trained.results["batch"]["accuracy_matrix"]
    shutil.copy(checkpoints.task_path(copy, 1), tmp_path / "kept.pth")
    for path, more, written, columns in (
        (checkpoints.task_path(copy, 1), (), copy / "eval_results_task1_checkpoint.json", [0]),
        (tmp_path / "kept.pth", (), tmp_path / "eval_results_kept.json", [0]),
        (checkpoints.task_path(copy, 2), ("--output_dir", tmp_path / "there"),
         tmp_path / "there" / "eval_results_task2_checkpoint.json", [1]),
    ):  # fmt: skip
        flags = "--eval", "--checkpoint", path, "--save_predictions", *HERE, *more
        assert typed(*flags)[0] == 0
        found = read(written)["batch"]
        assert sum(map(len, found["confusion_matrix"].values())) > 0
        name = written.name.replace("results", "predictions").replace(".json", ".csv")
        assert len(written.with_name(name).read_text().splitlines()) == 1 + 6 * (1 + columns[0])
        assert found["forgetting"] is None  # a column is missing
        assert found["accuracy_matrix"] == [
            [value if column in columns else None for column, value in enumerate(row)]
            for row in stored
        ]


def test_checkpoint_of_a_task_that_was_not_evaluated_evaluates(trained, copy):
    path = checkpoints.task_path(copy, 1)
    content = torch.load(path, weights_only=True)
    content["config"]["eval_every"] = 2
    torch.save(content, path)
    found, _ = evaluate(copy, "--checkpoint", path, name="eval_results_task1_checkpoint")
    stored = trained.results["batch"]["accuracy_matrix"]
    assert found["batch"]["accuracy_matrix"][0][0] == stored[0][0]


#: Entries of a checkpoint, and the message.
DAMAGE = [
    ({"config": {"top_k": "abc"}}, "--top_k abc: 'abc' is not a whole number"),
    ({"class_order": [[0, 1], [1, 2]]}, "gives a class to more than one task"),
    ({"class_names": ["a", "b", "c", "e"]}, "expected the class 'e', found 'd'"),
    ({"model": {"head.weight": torch.zeros(7, 16)}},
     "task1_checkpoint.pth does not fit the model: head.weight is (7, 16), expected (4, 16)"),
]  # fmt: skip


def test_eval_names_what_is_wrong_with_a_checkpoint(trained, copy):
    path = checkpoints.task_path(copy, 1)
    good = torch.load(path, weights_only=True)
    for change, message in DAMAGE:
        if "model" in change:
            change = {"model": {**good["model"], **change["model"]}}
        torch.save({**good, **change}, path)
        assert message in failed("--eval", "--output_dir", copy, *HERE)


def test_eval_names_checkpoints_that_are_missing_or_damaged(copy, tmp_path):
    path = checkpoints.task_path(copy, 2)
    path.write_bytes(path.read_bytes()[:1000])
    assert f"{path} is damaged" in failed("--eval", "--output_dir", copy, *HERE)
    path.unlink()
    assert "lacks task2_checkpoint.pth" in failed("--eval", "--output_dir", copy, *HERE)
    assert read(copy / "eval_results.json")["batch"]["accuracy_matrix"][0][0] is not None
    state = copy / "checkpoint" / "last.pth"
    out = failed("--eval", "--checkpoint", state, *HERE)
    assert f"{state} is the state of a run, for --resume: give a checkpoint of a task" in out
    assert str(checkpoints.task_path(copy, 1)) in out
    (tmp_path / "empty").mkdir()
    assert "finds no checkpoint" in rejected("--eval", "--output_dir", tmp_path / "empty")
    (tmp_path / "seeds" / "seed7" / "checkpoint").mkdir(parents=True)
    err = rejected("--eval", "--output_dir", tmp_path / "seeds")
    assert f"such as {tmp_path / 'seeds' / 'seed7'}\n" in err


def test_eval_rejects_flags_that_contradict_the_checkpoint_or_train(trained):
    def said(*flags):
        return rejected("--eval", *flags, "--output_dir", trained.folder)

    text = said("--size", "9", "--head_type", "token")
    assert "--size 9 contradicts the checkpoint, which has 4" in text
    assert "--head_type token contradicts" in text
    assert "--prompt_pool false contradicts the checkpoint" in said("linear_probe")
    assert "--speed_test and --eval are two commands" in said("--speed_test")
    assert "--resume and --eval are two commands" in said("--resume", "auto")


# Checkpoints of the original

#: Settings that the original's Namespace shares with ours.
SHARED_SETTINGS = (
    "model input_size num_tasks size length top_k shuffle seed batch_size dataset prompt_pool "
    "prompt_key head_type freeze embedding_key batchwise_prompt epochs opt"
).split()

#: Settings of the machine it ran on, which must not matter.
ELSEWHERE = {
    "data_path": "/gone", "output_dir": "/gone", "device": "cuda", "gpu": 0, "rank": 0,
    "world_size": 8, "distributed": True, "num_workers": 16, "pretrained": True, "lr": 0.1,
    "unscale_lr": True, "nb_classes": 4,
}  # fmt: skip


@pytest.fixture
def original(trained, tmp_path):
    """Writes the checkpoints of the run as l2p-pytorch does; then evaluates with flags."""
    config = trained.results["config"]

    def write(**changes):
        torch.manual_seed(config["seed"])
        vit = create_model(
            config["model"], num_classes=0, img_size=config["input_size"], **config["model_kwargs"]
        )
        settings = {name: config[name] for name in SHARED_SETTINGS} | ELSEWHERE | changes
        for number in (1, 2):
            state = {**vit.state_dict(), **trained.checkpoint(number).model}
            row, rest = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
            state["pos_embed"] = torch.cat([row, row.expand(-1, 4, -1), rest], 1)
            path = checkpoints.task_path(tmp_path, number)
            path.parent.mkdir(parents=True, exist_ok=True)
            args = argparse.Namespace(**settings)
            torch.save({"model": state, "optimizer": {}, "epoch": 1, "args": args}, path)

        pairs = [f"{name}={value}" for name, value in config["model_kwargs"].items()]
        needed = ["--model-kwargs", *pairs, "--data-path", config["data_path"]]
        return ["--eval", "--output_dir", tmp_path, *HERE, *needed, "--vote_ties", "lowest"]

    return write


def test_original_checkpoints_evaluate_to_the_same_numbers_in_any_batches(
    original, trained, tmp_path
):
    """`--global_pool avg` is ignored there; other differences are logged."""
    stored, otherwise = trained.results, {"global_pool": "avg", "use_prompt_mask": True}
    for changes, more in (({}, ()), (otherwise, ("--batch-size", "8"))):
        code, out, err = typed(*original(**changes), *more)
        assert (code, "with --use_prompt_mask it " in out + err) == (0, bool(changes))
        found = read(tmp_path / "eval_results.json")
        assert found["config"]["vote_group_size"] == 4
        for name in (*SELECTIONS, "class_order"):
            assert found[name] == stored[name]
        assert found["backbone"]["source"] == "task2_checkpoint.pth"
        assert found["backbone"]["sha256"] == stored["backbone"]["sha256"]


def test_original_checkpoints_that_bring_other_networks_get_queries_of_their_own(
    original, tmp_path
):
    """The second checkpoint alone gives what it gives behind the first."""
    command = original()
    path = checkpoints.task_path(tmp_path, 1)
    content = torch.load(path, weights_only=False)
    content["model"]["blocks.0.attn.qkv.weight"] *= -3
    torch.save(content, path)
    assert typed(*command)[0] == 0
    both = read(tmp_path / "eval_results.json")
    path.unlink()
    failed(*command)  # a column is missing
    alone = read(tmp_path / "eval_results.json")
    of_second = [usage for usage in both["prompt_usage"] if usage["after_task"] == 2]
    assert of_second == alone["prompt_usage"]
    assert both["backbone"]["sha256"] == alone["backbone"]["sha256"]
    assert "does not fit the model" in failed(*original(length=3))


def test_original_checkpoint_of_an_unfrozen_run_keeps_the_identity_of_the_query(
    original, trained, tmp_path
):
    command, seed = original(freeze=[]), trained.results["config"]["seed"]
    for amp in (None, "bf16"):
        flags = ["--pretrained", "false", "--seed", seed, "--amp", amp or "none"]
        assert typed(*command, *flags)[0] == 0
        found = read(tmp_path / "eval_results.json")
        assert found["backbone"]["sha256"] == trained.results["backbone"]["sha256"]
        assert found["numerics"]["amp"] == amp


# Throughput


def test_speed_test_reports_and_appends(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)  # whose generators are not saved
    for data in ([], ["--data-path", "nowhere"]):
        assert typed(*tiny, *data, "--speed_test_only", "--output_dir", tmp_path)[0] == 0
    text = (tmp_path / "speed_macs.txt").read_text()
    for piece in "inference_speed: |training_speed: |GMACs: |params: |peak memory: ".split("|"):
        assert text.count(piece) == 2, piece
    assert " images/s" in text
    assert not (tmp_path / "results.json").exists()


def test_speed_test_leaves_the_run_and_its_counts_unchanged(train):
    flags = "--diversify frequency --epochs 1"
    measured = train(f"{flags} --speed_test", to="measured").model
    assert not differing(train(flags).model, measured)


@pytest.mark.slow
def test_speed_test_measures_compiled_passes(tiny, tmp_path):
    torch._dynamo.reset()
    flags = "--compile --amp bf16 --batch-size 1 --vote_group_size 1 --speed_test_only"
    assert typed(*tiny, *flags.split(), "--output_dir", tmp_path)[0] == 0
    assert "GMACs: " in (tmp_path / "speed_macs.txt").read_text()


# What can be chosen


def test_list_models_names_what_takes_prompts_and_the_weights_of_timm():
    code, out, err = typed("--list_models", "*_base_patch16_dinov3", "beit3_*", "resnet*")
    lines = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert lines.pop("vit_base_patch16_dinov3") == "lvd1689m"
    assert lines["beit3_giant_patch14_224"] == "(no weights)"
    assert all(name.startswith("beit3_") for name in lines)
    every = {line.split()[0] for line in typed("--list_models")[1].splitlines()}
    assert every > {*lines, "vit_base_patch16_224", "eva02_tiny_patch14_224"}
    assert "--list_models resnet* matches no model: give" in rejected("--list_models", "resnet*")


# What is rejected

WRONG_AT_ONCE = """
--top_k 12 --num_tasks 7 --input-size 225 --head_type foo --data-path /nowhere --bogus --size ten
--opt adamm --freeze blocks --smoothing 1.5 --lr -1 --predefined_key x --sched wave --epochs 0
"""
PROBLEMS = """
--top_k 12 exceeds --size 10
100 classes cannot be split evenly over --num_tasks 7
--input-size 225 is not divisible by the patch size 16: use 224 or 240
--head_type foo is unknown: choose one of token, prompt, token+prompt, gap
--data-path /nowhere does not exist
--bogus is no option
--size ten: 'ten' is not a whole number
--opt adamm is unknown to timm
--smoothing 1.5: must be in [0, 1)
--lr -1: must be above 0
--predefined_key is no option: the original does nothing with it
--sched wave is unknown
--epochs 0: must be at least 1
"""
WRONG = """
--freeze blocs -> --freeze blocs matches no parameter
--model vit_tny_patch16_224 -> did you mean vit_tiny_patch16_224
--model resnet18 -> takes no prompts: it is of timm's resnet
--model vit_base_patch16_siglip_224 --head_type token -> has none: use --head_type prompt or gap
--model-kwargs bogus=1 -> bogus
--model-kwargs depth=1 act_layer=glu -> act_layer is 'glu': must be one of gelu,
--model-kwargs embed_dim=65536 mlp_ratio=64 depth=1 num_heads=2 -> GB of memory: give smaller ones
--model local-dir:weights -> is no model of timm
--no-prompt_pool -> pools prompt tokens, but --prompt_pool is off
--shared_prompt_key --no-prompt_key -> --shared_prompt_key needs --prompt_key: leave it on
--diversify mask --no-prompt_pool --head_type token -> --diversify needs --prompt_pool: leave
--pretrained gone.npz -> neither true, false, nor a file that exists
--num_tasks 20 --classes_per_task 10 -> are 200 classes, more than the 100: give
--first_task_classes 50 --classes_per_task 15 -> are 60 classes, more than the 50 left by
--class_order gone.txt -> there is no such file
--opt adahessian -> needs second derivatives
--opt-betas 0.9 -> --opt-betas 0.9: --opt adam takes 2
--opt sgd --opt-betas 0.9 0.99 -> has none
--sched cosine -> --warmup-epochs 5 leaves nothing of --epochs 5
--lr-noise 0.1 0.9 -> --lr-noise needs --sched other than constant
--freeze blocks patch_embed cls_token norm pos_embed prompt head -> leaves nothing to train
--eval --speed_test -> finds no checkpoint
--dry_run --speed_test -> --speed_test and --dry_run are two commands
--seeds 1 --output_dir= -> --seeds needs --output_dir: give the folder
--seeds 1 1 -> --seeds 1 1: seed 1 is given twice, give each once
--seeds 1 --seed 2 -> --seed and --seeds are two ways to say one thing
--seeds 1 --resume . -> is one run's state
--resume auto --output_dir= -> looks for the state in --output_dir, which is empty
--resume nowhere.pth -> --resume nowhere.pth: neither auto nor a state of a run that exists
--output_dir /proc/version -> is a file or a link to nothing, not a folder
--checkpoint x.pth -> --checkpoint needs --eval: give it too
--resume auto --save_every nan -> --save_every nan: must be above 0
--test_cache -1 -> --test_cache -1: must be at least 0 and at most
--dataset ImageFolder -> train
--dataset CIFAR11 --scenario gaussian -> --dataset CIFAR11 is unknown: choose one of
--device cuda -> --device cuda: torch finds no CUDA device
--tf32 -> --tf32 is for CUDA, and the run would take place on the CPU: leave it out
--data_on_device true --reprob 0.3 -> --data_on_device true: --reprob 0.3 needs
--data_on_device true --dataset Flowers102 -> the images of Flowers102 are files, opened when
--eval_batch_size 7 -> --eval_batch_size 7: a vote group, 16 images, must be in one batch
--grad_checkpointing --no-prompt_pool --head_type token -> only the head trains
--compile -> --compile needs a C++ compiler: install one of g++
"""


def test_everything_wrong_is_told_at_once():
    err = rejected(*WRONG_AT_ONCE.split())
    for problem in PROBLEMS.strip().splitlines():
        assert problem in err, problem


def test_wrong_command_line_is_rejected_with_the_reason(tmp_path, no_cuda, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where no run has left its files
    monkeypatch.setattr("shutil.which", lambda name: None)  # no compiler
    for line in WRONG.strip().splitlines():
        flags, message = line.split(" -> ")
        words = f"{SHALLOW} --no-plots {flags}".split()
        assert message in rejected(*words, "--data-path", tmp_path), line
    assert " (the default) does not exist: name the folder" in rejected("cifar100_l2p")
    given = rejected("cifar100_l2p", "--data-path", "/nowhere")
    assert "/nowhere does not exist: name the folder" in given
    small = rejected("small_datasets_l2p", "--data-path", "/nowhere")
    assert "KMNIST,SVHN, or an empty one to download it into" in small
    assert list(tmp_path.iterdir()) == []


def test_failing_start_leaves_an_earlier_run_alone(tiny, copy, tmp_path):
    for wrong in (("--pretrained", __file__), ("--data-path", tmp_path)):
        rejected(*tiny, *wrong, "--output_dir", copy)
    assert (copy / "results.json").exists()
    assert not (copy / "previous").exists()


# The original's own data set


def test_split_cifar100_is_downloaded_trained_and_evaluated(cifar, tmp_path):
    """The original's command with a smaller ViT of the same name, on a tiny CIFAR-100."""
    (tmp_path / "data").mkdir()
    flags = (
        "--model vit_base_patch16_224 --model-kwargs depth=1 embed_dim=24 num_heads=2 "
        "patch_size=16 --input-size 32 --pretrained false --batch-size 16 --epochs 1 --no-plots "
        f"--data-path {tmp_path / 'data'} --output_dir {tmp_path / 'out'}"
    ).split()
    code, out, _ = typed(*flags, *HERE)
    assert code == 0
    assert out.count("means vit_base_patch16_224.orig_in21k") == 1
    results = Run(tmp_path / "out").results
    order = list(range(100))
    random.Random(42).shuffle(order)
    assert results["class_order"] == [order[i : i + 10] for i in range(0, 100, 10)]
    assert len(results["batch"]["accuracy_matrix"]) == 10
    again, _ = evaluate(tmp_path / "out", *flags)
    assert again["batch"] == results["batch"]
