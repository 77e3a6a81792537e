"""The command line as a person types it, on a small image folder and a tiny random ViT."""

import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from timm.models import create_model

import main
from experiment import checkpoints, resume
from helpers.tiny_flags import TINY
from reports import draw, metrics
from reports.metrics import SELECTIONS

pytestmark = pytest.mark.usefixtures("restore_logging")

MAIN = Path(main.__file__)


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """The folder of a finished run and its command line."""
    output = tmp_path_factory.mktemp("run")
    argv = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder)]
    assert main.main([*argv, "--plots", "--output_dir", str(output)]) == 0
    return output, argv


def read(path):
    return json.loads(path.read_text())


def run(argv, output, *more):
    return main.main([*argv, "--output_dir", str(output), *more])


# A run and what it leaves behind


def test_run_leaves_its_files(trained):
    output, _ = trained
    names = {str(p.relative_to(output)) for p in output.rglob("*") if p.is_file()}
    assert {name for name in names if name.startswith("plots/")} == {
        f"plots/{name}.{ending}" for name in draw.RUN_FIGURES for ending in ("png", "svg")
    }
    assert {name for name in names if not name.startswith("plots/")} == {
        "config.yaml",
        "log.txt",
        "log_stats.txt",
        "results.json",
        "checkpoint/last.pth",
        "checkpoint/last_but_one.pth",
        "checkpoint/task1_checkpoint.pth",
        "checkpoint/task2_checkpoint.pth",
    }


def test_results_follow_the_interface(trained):
    results = read(trained[0] / "results.json")
    for name in SELECTIONS:
        matrix = metrics.from_lists(results[name]["accuracy_matrix"])
        assert matrix.shape == (2, 2)
        assert np.isnan(matrix).tolist() == [[False, False], [True, False]]
        expected = metrics.summarize(matrix, 1)
        assert {k: v for k, v in results[name].items() if k != "accuracy_matrix"} == expected
        assert set(expected) >= {
            "average_accuracy", "forgetting", "forgetting_literature", "backward_transfer",
            "learning_accuracy", "average_incremental_accuracy",
        }  # fmt: skip
    assert sorted(c for task in results["class_order"] for c in task) == [0, 1, 2, 3]
    assert set(results["backbone"]) == {"name", "source", "sha256"}
    assert results["seed"] == 42
    assert results["config"]["top_k"] == 2
    assert results["versions"]["torch"] == torch.__version__.split("+")[0]
    assert [t["task"] for t in results["timing"]] == [1, 2]
    usage = results["prompt_usage"]
    assert [(u["after_task"], u["test_set"]) for u in usage] == [(1, 0), (2, 0), (2, 1)]
    for entry in usage:
        assert sum(entry["batch"]) == sum(entry["instance"]) == 2 * 2 * 3  # K * classes * images
        assert -1 <= entry["mean_similarity"] <= 1
        assert len(entry["key_similarity"]) == 4
        best = sum(sorted(entry["key_similarity"])[-2:]) / 2
        assert best <= entry["mean_similarity"] + 1e-6  # each image selects its own two best


def test_results_tell_the_command_and_what_follows_from_it(trained):
    results = read(trained[0] / "results.json")
    assert results["command"]["configurations"] == []
    flags = results["command"]["flags"]
    assert (flags["size"], flags["lr"], flags["dataset"]) == (4, 0.5, "ImageFolder")
    assert "resume" not in flags
    model = checkpoints.load(checkpoints.task_path(trained[0], 2)).model
    digest = results["run"].pop("train_digest")
    assert (
        digest == resume._parse((trained[0] / "checkpoint/last.pth").read_bytes(), "").train_digest
    )
    assert results["run"] == {
        "processes": 1,
        "images_per_step": 4,
        "learning_rate": 0.5 * 4 / 256,
        "trained_parameters": sum(tensor.numel() for tensor in model.values()),
    }


def test_training_curve_has_every_epoch(trained):
    curve = read(trained[0] / "results.json")["training_curve"]
    assert [(point["task"], point["epoch"]) for point in curve] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    lines = [json.loads(line) for line in (trained[0] / "log_stats.txt").read_text().splitlines()]
    for last, line in zip(curve[1::2], lines, strict=True):
        assert last["Loss"] == line["train_Loss"]
        assert last["Acc@1"] == line["train_Acc@1"]
    assert curve[0]["Loss"] != curve[1]["Loss"]


def test_log_stats_has_a_line_per_task(trained):
    output, _ = trained
    lines = [json.loads(line) for line in (output / "log_stats.txt").read_text().splitlines()]
    results = read(output / "results.json")
    assert [line["task"] for line in lines] == [1, 2]
    for line in lines:
        assert {"train_Lr", "train_Loss", "train_Acc@1", "train_Acc@5"} <= set(line)
        assert {"test_Acc@1", "test_Acc@5", "test_Loss", "epoch"} <= set(line)
    assert lines[1]["average_Acc@1"] == pytest.approx(results["batch"]["average_accuracy"])
    assert lines[1]["forgetting"] == results["batch"]["forgetting"]
    assert lines[1]["instance_backward"] == results["instance"]["backward_transfer"]


def test_log_keeps_the_originals_lines(trained):
    text = (trained[0] / "log.txt").read_text()
    for piece in (
        "[Average accuracy till task1]\tAcc@1: ",
        "[Average accuracy till task2]\tAcc@1: ",
        "\tForgetting: ",
        "\tBackward: ",
        "Train: Epoch[1/2]",
        "Test: [Task 2]",
        "* Acc@1 ",
        "Total training time: ",
        "number of params: ",
        "average accuracy",
    ):
        assert piece in text, piece


def test_config_runs_again_to_the_same_results(trained, tmp_path):
    output, _ = trained
    assert main.main([str(output / "config.yaml"), "--output_dir", str(tmp_path)]) == 0
    first, second = read(output / "results.json"), read(tmp_path / "results.json")
    for key in (*SELECTIONS, "class_order", "backbone", "prompt_usage"):
        assert first[key] == second[key]
    a, b = (checkpoints.load(checkpoints.task_path(p, 2)).model for p in (output, tmp_path))
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_second_run_moves_the_first_aside(trained, tmp_path):
    _, argv = trained
    for _ in range(2):
        assert run(argv, tmp_path, "--epochs", "1") == 0
    kept = list((tmp_path / "previous").glob("*/results.json"))
    assert len(kept) == 1
    assert (kept[0].parent / "checkpoint" / "task2_checkpoint.pth").exists()


def test_empty_output_dir_writes_nothing(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(trained[1], "") == 0
    assert list(tmp_path.iterdir()) == []


def test_run_in_another_folder_finds_shipped_weights_and_writes_there(
    tmp_path, monkeypatch, capsys
):
    """Relative paths of a command line are those of the folder in which it was typed."""
    monkeypatch.chdir(tmp_path)
    flags = ["--num_tasks", "2", "--classes_per_task", "1", "--epochs", "1", "--no-plots"]
    assert run(["digits_l2p", "--device", "cpu", *flags], "out") == 0
    assert "Written to out:\n" in capsys.readouterr().out
    assert read(tmp_path / "out" / "results.json")["backbone"]["source"] == "glyph_vit.safetensors"
    assert main.main(["--eval", "--output_dir", "out"]) == 0
    assert capsys.readouterr().out.count("Reproduces the stored accuracies") == 4
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_seed_changes_order_and_result(trained, tmp_path):
    output, argv = trained
    assert run(argv, tmp_path, "--seed", "7") == 0
    first, second = read(output / "results.json"), read(tmp_path / "results.json")
    assert first["class_order"] != second["class_order"]
    assert first["backbone"]["sha256"] != second["backbone"]["sha256"]  # random weights


# Options that change the course of a run


def final(argv, output, *more):
    """Tensors of the last checkpoint of a run with further flags."""
    assert run(argv, output, *more) == 0
    return checkpoints.load(checkpoints.task_path(output, 2)).model


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags",
    [
        ["--train_mask", "false"],
        ["--no-reinit_optimizer"],
        ["--pull_constraint_coeff", "5"],
        ["--use_prompt_mask"],
        ["--initializer", "official"],
        ["--prompt_key_init", "zero"],
        ["--embedding_key", "mean_max"],
        ["--head_type", "token"],
        ["--head_type", "gap"],
        ["--head_init", "zero"],
        ["--global_pool", "avg"],
        ["--opt", "sgd", "--momentum", "0.5"],
        ["--clip-grad", "0.01"],
        ["--weight-decay", "0.1", "--opt", "adamw"],
        ["--opt-eps", "0.1"],
        ["--opt-betas", "0.5", "0.9"],
        ["--smoothing", "0.3"],
        ["--lr", "0.3"],
        ["--lr_scale", "none"],
        ["--sched", "cosine", "--warmup-epochs", "1"],
        ["--scale", "0.9", "1.0"],
        ["--ratio", "1", "1"],
        ["--hflip", "0"],
        ["--train-interpolation", "nearest"],
        ["--color-jitter", "0.4"],
        ["--aa", "rand-m9-mstd0.5-inc1"],
        ["--reprob", "1.0", "--remode", "const"],
        ["--norm", "half"],
        ["--drop", "0.5"],
        ["--drop-path", "0.5"],
        ["--no-prompt_key"],
        ["--no-shuffle"],
        ["--epochs", "1"],
        ["--batch-size", "2"],
        ["--length", "1"],
        ["--top_k", "1"],
    ],
    ids=" ".join,
)
def test_option_changes_what_is_learned(trained, tmp_path, flags):
    output, argv = trained
    plain = checkpoints.load(checkpoints.task_path(output, 2)).model
    other = final(argv, tmp_path, *flags)
    shared = [k for k in plain if k in other and plain[k].shape == other[k].shape]
    assert any(not torch.equal(plain[k], other[k]) for k in shared)


@pytest.mark.parametrize("flags", [["--batchwise_prompt", "false"], ["--vote_group_size", "2"]])
def test_votes_change_what_is_learned(trained, tmp_path, flags):
    """With queries that differ from class to class, so that images disagree."""
    varied = [*trained[1], "--embedding_key", "max", "--no-shuffle", "--size", "8"]
    plain, other = final(varied, tmp_path / "a"), final(varied, tmp_path / "b", *flags)
    assert any(not torch.equal(plain[k], other[k]) for k in plain)


@pytest.mark.parametrize("flag", ["--shared_prompt_pool", "--shared_prompt_key"])
def test_shared_pool_and_key_change_what_is_learned(trained, tmp_path, flag):
    _, argv = trained
    plain = final(argv, tmp_path / "a", "--use_prompt_mask")
    other = final(argv, tmp_path / "b", "--use_prompt_mask", flag)
    name = "prompt.prompt" if flag.endswith("pool") else "prompt.prompt_key"
    assert not torch.equal(plain[name], other[name])


def test_task_inc_changes_accuracies_only(trained, tmp_path):
    output, argv = trained
    plain = checkpoints.load(checkpoints.task_path(output, 2))
    other = final(argv, tmp_path, "--task_inc")
    assert all(torch.equal(plain.model[k], other[k]) for k in other)
    accuracy = read(tmp_path / "results.json")["batch"]["average_accuracy"]
    assert accuracy >= read(output / "results.json")["batch"]["average_accuracy"]
    assert accuracy > 0


def test_pull_constraint_off_leaves_keys_as_they_were(trained, tmp_path):
    _, argv = trained
    assert run(argv, tmp_path, "--no-pull_constraint") == 0
    keys = [
        checkpoints.load(checkpoints.task_path(tmp_path, n)).model["prompt.prompt_key"]
        for n in (1, 2)
    ]
    assert torch.equal(*keys)


def test_linear_probe_trains_the_head_alone(trained, tmp_path):
    state = final(trained[1], tmp_path, "linear_probe")
    assert set(state) == {"head.weight", "head.bias"}
    results = read(tmp_path / "results.json")
    assert results["batch"] == results["instance"]
    assert results["prompt_usage"] == []


def test_unfrozen_backbone_is_saved_and_evaluates_again(trained, tmp_path):
    state = final(trained[1], tmp_path, "--freeze", "patch_embed", "--lr", "0.01")
    assert "blocks.0.attn.qkv.weight" in state
    assert "pos_embed_prompt" in state
    assert "patch_embed.proj.weight" not in state
    assert main.main(["--eval", "--output_dir", str(tmp_path)]) == 0
    before, after = (read(tmp_path / f"{n}.json") for n in ("results", "eval_results"))
    assert before["batch"] == after["batch"]
    assert before["instance"] == after["instance"]


def test_class_order_file_is_followed(trained, tmp_path):
    order = tmp_path / "order.txt"
    order.write_text("d b\nc a\n")
    assert run(trained[1], tmp_path / "out", "--class_order", str(order)) == 0
    assert read(tmp_path / "out" / "results.json")["class_order"] == [[3, 1], [2, 0]]


def test_classes_per_task_leaves_the_others_out(trained, tmp_path):
    flags = ["--classes_per_task", "1", "--no-shuffle"]
    assert run(trained[1], tmp_path, *flags) == 0
    assert read(tmp_path / "results.json")["class_order"] == [[0], [1]]


@pytest.mark.slow
def test_run_goes_on_when_nobody_reads_any_more(image_folder, tmp_path):
    """As `python main.py ... | head -1`."""
    argv = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder)]
    command = [sys.executable, str(MAIN), *argv, "--output_dir", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.readline()
        process.stdout.close()
        error = process.stderr.read().decode()
    assert (process.returncode, error) == (0, "")
    assert (tmp_path / "out" / "results.json").exists()
    assert "Total training time" in (tmp_path / "out" / "log.txt").read_text()


def test_second_evaluation_keeps_the_first(trained, tmp_path):
    output = copy_run(trained, tmp_path)
    assert main.main(["--eval", "--output_dir", str(output)]) == 0
    first = (output / "eval_results.json").read_bytes()
    assert main.main(["--eval", "--task_inc", "--output_dir", str(output)]) == 0
    assert (output / "eval_results_before.json").read_bytes() == first
    assert (output / "eval_results.json").read_bytes() != first


def test_checkpoint_of_a_task_that_was_not_evaluated_evaluates(trained, image_folder, tmp_path):
    argv = [*TINY, "--dataset", "ImageFolder", "--data-path", str(image_folder)]
    output = tmp_path / "out"
    assert main.main([*argv, "--eval_every", "2", "--output_dir", str(output)]) == 0
    (path,) = (output / "checkpoint").glob("task*")
    assert path.name == "task2_checkpoint.pth"
    whole, _ = trained
    content = torch.load(whole / "checkpoint" / "task1_checkpoint.pth", weights_only=True)
    content["config"]["eval_every"] = 2
    target = output / "checkpoint" / "task1_checkpoint.pth"
    target.write_bytes(checkpoints.sealed(content))
    assert main.main(["--eval", "--checkpoint", str(target)]) == 0
    found = read(output / "eval_results_task1_checkpoint.json")["batch"]["accuracy_matrix"]
    assert found[0][0] == read(whole / "results.json")["batch"]["accuracy_matrix"][0][0]


def test_non_finite_loss_saves_and_names_the_place(trained, tmp_path, caplog):
    code = run(trained[1], tmp_path, "--lr", "1e30", "--lr_scale", "none", "--clip-grad", "none")
    assert code == 1
    text = (tmp_path / "log.txt").read_text()
    assert "loss is nan in task 1, epoch 1, step 2" in text or "loss is inf in task 1" in text
    saved = checkpoints.load(tmp_path / "checkpoint" / "last_finite_checkpoint.pth")
    assert set(saved.model) == {"prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"}


# Evaluation of checkpoints


def test_eval_needs_nothing_but_the_folder(trained, capsys):
    output, _ = trained
    before = (output / "results.json").read_bytes()
    assert main.main(["--eval", "--output_dir", str(output)]) == 0
    results, again = read(output / "results.json"), read(output / "eval_results.json")
    for name in SELECTIONS:
        assert results[name] == again[name]
    assert (output / "results.json").read_bytes() == before
    text = capsys.readouterr().out
    assert text.count("Reproduces the stored accuracies") == 4
    (output / "eval_results.json").unlink()


def test_eval_of_one_checkpoint(trained, tmp_path):
    output, _ = trained
    path = checkpoints.task_path(output, 2)
    assert main.main(["--eval", "--checkpoint", str(path), "--output_dir", str(tmp_path)]) == 0
    results = read(tmp_path / "eval_results_task2_checkpoint.json")
    assert results["batch"]["forgetting"] is None  # the column before was not evaluated
    matrix = results["batch"]["accuracy_matrix"]
    stored = read(output / "results.json")["batch"]["accuracy_matrix"]
    assert [row[1] for row in matrix] == [row[1] for row in stored]
    assert [row[0] for row in matrix] == [None, None]


def test_eval_of_one_checkpoint_writes_into_its_run(trained, tmp_path):
    output = copy_run(trained, tmp_path)
    assert main.main(["--eval", "--checkpoint", str(checkpoints.task_path(output, 1))]) == 0
    matrix = read(output / "eval_results_task1_checkpoint.json")["batch"]["accuracy_matrix"]
    assert [row[1] for row in matrix] == [None, None]


def test_eval_of_a_checkpoint_elsewhere_writes_beside_it(trained, tmp_path):
    path = tmp_path / "kept.pth"
    shutil.copy(checkpoints.task_path(trained[0], 1), path)
    assert main.main(["--eval", "--checkpoint", str(path)]) == 0
    assert (tmp_path / "eval_results_kept.json").exists()


def copy_run(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_eval_says_which_checkpoint_is_missing(trained, tmp_path, capsys):
    output = copy_run(trained, tmp_path)
    checkpoints.task_path(output, 2).unlink()
    assert main.main(["--eval", "--output_dir", str(output)]) == 1
    assert "lacks task2_checkpoint.pth" in capsys.readouterr().out
    assert read(output / "eval_results.json")["batch"]["accuracy_matrix"][0][0] is not None


def test_eval_without_checkpoints_is_refused(tmp_path, capsys):
    assert main.main(["--eval", "--output_dir", str(tmp_path)]) == 2
    assert "finds no checkpoint" in capsys.readouterr().err
    (tmp_path / "seed7" / "checkpoint").mkdir(parents=True)
    assert main.main(["--eval", "--output_dir", str(tmp_path)]) == 2
    assert f"such as {tmp_path / 'seed7'}\n" in capsys.readouterr().err


def test_eval_of_damaged_checkpoint_names_the_file(trained, tmp_path, capsys):
    output = copy_run(trained, tmp_path)
    path = checkpoints.task_path(output, 2)
    path.write_bytes(path.read_bytes()[:1000])
    assert main.main(["--eval", "--output_dir", str(output)]) == 1
    assert f"{path} is damaged" in capsys.readouterr().out


def test_eval_with_other_shapes_names_file_key_and_shapes(trained, tmp_path, capsys):
    output = copy_run(trained, tmp_path)
    path = checkpoints.task_path(output, 2)
    content = torch.load(path, weights_only=True)
    content["model"]["head.weight"] = torch.zeros(7, 16)
    path.write_bytes(checkpoints.sealed(content))
    assert main.main(["--eval", "--output_dir", str(output)]) == 1
    text = capsys.readouterr().out
    assert f"{path} does not fit the model: head.weight is (7, 16), expected (4, 16)" in text


def test_eval_with_another_backbone_is_refused(trained, tmp_path, capsys):
    output = copy_run(trained, tmp_path)
    edit_checkpoint(output, backbone={"name": "vit", "source": "timm", "sha256": "0" * 64})
    assert main.main(["--eval", "--output_dir", str(output)]) == 1
    assert "was trained on the backbone vit (timm" in capsys.readouterr().out


def edit_checkpoint(output, number=1, **changes):
    path = checkpoints.task_path(output, number)
    content = {**torch.load(path, weights_only=True), **changes}
    path.write_bytes(checkpoints.sealed(content))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {}}, "the entry config is {}, expected settings by name"),
        ({"config": {"top_k": "abc"}}, "--top_k abc: 'abc' is not a whole number"),
        ({"task": "2"}, "the entry task is '2', expected a task number"),
        ({"backbone": {}}, "the entry backbone is {}"),
        ({"accuracy": {"batch": [[1.0], [1.0, 2.0]]}}, "the entry accuracy is"),
        ({"class_order": [[0, 1], [1, 2]]}, "gives a class to more than one task"),
        ({"class_order": [[0, 0], [1, 2]]}, "the entry class_order is"),
        ({"class_names": ["a", "b", "c", "e"]}, "expected the class 'e', found 'd'"),
    ],
    ids=str,
)
def test_eval_names_what_is_wrong_with_a_checkpoint(trained, tmp_path, capsys, change, message):
    output = copy_run(trained, tmp_path)
    edit_checkpoint(output, **change)
    assert main.main(["--eval", "--output_dir", str(output)]) == 1
    assert message in capsys.readouterr().out


def test_eval_on_other_data_is_refused(trained, tmp_path, image_folder, capsys):
    """The same classes under other names would be scored as the wrong ones."""
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    for split in ("train", "val"):
        (data / split / "a").rename(data / split / "z")
    output = copy_run(trained, tmp_path)
    assert main.main(["--eval", "--output_dir", str(output), "--data-path", str(data)]) == 1
    assert "was trained on other data" in capsys.readouterr().out


def test_eval_refuses_flags_that_contradict_the_checkpoint(trained, capsys):
    argv = ["--eval", "--output_dir", str(trained[0]), "--size", "9", "--head_type", "token"]
    assert main.main(argv) == 2
    text = capsys.readouterr().err
    assert "--size 9 contradicts the checkpoint, which has 4" in text
    assert "--head_type token contradicts" in text


def test_eval_with_more_workers_and_other_batches_is_the_same(trained, tmp_path):
    output = copy_run(trained, tmp_path)
    flags = ["--batch-size", "8", "--num_workers", "2"]
    assert main.main(["--eval", "--output_dir", str(output), *flags]) == 0
    assert read(output / "eval_results.json")["batch"] == read(output / "results.json")["batch"]


# Checkpoints of the original


#: Settings that the original's Namespace shares with ours.
SHARED_SETTINGS = (
    "model", "input_size", "num_tasks", "size", "length", "top_k", "shuffle", "seed", "batch_size",
    "dataset", "prompt_pool", "prompt_key", "head_type", "freeze", "embedding_key",
    "batchwise_prompt", "epochs", "opt",
)  # fmt: skip

#: Settings of the machine it ran on, which must not matter.
ELSEWHERE = {
    "data_path": "/gone", "output_dir": "/gone", "device": "cuda", "gpu": 0, "rank": 0,
    "world_size": 8, "distributed": True, "num_workers": 16, "pretrained": True, "lr": 0.1,
    "unscale_lr": True, "nb_classes": 4,
}  # fmt: skip


def write_original(trained, folder, **changes):
    """Rewrites the checkpoints of a run as l2p-pytorch writes them."""
    output, _ = trained
    config = read(output / "results.json")["config"]
    torch.manual_seed(config["seed"])
    vit = create_model(
        config["model"], num_classes=0, img_size=config["input_size"], **config["model_kwargs"]
    )
    settings = {name: config[name] for name in SHARED_SETTINGS} | ELSEWHERE | changes
    for number in (1, 2):
        own = checkpoints.load(checkpoints.task_path(output, number)).model
        state = {**vit.state_dict(), **own}
        row = state["pos_embed"][:, :1]
        state["pos_embed"] = torch.cat([row, row.expand(-1, 4, -1), state["pos_embed"][:, 1:]], 1)
        args = argparse.Namespace(**settings)
        path = checkpoints.task_path(folder, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"model": state, "optimizer": {}, "epoch": 1, "args": args}, path)


def eval_original(trained, folder, *more):
    config = read(trained[0] / "results.json")["config"]
    kwargs = [f"{k}={v}" for k, v in config["model_kwargs"].items()]
    return main.main([
        "--eval", "--output_dir", str(folder), "--data-path", config["data_path"],
        "--model-kwargs", *kwargs, "--num_workers", "0", "--device", "cpu",
        "--vote_ties", "lowest", *more,
    ])  # fmt: skip


def test_original_checkpoints_evaluate_to_the_same_numbers(trained, tmp_path):
    write_original(trained, tmp_path)
    assert eval_original(trained, tmp_path) == 0
    found, stored = read(tmp_path / "eval_results.json"), read(trained[0] / "results.json")
    for name in SELECTIONS:
        assert found[name] == stored[name]
    assert found["class_order"] == stored["class_order"]
    assert found["backbone"]["source"] == "task2_checkpoint.pth"
    assert found["backbone"]["sha256"] == stored["backbone"]["sha256"]


def test_original_checkpoints_keep_their_votes_in_other_batches(trained, tmp_path):
    write_original(trained, tmp_path)
    assert eval_original(trained, tmp_path, "--batch-size", "8") == 0
    found = read(tmp_path / "eval_results.json")
    assert found["config"]["vote_group_size"] == 4
    assert found["batch"] == read(trained[0] / "results.json")["batch"]


def test_original_checkpoints_that_bring_other_networks_get_queries_of_their_own(
    trained, tmp_path, caplog
):
    """The second checkpoint alone gives what it gives behind the first."""
    write_original(trained, tmp_path)
    path = checkpoints.task_path(tmp_path, 1)
    content = torch.load(path, weights_only=False)
    content["model"]["blocks.0.attn.qkv.weight"] *= -3
    torch.save(content, path)
    assert eval_original(trained, tmp_path) == 0
    both = read(tmp_path / "eval_results.json")
    path.unlink()
    eval_original(trained, tmp_path)
    alone = read(tmp_path / "eval_results.json")
    of_second = [usage for usage in both["prompt_usage"] if usage["after_task"] == 2]
    assert of_second == alone["prompt_usage"]
    assert both["backbone"]["sha256"] == alone["backbone"]["sha256"]


@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_original_checkpoint_of_an_unfrozen_run_keeps_the_identity_of_the_query(
    trained, tmp_path, amp
):
    write_original(trained, tmp_path, freeze=[])
    seed = str(read(trained[0] / "results.json")["config"]["seed"])
    assert (
        eval_original(trained, tmp_path, "--pretrained", "false", "--seed", seed, "--amp", amp) == 0
    )
    found, stored = read(tmp_path / "eval_results.json"), read(trained[0] / "results.json")
    assert found["backbone"]["sha256"] == stored["backbone"]["sha256"]
    assert found["numerics"]["amp"] == (None if amp == "none" else amp)


def test_original_checkpoint_with_another_width_is_named(trained, tmp_path, capsys):
    write_original(trained, tmp_path, length=3)
    assert eval_original(trained, tmp_path) == 1
    assert "does not fit the model" in capsys.readouterr().out


# Throughput


def test_speed_test_reports_and_appends(trained, tmp_path):
    _, argv = trained
    for _ in range(2):
        assert run(argv, tmp_path, "--speed_test_only") == 0
    text = (tmp_path / "speed_macs.txt").read_text()
    for piece in ("inference_speed: ", "training_speed: ", "GMACs: ", "params: ", "peak memory: "):
        assert text.count(piece) == 2, piece
    assert " images/s" in text
    assert not (tmp_path / "results.json").exists()


def test_speed_test_leaves_the_run_unchanged(trained, tmp_path):
    output, argv = trained
    other = final(argv, tmp_path, "--speed_test")
    plain = checkpoints.load(checkpoints.task_path(output, 2)).model
    assert all(torch.equal(plain[k], other[k]) for k in plain)


def test_speed_test_leaves_the_counts_of_the_penalty_unchanged(trained, tmp_path):
    _, argv = trained
    flags = ["--diversify", "frequency"]
    plain = final(argv, tmp_path / "plain", *flags)
    other = final(argv, tmp_path / "other", *flags, "--speed_test")
    assert all(torch.equal(plain[name], other[name]) for name in plain)


@pytest.mark.slow
def test_speed_test_measures_compiled_passes(trained, tmp_path):
    _, argv = trained
    torch._dynamo.reset()
    flags = ["--compile", "--amp", "bf16", "--batch-size", "1", "--vote_group_size", "1"]
    assert run(argv, tmp_path, *flags, "--speed_test_only") == 0
    assert "GMACs: " in (tmp_path / "speed_macs.txt").read_text()


# What is refused


def refused(argv, capsys):
    assert main.main(argv) == 2
    return capsys.readouterr().err


def test_everything_wrong_is_told_at_once(capsys, tmp_path):
    text = refused(
        ["--top_k", "12", "--num_tasks", "7", "--input-size", "225", "--head_type", "foo",
         "--data-path", str(tmp_path / "nowhere"), "--bogus", "--size", "ten", "--opt", "adamm",
         "--freeze", "blocks", "--smoothing", "1.5", "--lr", "-1", "--predefined_key", "x",
         "--sched", "wave", "--epochs", "0"],
        capsys,
    )  # fmt: skip
    for piece in (
        "--top_k 12 exceeds --size 10",
        "100 classes cannot be split evenly over --num_tasks 7",
        "--input-size 225 is not divisible by the patch size 16: use 224 or 240",
        "--head_type foo is unknown: choose one of token, prompt, token+prompt, gap",
        f"--data-path {tmp_path / 'nowhere'} does not exist",
        "--bogus is no option",
        "--size ten: 'ten' is not a whole number",
        "--opt adamm is unknown to timm",
        "--smoothing 1.5: must be in [0, 1)",
        "--lr -1: must be positive",
        "--predefined_key: the original accepts it and does nothing",
        "--sched wave is unknown",
        "--epochs 0: must be at least 1",
    ):
        assert piece in text, piece


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["nonsense"], "'nonsense' is neither a configuration nor the value of a flag"),
        (["--topk", "3"], "did you mean --top_k?"),
        (["--freeze", "blocs"], "--freeze blocs matches no parameter"),
        (["--model", "vit_nope"], "Unknown model"),
        (["--model", "vit_tny_patch16_224"], "did you mean vit_tiny_patch16_224"),
        (["--model", "resnet18"], "as a plain ViT"),
        (["--model-kwargs", "bogus=1"], "bogus"),
        (["--model-kwargs", "bogus"], "not of the form name=value"),
        (["--no-prompt_pool"], "pools prompt tokens, but --prompt_pool is off"),
        (
            ["--no-prompt_pool", "--head_type", "token", "--use_prompt_mask"],
            "needs the prompt pool",
        ),
        (["--use_prompt_mask", "--size", "20"], "--size 20 is too small, use at least 50"),
        (["--shared_prompt_key", "--no-prompt_key"], "needs keys of their own"),
        (["--pretrained", "gone.npz"], "neither true, false, nor a file that exists"),
        (["--vote_group_size", "5"], "does not divide --batch-size 16"),
        (["--num_tasks", "20", "--classes_per_task", "10"], "= 200 exceeds the 100 classes"),
        (["--dataset", "CIFAR1000"], "--dataset CIFAR1000 is unknown"),
        (["--class_order", "gone.txt"], "there is no such file"),
        (["--opt", "adahessian"], "needs second derivatives"),
        (["--opt-betas", "0.9"], "--opt adam --opt-betas 0.9: the optimizer rejects its settings"),
        (["--opt", "sgd", "--opt-betas", "0.9", "0.99"], "has none"),
        (["--weight-decay", "nan"], "must be a finite number that is not negative"),
        (["--seed", "99999999999999999999"], "must be in [0, 2^32)"),
        (["--sched", "cosine"], "--warmup-epochs 5 leaves nothing of --epochs 5"),
        (["--lr-noise", "0.1", "0.9"], "--lr-noise needs a schedule"),
        (
            [
                "--freeze",
                *["blocks", "patch_embed", "cls_token", "norm", "pos_embed", "prompt", "head"],
            ],
            "leaves nothing to train",
        ),
        (["--eval", "--speed_test"], "finds no checkpoint"),
        (["--output_dir", "/proc/version"], "is a file, not a folder"),
        (["--world_size", "4"], "the launcher started 1 processes"),
        (["--checkpoint", "x.pth"], "give --eval too"),
        (["--device", "gpu"], "--device gpu is unknown"),
        (["--train_mask", "maybe"], "--train_mask maybe: is not true or false"),
        (["--train_mask=maybe"], "--train_mask maybe: is not true or false"),
        (["--scale", "0.5", "0.1"], "--scale"),
        (["--clip-grad", "0"], "must be positive and finite (none: no limit)"),
        (["--dataset", "ImageFolder"], "train"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusal_says_what_and_why(flags, message, capsys, tmp_path):
    assert message in refused([*flags, "--data-path", str(tmp_path)], capsys)


def test_eval_with_speed_test_is_refused(trained, capsys):
    text = refused(["--eval", "--speed_test", "--output_dir", str(trained[0])], capsys)
    assert "--speed_test and --eval are two commands" in text


def test_eval_with_a_contradicting_configuration_is_refused(trained, capsys):
    text = refused(["--eval", "linear_probe", "--output_dir", str(trained[0])], capsys)
    assert "--prompt_pool false contradicts the checkpoint" in text


def test_failing_start_leaves_an_earlier_run_alone(trained, tmp_path):
    output = copy_run(trained, tmp_path)
    assert run(trained[1], output, "--pretrained", __file__) == 2
    assert run([*trained[1], "--data-path", str(tmp_path)], output) == 2
    assert (output / "results.json").exists()
    assert not (output / "previous").exists()


def test_exhausted_shared_pool_is_warned_of(trained, tmp_path, capsys):
    assert run(trained[1], tmp_path, "--shared_prompt_pool", "--size", "3") == 0
    assert "Task 2 shares no prompts with task 1" in capsys.readouterr().out


def test_cuda_without_cuda_is_refused(capsys, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    text = refused(["--device", "cuda", "--data-path", str(tmp_path)], capsys)
    assert "--device cuda: torch finds no CUDA device" in text


def test_damaged_image_ends_the_run_with_its_name(image_folder, trained, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(image_folder, data)
    path = next((data / "train" / "a").iterdir())
    path.write_bytes(path.read_bytes()[:60])
    argv = [str(data) if a == str(image_folder) else a for a in trained[1]]
    assert run(argv, tmp_path / "out", "--num_workers", "1") == 1
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1
    assert str(path) in lines[0]


def test_resolved_config_holds_the_flags(trained):
    config = yaml.safe_load((trained[0] / "config.yaml").read_text())
    assert config["vote_group_size"] is None  # follows --batch-size when run again
    assert read(trained[0] / "results.json")["config"]["vote_group_size"] == 4
    assert config["model_kwargs"] == {
        "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2
    }  # fmt: skip
    assert "eval" not in config


# The original's own data set


def test_split_cifar100_is_downloaded_trained_and_evaluated(cifar, tmp_path, capsys):
    """The original's command with a smaller ViT of the same name, on a tiny CIFAR-100."""
    data = tmp_path / "data"
    data.mkdir()
    flags = [
        "--model", "vit_base_patch16_224", "--model-kwargs", "depth=1", "embed_dim=24",
        "num_heads=2", "patch_size=56", "--pretrained", "false", "--batch-size", "16",
        "--data-path", str(data), "--output_dir", str(tmp_path / "out"), "--epochs", "1",
        "--num_workers", "0", "--device", "cpu",
    ]  # fmt: skip
    assert main.main(flags) == 0
    text = capsys.readouterr().out
    assert text.count("means vit_base_patch16_224.orig_in21k") == 1
    results = read(tmp_path / "out" / "results.json")
    order = list(range(100))
    random.Random(42).shuffle(order)
    assert results["class_order"] == [order[i : i + 10] for i in range(0, 100, 10)]
    assert len(results["batch"]["accuracy_matrix"]) == 10
    assert main.main(["--eval", *flags]) == 0
    again = read(tmp_path / "out" / "eval_results.json")
    assert again["batch"] == results["batch"]


def test_state_given_for_a_checkpoint_is_told(trained, capsys):
    state = trained[0] / "checkpoint" / "last.pth"
    assert main.main(["--eval", "--checkpoint", str(state), "--device", "cpu"]) == 1
    said = capsys.readouterr().out
    assert f"{state} is the state of a run, for --resume: give a checkpoint of a task" in said
    assert str(trained[0] / "checkpoint" / "task1_checkpoint.pth") in said


def test_default_data_path_that_does_not_exist_is_called_the_default(capsys):
    for flags, word in (([], " (the default)"), (["--data-path", "/nowhere"], "")):
        assert main.main(["cifar100_l2p", *flags]) == 2
        assert f"{word} does not exist: name the folder" in capsys.readouterr().err
