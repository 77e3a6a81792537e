"""Data sets that are folders: image folders, domains, notMNIST, Flowers-102, CORe50, ImageNet-R."""

import logging
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from continual_datasets.images import ConcatSource, open_image
from continual_datasets.readers.registry import count_classes, list_domains
from helpers import true_formats
from helpers.data_server import NOWHERE, point
from helpers.true_formats import DOMAINS, LETTERS, TRAIN_SESSIONS, WNIDS, load_one, rejected


def names_in(source, folder):
    return [os.path.relpath(path, folder) for path in source.paths]


def load_domains(*args, **kwargs):
    return list_domains(*args, **kwargs).load()


def empty(folder):
    for path in folder.rglob("*.*"):
        path.unlink()


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


# Image folders


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_image_folder_reads_sorted_classes(tmp_path, test_name):
    true_formats.write_class_folders(tmp_path / "train", ("bee", "ant", "Wasp"), 2)
    true_formats.write_class_folders(tmp_path / test_name, ("Wasp", "ant", "bee"), 2)
    nested = tmp_path / "train" / "ant" / "more" / "deep"
    nested.mkdir(parents=True)
    Image.new("L", (5, 5), 77).save(nested / "x.PNG")
    (tmp_path / "train" / "ant" / "notes.txt").write_text("ignored")
    for hidden in (tmp_path / "train" / ".ipynb_checkpoints", nested / ".ipynb_checkpoints"):
        hidden.mkdir()
        shutil.copy(nested / "x.PNG", hidden / "x-checkpoint.png")
    (tmp_path / "train" / "ant" / "._x.png").write_bytes(b"of another system")
    train, test = load_one("imagefolder", tmp_path)
    assert train.classes == test.classes == ["Wasp", "ant", "bee"]
    assert train.targets.tolist() == [0, 0, 1, 1, 1, 2, 2]
    assert names_in(test, tmp_path / test_name)[2:4] == ["ant/0.png", "ant/1.png"]
    assert train[4][0].getpixel((0, 0)) == (77, 77, 77)
    assert count_classes("ImageFolder", tmp_path) == 3


def test_image_folder_warns_of_images_that_are_not_read(tmp_path, caplog):
    true_formats.write_image_folder(tmp_path)
    for name in ("x.gif", "y.svg", "notes.txt", ".z.gif"):
        (tmp_path / "train" / "bee" / name).touch()
    assert len(load_one("ImageFolder", tmp_path)[0]) == 18
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    for part in (f"left out 2 images in {tmp_path}/train, such as ", "/train/bee/", ".jpg, "):
        assert part in record.getMessage()


def test_image_folder_prefers_val_to_test(tmp_path):
    true_formats.write_image_folder(tmp_path)
    (tmp_path / "test").mkdir()
    assert len(load_one("ImageFolder", tmp_path)[1]) == 6


# Image folders, one per domain


def test_domains_have_test_images_of_their_own(tmp_path):
    true_formats.write_domains(tmp_path)
    (tmp_path / "photo" / "test").rename(tmp_path / "photo" / "val")
    found = list_domains("imagefolder", tmp_path)
    assert (found.names, found.classes) == (DOMAINS, 2)
    train, test = found.load()
    assert tuple(train) == tuple(test) == DOMAINS
    for name in DOMAINS:
        assert train[name].classes == test[name].classes == ["ant", "bee"]
        expected = [f"{label}/{i}.png" for label in ("ant", "bee") for i in range(4)]
        assert names_in(train[name], tmp_path / name / "train") == expected
        assert test[name].targets.tolist() == [0, 0, 1, 1]
        folder = "val" if name == "photo" else "test"
        assert test[name].paths[3] == str(tmp_path / name / folder / "bee" / "1.png")


@pytest.mark.parametrize("name", ["test", "val"])
def test_domains_have_common_test_images(tmp_path, name):
    true_formats.write_domains_with_common_test(tmp_path)
    (tmp_path / "test").rename(tmp_path / name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").touch()
    train, test = load_domains("ImageFolder", tmp_path)
    assert tuple(train) == DOMAINS
    assert list(test) == [name]
    assert test[name].targets.tolist() == [0] * 4 + [1] * 4
    assert test[name].paths[0] == str(tmp_path / name / "ant" / "0.png")


@pytest.mark.parametrize(("name", "wanted", "tested"), [
    ("CORe50", ["s11", "s2"], ["s3+s7+s10"]), ("ImageFolder", ["sketch", "paint"], None),
])  # fmt: skip
def test_domains_are_learned_in_the_order_that_is_wanted(tmp_path, name, wanted, tested):
    (true_formats.write_domains if tested is None else true_formats.write_core50)(tmp_path)
    all_train, _ = load_domains(name, tmp_path)
    found = list_domains(name, tmp_path, wanted=wanted)
    train, test = found.load()
    assert list(found.names) == list(train) == wanted
    assert list(test) == (tested or wanted)
    assert all(train[domain].paths == all_train[domain].paths for domain in wanted)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [("photo fly", "fly is no domain"), ("photo photo", "one is named twice")],
)
def test_domains_that_are_not_there_or_repeated_are_rejected(tmp_path, wanted, problem):
    true_formats.write_domains(tmp_path)
    expected = f"--domains {wanted}: {problem}, the domains are paint, photo, sketch"
    with pytest.raises(ValueError, match=expected):
        list_domains("ImageFolder", tmp_path, wanted=wanted.split())


# notMNIST


@pytest.mark.parametrize("splits", [("Train", "Test"), ("train", "test"), ("TRAIN", "Test")])
def test_not_mnist_is_read_whatever_the_letter_case(tmp_path, splits):
    true_formats.write_not_mnist(tmp_path, splits=splits)
    (tmp_path / "notMNIST" / splits[0] / "A" / "notes.txt").touch()
    (tmp_path / "notMNIST" / splits[0] / "A" / "._A0.png").touch()
    assert count_classes("notmnist", tmp_path) == 10
    train, test = load_one("NOTMNIST", tmp_path)
    assert train.classes == list(LETTERS)
    assert train.targets.tolist() == [i for i in range(10) for _ in range(4)]
    expected = [f"{letter}/{letter}{i}.png" for letter in LETTERS for i in range(2)]
    assert names_in(test, tmp_path / "notMNIST" / splits[1]) == expected
    image, target = train[13]
    assert target == 3
    assert np.array_equal(np.asarray(image)[..., 0], true_formats.grey_picture(3, 401))


def test_not_mnist_leaves_out_files_that_are_no_png_and_names_them(tmp_path, caplog):
    true_formats.write_not_mnist(tmp_path)
    folder = tmp_path / "notMNIST"
    bad = [folder / "Test/J/J1.png", folder / "Train/A/A0.png", folder / "Train/A/Z.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(b"\x89PNG\r\n\x1a")
    Image.new("L", (28, 28)).save(bad[2], format="gif")
    train, test = load_one("NotMNIST", tmp_path)
    assert (len(train), len(test)) == (39, 19)
    assert names_in(train, folder / "Train")[:4] == ["A/A1.png", "A/A2.png", "A/A3.png", "B/B0.png"]
    assert train.targets.tolist()[:4] == [0, 0, 0, 1]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert all(str(path) in record.getMessage() for path in bad)
    assert "left out 3 files" in record.getMessage()


# Flowers-102


def test_flowers_are_read_from_the_true_layout(tmp_path, monkeypatch):
    true_formats.write_flowers102(tmp_path, monkeypatch)
    train, test = load_one("Flowers102", tmp_path)
    labels = true_formats.mixed_labels(102, 4)
    for source in (train, test):
        numbers = [int(path[-9:-4]) for path in source.paths]
        assert source.targets.tolist() == [labels[number - 1] for number in numbers]
        image, target = source[17]
        assert image == open_image(tmp_path / f"flowers-102/jpg/image_{numbers[17]:05}.jpg")
        written = true_formats.colour_picture(target, numbers[17])
        assert np.abs(np.asarray(image).mean((0, 1)) - written.mean((0, 1))).max() < 4
    assert train.targets.tolist() == [class_id for class_id in range(102) for _ in range(2)]
    os.remove(train.paths[5])
    point(monkeypatch, "Flowers102", NOWHERE)
    missing = f"no {os.path.basename(train.paths[5])} in {tmp_path}/flowers-102/jpg"
    assert missing in rejected(load_one, "Flowers102", tmp_path)


# CORe50


@pytest.mark.parametrize("folder", ["core50_128x128", "."])
def test_core50_sessions_are_domains_in_their_order(tmp_path, folder):
    true_formats.write_core50(tmp_path, folder=folder)
    root = tmp_path / folder
    assert count_classes("CORe50", tmp_path) == list_domains("core50", tmp_path).classes == 3
    train, test = load_domains("CORe50", tmp_path)
    assert list(train) == ["s1", "s2", "s4", "s5", "s6", "s8", "s9", "s11"]
    assert list(test) == ["s3+s7+s10"]
    assert all(part.classes == ["o1", "o2", "o10"] for part in (*train.values(), *test.values()))
    lines = [line.split() for line in true_formats.core50_list([11]).splitlines()]
    assert names_in(train["s11"], root) == [name for name, _ in lines]
    assert train["s11"].targets.tolist() == [int(label) for _, label in lines]
    sessions = [name.split("/")[0] for name in names_in(test["s3+s7+s10"], root)]
    assert sessions == ["s3"] * 6 + ["s7"] * 6 + ["s10"] * 6
    image, target = train["s11"][5]
    assert target == 2
    assert np.array_equal(np.asarray(image), true_formats.colour_picture(15, 1101, (16, 16)))
    joined, joined_test = load_one("CORe50", tmp_path)  # without domains
    assert joined.paths == [path for source in train.values() for path in source.paths]
    assert joined.targets.tolist() == [0, 0, 1, 1, 2, 2] * 8
    assert joined_test.paths == test["s3+s7+s10"].paths


# CORe50's file lists


@pytest.fixture
def lists(tmp_path):
    """The folder of published lists, beside the data."""
    true_formats.write_core50(tmp_path)
    return tmp_path / "batches_filelists" / "NI_inc" / "run0"


def test_file_lists_are_domains_in_their_order(tmp_path, lists):
    (lists / "readme.txt").write_text("not a list")
    reversed_list = lists / "train_batch_03_filelist.txt"
    lines = reversed_list.read_text().splitlines()[::-1]
    reversed_list.write_bytes("\r\n \r\n".join(lines).encode())
    assert len(list_domains("CORe50", tmp_path, lists).names) == 8
    train, test = load_domains("CORe50", tmp_path, lists)
    assert list(train) == [f"batch_{i:02}" for i in range(8)]
    assert list(test) == ["test"]
    for name, source in {**train, **test}.items():
        path = lists / ("test_filelist.txt" if name == "test" else f"train_{name}_filelist.txt")
        lines = [line.split() for line in path.read_text().splitlines() if line.strip()]
        assert names_in(source, tmp_path / "core50_128x128") == [line[0] for line in lines]
        assert source.targets.tolist() == [int(line[1]) for line in lines]
        assert source.classes == ["o1", "o2", "o10"]
    assert train["batch_03"].targets.tolist() == [2, 2, 1, 1, 0, 0]
    assert all(f"/s{TRAIN_SESSIONS[-1]}/" in path for path in train["batch_00"].paths)


def test_file_lists_are_ordered_by_number(tmp_path, lists):
    for i in range(8, 102):
        copy = lists / f"train_batch_{i:02}_filelist.txt"
        shutil.copy(lists / "train_batch_00_filelist.txt", copy)
    names = list_domains("CORe50", tmp_path, lists).names
    assert names[98:] == ("batch_98", "batch_99", "batch_100", "batch_101")
    assert tuple(load_domains("CORe50", tmp_path, lists)[0]) == names


IMAGE = "s11/o1/C_11_01_000.png"


@pytest.mark.parametrize("line", [
    f"{IMAGE} 1", f"{IMAGE} 3", f"{IMAGE} -1", IMAGE, f"{IMAGE} o1", f"{IMAGE} 0 0",
    "s11/o1/C_11_01_999.png 0", "s12/o1/C_12_01_000.png 0", "s11/o1 0",
    "s11/o1/x/C_11_01_000.png 0", "/etc/passwd 0", f"../core50_128x128/{IMAGE} 0",
    "s11/o1/.. 0", "s12/o7/C_01_01_000.png 0", "ÿþ 0",
])  # fmt: skip
def test_file_list_line_is_rejected_with_its_number(tmp_path, lists, line):
    root = tmp_path / "core50_128x128"
    shutil.copytree(root / "s1" / "o1", root / "s12" / "o7")
    right = f"'{IMAGE} 0'" if line.split()[0] == IMAGE else "an image of s1 to s11 and its"
    for path in (lists / "test_filelist.txt", lists / "train_batch_02_filelist.txt"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], line, *lines[3:]]), encoding="latin-1")
        message = rejected(load_domains, "CORe50", tmp_path, lists)
        assert message.startswith(f"{path}, line 4: '")
        assert f"is not {right}" in message


def test_empty_or_unreadable_file_list_is_named(tmp_path, lists):
    path = lists / "train_batch_01_filelist.txt"
    for content in ("", "\n\n"):
        path.write_text(content)
        message = rejected(load_domains, "CORe50", tmp_path, lists)
        assert message.startswith(f"{path}: the list is empty; expected train_batch_00_filelist")
    path.unlink()
    path.symlink_to(path)
    assert "train_batch_01_filelist.txt" in rejected(load_domains, "CORe50", tmp_path, lists)


@pytest.mark.parametrize("gone", ["train_batch_05_filelist.txt", "test_filelist.txt", "*"])
def test_missing_file_lists_are_named_at_once(tmp_path, lists, gone):
    for path in lists.glob(gone):
        path.unlink()
    message = rejected(list_domains, "CORe50", tmp_path, lists)
    expected = "train_batch_00_filelist.txt, test_filelist.txt" if gone == "*" else gone
    assert message.startswith(f"no {expected} in {lists}; expected train_batch_00_filelist.txt")
    assert f"no folder {lists}/none" in rejected(list_domains, "CORe50", tmp_path, lists / "none")


def test_file_lists_look_into_every_folder_once(tmp_path, lists, monkeypatch):
    looked, scandir = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda folder: looked.append(folder) or scandir(folder))
    load_domains("CORe50", tmp_path, lists)
    objects = [str(path) for path in looked if os.path.basename(path).startswith("o")]
    assert len(objects) == len(set(objects)) == 33


def test_digest_tells_files_and_labels_apart_wherever_they_are(tmp_path):
    true_formats.write_core50(tmp_path)
    train, _ = load_domains("CORe50", tmp_path)
    digests = {source.digest() for source in train.values()}
    assert len(digests) == len(train)
    shutil.copytree(tmp_path / "core50_128x128", tmp_path / "moved" / "core50_128x128")
    again, _ = load_domains("CORe50", tmp_path / "moved")
    assert {source.digest() for source in again.values()} == digests
    joined = ConcatSource(list(train.values()), train["s1"].classes)
    swapped = ConcatSource(list(reversed(train.values())), train["s1"].classes)
    assert joined.digest() != swapped.digest()


# ImageNet-R


@pytest.mark.parametrize("folder", ["imagenet-r", "."])
def test_imagenet_r_is_read_from_the_true_layout(tmp_path, folder):
    true_formats.write_imagenet_r(tmp_path, folder=folder)
    (tmp_path / folder / "misc").mkdir()
    assert count_classes("ImagenetR", tmp_path) == 3
    train, test = load_one("Split-ImageNet-R", tmp_path)
    assert train.classes == test.classes == list(WNIDS)
    assert train.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert test.targets.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    both = names_in(train, tmp_path / folder) + names_in(test, tmp_path / folder)
    assert sorted(both) == [f"{wnid}/{i}.jpg" for wnid in WNIDS for i in range(10)]
    image, target = train[20]
    assert image == open_image(train.paths[20])
    assert (image.mode, target) == ("RGB", 2)
    assert str(tmp_path / folder / WNIDS[2]) == os.path.dirname(train.paths[20])


#: By `printf %s n01443537/art_0.jpg | sha256sum` and so on: 07, bd, 79, ef, 17, 0a, 15, 90.
RENDITIONS = [
    "art_0.jpg", "art_1.jpg", "cartoon_2.jpg", "graffiti_3.jpg", "origami_4.jpg", "sketch_5.jpg",
    "tattoo_6.jpg", "toy_7.jpg",
]  # fmt: skip


def write_renditions(root, names, wnids=WNIDS):
    for wnid in wnids:
        (root / wnid).mkdir(parents=True)
        for name in names:
            (root / wnid / name).touch()


def test_imagenet_r_split_is_by_the_sums_of_the_names(tmp_path):
    write_renditions(tmp_path / "imagenet-r", RENDITIONS)
    train, test = load_one("Imagenet-R", tmp_path)
    expected = ["art_0.jpg", "sketch_5.jpg"]  # the least two of 8 / 5, rounded
    assert [os.path.basename(path) for path in test.paths[:2]] == expected
    rest = [name for name in RENDITIONS if name not in expected]
    assert [os.path.basename(path) for path in train.paths[:6]] == rest


def test_imagenet_r_split_depends_on_nothing_but_names(tmp_path, monkeypatch):
    write_renditions(tmp_path / "one" / "imagenet-r", RENDITIONS)
    write_renditions(tmp_path / "other" / "imagenet-r", RENDITIONS[::-1], WNIDS[1:])
    before = sorted((tmp_path / "one").rglob("*"))
    first = load_one("Imagenet-R", tmp_path / "one")
    walked = os.walk

    def in_another_order(*args, **kwargs):
        return [(place, [], names[::-1]) for place, _, names in walked(*args, **kwargs)][::-1]

    monkeypatch.setattr("os.walk", in_another_order)
    np.random.seed(7)
    again = load_one("Imagenet-R", tmp_path / "one")
    fewer = load_one("Imagenet-R", tmp_path / "other")
    for one, other, part in zip(first, again, fewer, strict=True):
        assert list(one.paths) == list(other.paths)
        names = names_in(one, tmp_path / "one")[np.sum(one.targets == 0) :]
        assert names == names_in(part, tmp_path / "other")
    assert sorted((tmp_path / "one").rglob("*")) == before


@pytest.mark.parametrize(("images", "tests"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_imagenet_r_fifth_is_rounded(tmp_path, images, tests):
    write_renditions(tmp_path / "imagenet-r", [f"{i}.jpg" for i in range(images)])
    train, test = load_one("Imagenet-R", tmp_path)
    assert np.bincount(test.targets).tolist() == [tests] * 3
    assert np.bincount(train.targets).tolist() == [images - tests] * 3


def test_imagenet_r_that_is_split_already_is_no_imagenet_r(tmp_path):
    for split in ("train", "test"):
        write_renditions(tmp_path / "imagenet-r" / split, RENDITIONS)
    message = rejected(count_classes, "Imagenet-R", tmp_path)
    assert f"--dataset ImageFolder --data-path {tmp_path}/imagenet-r" in message


# What is wrong with the folders


def all_but_first(folder):
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name))[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rename_to_fly(folder):
    folder.rename(folder.with_name("fly"))


C50, NOT = "core50_128x128", "notMNIST"

#: The data, what is done to which folder of them, and parts of the message.
LAYOUT_PROBLEMS = [
    ("ImageFolder", shutil.rmtree, "", "is not a folder", "/train/<class>", "val/<class>"),
    ("ImageFolder", shutil.rmtree, "train", "no folder train in {root}; ", "/train/<class>"),
    ("ImageFolder", shutil.rmtree, "val", "no folder val or test in {root}; ", "val/<class>"),
    ("ImageFolder", empty_folder, "train", "no class folder in {root}/train; ", "/train/<class>"),
    ("ImageFolder", empty_folder, "val", "no class folder in {root}/val; "),
    ("ImageFolder", rename_to_fly, "val/bee", "only in {root}/train: bee;", "{root}/val: fly)"),
    ("domains", shutil.rmtree, "", "is not a folder", "{root}/<domain>/train/<class>/*"),
    ("domains", empty_folder, "", "no domain in {root}; ", "<domain>/test/<class>"),
    ("domains", os.mkdir, "train", "{root} holds a folder train", "<domain>/train/<class>"),
    ("domains", shutil.rmtree, "photo/train", "no folder train in {root}/photo; ", "<domain>"),
    ("domains", shutil.rmtree, "photo/test", "no folder val or test in {root}/photo; ", "<domain>"),
    ("domains", empty_folder, "paint/train", "no class folder in {root}/paint/train; ", "<domain>"),
    ("domains", shutil.rmtree, "sketch/train/bee", "{root}/sketch/train differ", "train: bee)"),
    ("domains", shutil.rmtree, "photo/test/ant", "{root}/photo/test differ", "train: ant)"),
    ("domains", os.mkdir, "photo/train/fly", "of {root}/paint/train and", "photo/train: fly)"),
    ("domains with common test", os.mkdir, "test/fly", "only in {root}/test: fly"),
    ("NotMNIST", shutil.rmtree, f"{NOT}/Test", "and 5 more in {root}/notMNIST/Test; ", "<A to J>"),
    ("NotMNIST", shutil.rmtree, f"{NOT}/Train/C", "no folder C in {root}/notMNIST/Train; "),
    ("NotMNIST", shutil.rmtree, f"{NOT}/Test/J", "no folder J in ", "Adversarial"),
    ("CORe50", shutil.rmtree, f"{C50}/s7", "no session s7 in {root}/core50_128x128; ", "s1/o1/C_"),
    ("CORe50", shutil.rmtree, f"{C50}/s9/o2", "only in {root}/core50_128x128/s1: o2"),
    ("CORe50", os.mkdir, f"{C50}/s3/o50", "only in {root}/core50_128x128/s3: o50"),
    ("CORe50", empty_folder, f"{C50}/s1", "no class folder in {root}/core50_128x128/s1; "),
    ("Imagenet-R", all_but_first, "imagenet-r", "only one class (n01443537)", "hendrycks"),
    ("Imagenet-R", empty_folder, "imagenet-r", "no class folder in {root}/imagenet-r", "hendrycks"),
]
IMAGE_PROBLEMS = [
    (
        "ImageFolder",
        empty,
        "train",
        "no image in {root}/train/ant, bee, cat (3 of 3 folders; looked for .jpg, ",
    ),
    ("ImageFolder", empty, "train/bee", "no image in {root}/train/bee (1 of 3", "add images or"),
    ("ImageFolder", empty, "val/ant", "no image in {root}/val/ant (1 of 3"),
    ("domains", empty, "photo/train/bee", "no image in {root}/photo/train/bee (1 of 2"),
    ("NotMNIST", empty, f"{NOT}/Test/C", "no image in {root}/notMNIST/Test/C"),
    ("CORe50", empty, f"{C50}/s9/o2", "no image in {root}/core50_128x128/s9/o2"),
    ("Imagenet-R", empty, f"imagenet-r/{WNIDS[1]}", "no image in {root}/imagenet-r/n01484850"),
    ("Imagenet-R", all_but_first, f"imagenet-r/{WNIDS[1]}", "/imagenet-r/n01484850 besides the f"),
]


def calls_of(name):
    """What looks at the folders at once, and what reads the images."""
    if name.startswith("domains"):
        return "ImageFolder", [list_domains], [load_domains]
    if name == "CORe50":
        return name, [count_classes, list_domains], [load_one, load_domains]
    return name, [count_classes], [load_one]


@pytest.mark.parametrize("problem", [*LAYOUT_PROBLEMS, *IMAGE_PROBLEMS])
def test_what_is_wrong_with_folders_is_named(tmp_path, problem):
    written, change, folder, *parts = problem
    root = tmp_path / "data"
    true_formats.TRUE_FORMATS[written](root, None)
    change(root / folder)
    name, at_once, later = calls_of(written)
    for call in [*at_once, *later] if problem in LAYOUT_PROBLEMS else later:
        message = rejected(call, name, root)
        assert all(part.format(root=root) in message for part in parts), message


def test_single_class_is_rejected(tmp_path):
    for split in ("train", "val"):
        true_formats.write_class_folders(tmp_path / split, ["ant"], 1)
    for call in (count_classes, load_one):
        assert f"only one class (ant) in {tmp_path}/train" in rejected(
            call, "ImageFolder", tmp_path
        )
