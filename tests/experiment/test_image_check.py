"""Damaged images are found before anything trains."""

import json
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

import utils
from cli.settings import Settings
from continual_datasets import images
from continual_datasets.images import DataError, FileSource
from experiment import image_check
from helpers.finished_runs import failed, typed
from helpers.true_formats import rejected

DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "empty": lambda path: os.truncate(path, 0),
    "text": lambda path: path.write_text("<html>Log in to go on</html>"),
    "float": lambda path: Image.fromarray(np.ones((4, 4), np.float32)).save(path, "tiff"),
    "gone": lambda path: path.unlink(),
}


@pytest.fixture
def opened(monkeypatch):
    """Names of the files that are opened."""
    names = []

    def open_image(path):
        names.append(os.path.basename(path))
        return really_open(path)

    really_open = images.open_image
    monkeypatch.setattr(images, "open_image", open_image)
    return names


@pytest.fixture
def parts(tmp_path):
    """Nine training images and nine test images, three of each class."""
    made = []
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        names = [f"{split}{i}.png" for i in range(9)]
        for name in names:
            Image.effect_noise((16, 16), 80).save(tmp_path / split / name)
        made.append({"all": FileSource(names, np.arange(9) // 3, "abc", tmp_path / split)})
    return tuple(made)


def check(parts, tmp_path, **settings):
    folder = {"output_dir": str(tmp_path / "out"), "num_workers": 2}
    return image_check.without_damaged(parts, Settings().replace(**folder, **settings))


@pytest.mark.parametrize("kind", DAMAGE)
@pytest.mark.parametrize("split", [0, 1])
def test_every_damaged_image_is_named_or_left_out(parts, tmp_path, caplog, kind, split):
    source = parts[split]["all"]
    paths = source.paths
    for path in paths[1:8]:
        DAMAGE[kind](tmp_path / path)
    message = rejected(check, parts, tmp_path)
    assert message.startswith(
        f"7 of 18 images are damaged: {', '.join(paths[1:6])} and 2 more (the first: "
    )
    assert message.endswith("; mend them, or leave them out with --skip_damaged")
    assert message.count(paths[1]) == 1
    kept = check(parts, tmp_path, skip_damaged=True)
    assert kept[split]["all"].paths == [paths[0], paths[8]]
    assert kept[split]["all"].targets.tolist() == [0, 2]
    assert kept[1 - split]["all"].paths == parts[1 - split]["all"].paths
    assert kept[split]["all"].digest() != source.digest()
    assert "; they are left out" in caplog.text


def test_many_images_are_opened_once_until_one_of_them_changes(
    parts, tmp_path, opened, monkeypatch
):
    stored = tmp_path / "out/damaged.json"
    check(parts, tmp_path)  # so few are opened in no time
    monkeypatch.setattr(image_check, "_FEW", 17)
    check(parts, tmp_path, dry_run=True)
    assert not stored.exists()
    changes = (("date", 18), (None, 0), ("content", 18), (None, 0), ("file", 18))
    for change, number in ((None, 18), (None, 0), *changes):
        path = Path(parts[0]["all"].paths[4])
        path.write_bytes(path.read_bytes()) if change == "content" else None
        os.utime(path, (1, 1)) if change in ("date", "content") else None
        stored.write_text("[" * 10**5) if change == "file" else None
        opened.clear()
        assert check(parts, tmp_path) == parts
        assert len(opened) == number
    (found,) = json.loads(stored.read_text()).values()
    assert found == {}


@pytest.mark.parametrize("name", ["a\nb.png", "\udcff\x1b[31m.png"])
def test_any_name_is_shown_once_in_one_line(tmp_path, caplog, name):
    (tmp_path / name).write_text("no image")
    check(({"all": FileSource([name], [0], "a", tmp_path)}, {}), tmp_path, skip_damaged=True)
    shown = f"{tmp_path}/{name.encode('unicode_escape').decode()}"
    assert caplog.messages[0].startswith(f"1 of 1 images are damaged: {shown} (the first: not an ")


def test_rank_0_opens_the_images_for_all(parts, tmp_path, opened, monkeypatch):
    bad = parts[0]["all"].paths[0]
    monkeypatch.setattr(utils, "is_main_process", lambda: False)
    monkeypatch.setattr(utils, "share", lambda found: found or {0: "of rank 0: bad"})
    with pytest.raises(DataError, match=f"1 of 18 images are damaged: {bad} "):
        check(parts, tmp_path)
    assert len(check(parts, tmp_path, skip_damaged=True)[0]["all"]) == 8
    assert opened == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [MemoryError(), OSError(24, "Too many open files")])
def test_what_the_machine_lacks_is_no_damage(parts, tmp_path, monkeypatch, error):
    monkeypatch.setattr(Image, "open", Mock(side_effect=error))
    with pytest.raises(DataError, match=r"train/train0\.png: "):
        check(parts, tmp_path, skip_damaged=True)
    assert not (tmp_path / "out").exists()


def test_evaluation_opens_the_test_images_alone(parts, tmp_path, opened):
    check(parts, tmp_path, eval=True)
    assert {name[:3] for name in opened} == {"val"}


@pytest.mark.usefixtures("restore_logging")
def test_a_run_ends_before_it_trains_or_does_without(tiny, image_folder, tmp_path):
    data, folder = shutil.copytree(image_folder, tmp_path / "data"), tmp_path / "run"
    for name in ("train/a/3.png", "val/c/1.png"):
        DAMAGE["truncated"](data / name)
    command = [*tiny, "--data-path", data, "--output_dir", folder]
    out = failed(*command)
    assert out.startswith(f"error: 2 of 44 images are damaged: {data}/train/a/3.png, {data}/val/c/")
    assert (out.count("\n"), os.listdir(folder)) == (1, ["damaged.json"])
    code, out, err = typed(*command, "--skip_damaged", "--dry_run")
    assert (code, err) == (0, "")
    assert "31 training images, 11 test images" in out
