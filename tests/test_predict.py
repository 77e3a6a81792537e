"""predict.py: classes of images by what a run has learned, on the command line and in Python."""

import csv
import json
import re
import shutil
import sys
from itertools import chain
from statistics import mean

import pytest
import torch
from PIL import Image

import main
import predict
from cli.paths import ROOT
from continual_datasets.readers import registry
from experiment import checkpoints, learners
from helpers.commands import command
from helpers.finished_runs import Run
from helpers.tiny_flags import TINY_DIGITS


@pytest.fixture(scope="module")
def learner(trained):
    return predict.load_learner(trained.folder, device="cpu")


@pytest.fixture(scope="module")
def val(image_folder):
    return image_folder / "val"


@pytest.fixture
def paths(val):
    return sorted(map(str, val.rglob("*.png")))


def test_files_have_the_predictions_and_the_accuracy_of_the_run(trained, val, tmp_path, capsys):
    table, file = tmp_path / "a.csv", tmp_path / "a.json"
    words = trained.folder, val, "--csv", table, "--json", file, "--top", 3
    assert predict.main([str(word) for word in words]) == 0
    content, rows = json.loads(file.read_text()), [*csv.DictReader(table.open())]
    out, err = capsys.readouterr()
    assert (err, f"Accuracy: {content['accuracy']:.2f} % of 12 images" in out) == ("", True)
    for row, one in zip(rows, content["images"], strict=True):
        assert (row["path"], row["label"]) == (one["path"], one["label"])
        assert [row["class_3"], float(row["probability_3"])] == one["top"][2]
        assert row["prompts"] == " ".join(map(str, one["prompts"]))
    expected = trained.results["instance"]
    for name in ("accuracy_by_class", "confusion_matrix"):
        assert content[name] == expected[name]
    assert content["accuracy"] == mean(content["accuracy_by_class"].values())


def test_confusions_are_legible_for_few_and_many_classes():
    names = [f"class number {i:02}" for i in range(21)]
    pairs = [(name, names[max(0, i - 1)]) for i, name in enumerate(names) for _ in range(i + 1)]
    content, text = predict._evaluation(pairs, names)
    assert (content["accuracy"], len(text.splitlines())) == (100 / 231, 12)
    assert text.splitlines()[2] == "class number 20, predicted as class number 19: 21"
    lines = predict._evaluation(pairs[:6], names)[1].splitlines()
    assert [line.split()[-2:] for line in lines[-3:]] == [["1", "-"], ["2", "-"], ["-", "3"]]
    assert max(map(len, predict._evaluation(pairs[:210], names)[1].splitlines())) <= 100


def test_batched_equals_single_for_paths_images_and_pixels(learner, paths):
    together = learner(paths)
    alone = [learner(path) for path in paths]
    torch.testing.assert_close(torch.cat([x.probabilities for x in alone]), together.probabilities)
    assert together.classes == [*chain.from_iterable(one.classes for one in alone)]
    images = [Image.open(path) for path in paths]
    pixels = torch.stack([learner.transform(image) for image in images])
    for same in (learner(images), learner(pixels), learner(pixels / 255), learner(paths, 1, 5)):
        torch.testing.assert_close(same.probabilities, together.probabilities)
        assert torch.equal(same.prompts, together.prompts)
    torch.testing.assert_close(together.probabilities.sum(dim=1), torch.ones(12).double())
    assert [row[0][0] for row in together.top(1)] == together.classes
    for wrong in ([], pixels[0], pixels[..., :8]):
        with pytest.raises(ValueError, match=r"no images|must be \(B, 3, 16, 16\), found \("):
            learner(wrong)


def test_only_classes_learned_so_far_are_predicted(trained, val, capsys):
    first, second = (sorted("abcd"[i] for i in ids) for ids in trained.results["class_order"])
    assert predict.load_learner(trained.folder, 1).class_names == first
    assert predict.main([str(trained.folder), str(val), "--checkpoint", "1"]) == 0
    out, err = capsys.readouterr()
    assert sorted({*re.findall(r"(\w) \(\d+\.\d %\)", out)}) == first
    assert f"not counted in the accuracy: {', '.join(second)} in" in err


def test_sound_images_vote_in_the_order_given(learner, paths, tmp_path):
    (tmp_path / "damaged.png").write_text("no image")
    given = [*paths[:2], str(tmp_path / "damaged.png"), *paths[2:]]
    images = [(path, None) for path in given]
    damaged, *rows = learners.predict_files(learner, images, 1, batch_size=4, vote_group_size=3)
    assert damaged["path"] == given[2]
    assert [row["path"] for row in rows] == paths
    prompts = torch.tensor([row["prompts"] for row in rows])
    assert torch.equal(prompts, learner(paths, vote_group_size=3).prompts)
    assert torch.equal(prompts[::3], prompts[2::3])


def test_what_people_have_in_folders_is_named(trained, val, tmp_path, capsys):
    shutil.copytree(val, photos := tmp_path / "photos")
    (photos / "b").rename(photos / "B")
    shutil.copytree(photos / "a", photos / "zebra" / "c")
    (photos / "a" / "0.png").write_bytes(b"")
    (photos / "a" / "x.heic").touch()
    (photos / ".thumbnail.png").touch()
    words = trained.folder, photos, photos / "c" / "1.png", "--top", 1
    assert predict.main([str(word) for word in words]) == 1
    out, err = capsys.readouterr()
    lines = re.findall(r"^(.+\.png): \w \(\d+\.\d %\)$", out, re.MULTILINE)
    assert lines == [*sorted(lines[:-1]), f"{photos}/c/1.png"]
    assert (len(lines), "of 8 images" in out) == (15, True)
    of_folders, of_classes, skipped = err.splitlines()
    assert of_folders.endswith("are read, convert the others (1, such as a/x.heic)")
    assert f"not counted in the accuracy: B, zebra in {photos}, no" in of_classes
    assert of_classes.endswith("learned so far (is b meant?)")
    assert skipped == f"predict.py: skipped {photos}/a/0.png: the file is empty"


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("", 2, ["give RUN, the folder of a run, and PATH"]),
        ("{run}/none {run}/no --tpo", 2, ["none: neither the folder", "no is neither", "--tpo is"]),
        ("{run} {golden} --checkpoint 7", 2, ["has those of the tasks 1, 2", "no image in"]),
        ("{run}/checkpoint/last.pth {val} --device x", 2, ["is the state of a", "x is unknown"]),
        ("{run}/config.yaml {val} --checkpoint 1", 2, ["--checkpoint 1 needs the folder of a run"]),
        ("{golden}/task1_checkpoint.pth {val} --top 0", 2, ["does not name its classes", "--top"]),
        ("{seeds} {val} --json {run}", 2, ["such as {seeds}/seed42", "--json {run} is no regular"]),
        ("{run} {val} --pretrained no.npz", 1, ["there is no weight file no.npz: give"]),
        ("{backbone} {val}", 1, ["was trained on the backbone vit_tiny"]),
        ("{config} {val} --vote_group_size 4", 1, ["images of this run do not vote"]),
    ],
)
def test_everything_wrong_is_in_one_message(words, code, said, trained, val, tmp_path, capsys):
    (tmp_path / "seed42" / "checkpoint").mkdir(parents=True)
    places = {"run": trained.folder, "val": val, "seeds": tmp_path}
    places["golden"] = ROOT / "tests" / "golden" / "original_run"
    content = torch.load(checkpoints.task_path(trained.folder, 2), weights_only=True)
    for part, entry in {"backbone": {"sha256": "0"}, "config": {"batchwise_prompt": False}}.items():
        places[part] = tmp_path / f"{part}.pth"
        torch.save(content | {part: content[part] | entry}, places[part])
    assert predict.main([word.format_map(places) for word in words.split()]) == code
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", len(said) + (code == 2))
    assert [one for one in said if one.format_map(places) not in err] == []


def test_readme_shows_how_to_predict_in_python(trained, paths):
    (code,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
    reals = {"output/digits_l2p": trained.folder, "1.png": paths[0], "2.png": paths[1]}
    for shown, real in reals.items():
        assert shown in code
        code = code.replace(shown, str(real))
    names = {}
    exec(code, names)
    assert names["predictions"].classes == names["learner"](paths[:2]).classes


@pytest.mark.slow
@pytest.mark.parametrize("flags", [(), ("--amp", "bf16", "--norm", "half")])
def test_digits_as_files_have_the_accuracies_of_the_run(flags, tmp_path):
    """Instance-wise; and with the run's vote groups, in the order of its test set, batch-wise."""
    run, images = tmp_path / "run", tmp_path / "images"
    assert main.main([*TINY_DIGITS, *flags, "--output_dir", str(run)]) == 0
    digits = registry.load_parts("digits", tmp_path)[1]["digits"]
    found = {"instance": [], "batch": []}
    for task, ids in enumerate(Run(run).results["class_order"]):
        (images / str(task)).mkdir(parents=True)
        for number, (image, label) in enumerate(pair for pair in digits if pair[1] in ids):
            image.save(images / str(task) / f"{number:03}_{label}.png")
        for selection, group in (("instance", 1), ("batch", 8)):
            words = run, images / str(task), "--vote_group_size", group, "--json", tmp_path / "a"
            assert predict.main([str(word) for word in words]) == 0
            rows = json.loads((tmp_path / "a").read_text())["images"]
            right = sum(row["path"][-5] == row["top"][0][0] for row in rows)
            found[selection].append(100 * right / len(rows))
    for name, accuracies in found.items():
        assert accuracies == [row[-1] for row in Run(run).results[name]["accuracy_matrix"]]


@pytest.mark.slow
def test_command_runs_from_any_folder_and_imports_nothing_that_trains(trained, val):
    code = f"import sys, predict; predict.main(['{trained.folder}', '{val}']); print(*sys.modules)"
    done = command(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    trains = {"engine", "continual_dataloader", "timm.optim", "timm.scheduler", "tensorboard"}
    assert (done.returncode, done.stderr, " of 12 images" in done.stdout) == (0, "", True)
    assert not trains & {*done.stdout.split()}
