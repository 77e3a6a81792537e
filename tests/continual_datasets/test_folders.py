"""Data sets that are folders: image folders, domains, notMNIST, Flowers-102, CORe50, ImageNet-R."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image

from continual_datasets.images import ConcatSource
from continual_datasets.readers.registry import SOURCES, count_classes, list_domains
from helpers import true_formats
from helpers.data_server import NOWHERE, point
from helpers.true_formats import DOMAINS, FOLDERS, TRAIN_SESSIONS, WNIDS, load_one, rejected, write

class_folders, core50_list = true_formats.class_folders, true_formats.core50_list


def pairs(source, folder):
    """The path of every image, and its class."""
    names = [os.path.relpath(path, folder) for path in source.paths]
    return list(zip(names, source.targets.tolist(), strict=True))


def those(name, *folders):
    """The images of a data set that are in a folder, likewise."""
    return [pair for pair in FOLDERS[name] if pair[0].startswith(folders)]


def load_domains(*args, **kwargs):
    return list_domains(*args, **kwargs).load()


def warned(caplog):
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    return record.getMessage()


# Image folders


@pytest.mark.parametrize("test_name", ["val", "test"])
def test_image_folder_reads_sorted_classes_and_warns_of_other_images(tmp_path, test_name, caplog):
    classes = ["Wasp", "ant", "bee"]
    train_images, test_images = (class_folders(x, classes, 2) for x in ("train", test_name))
    true_formats.write_images(tmp_path, train_images + test_images)
    ants = tmp_path / "train" / "ant"
    nested = ants / "more" / "deep"
    nested.mkdir(parents=True)
    Image.new("L", (5, 5), 77).save(nested / "x.PNG")
    for hidden in (tmp_path / "train" / ".ipynb_checkpoints", nested / ".ipynb_checkpoints"):
        hidden.mkdir()
        shutil.copy(nested / "x.PNG", hidden / "x-checkpoint.png")
    for name in ("x.gif", "y.svg", "notes.txt", "._x.png", ".z.gif"):
        (ants / name).touch()
    train, test = load_one("imagefolder", tmp_path)
    assert train.classes == test.classes == classes
    assert count_classes("ImageFolder", tmp_path) == 3
    assert pairs(train, tmp_path) == [
        *train_images[:4], ("train/ant/more/deep/x.PNG", 1), *train_images[4:],
    ]  # fmt: skip
    assert pairs(test, tmp_path) == test_images
    assert train[4][0].getpixel((0, 0)) == (77, 77, 77)
    for part in (f"left out 2 images in {tmp_path}/train, such as ", "/train/ant/", ".jpg, "):
        assert part in warned(caplog)
    if test_name == "val":  # which is preferred
        (tmp_path / "test").mkdir()
        assert len(load_one("ImageFolder", tmp_path)[1]) == 6


def test_images_behind_links_count_once_in_their_class(tmp_path):
    """Links to the folder itself, to one above it and to each other; those to a class count."""
    images = class_folders("train", ["ant", "bee"], 2) + class_folders("val", ["ant", "bee"], 1)
    true_formats.write_images(tmp_path, images)
    ant, bee = (tmp_path / "train" / name for name in ("ant", "bee"))
    for name in ("x", "y"):
        (ant / name).mkdir()
        shutil.copy(ant / "0.png", ant / name / f"{name}.png")
    links = {
        ant / "a": ant, ant / "b": tmp_path, bee / "d": ant, ant / "c": bee, bee / "e": "/",
        ant / "x/f": ant / "y", ant / "y/g": ant / "x", ant / "h": ant / "h", tmp_path / "train/i":
        tmp_path / "train", tmp_path / "val/j": tmp_path,
    }  # fmt: skip
    for link, target in links.items():
        link.symlink_to(target)
    (tmp_path / "linked").symlink_to(tmp_path)
    for data_path in (tmp_path, tmp_path / "linked"):
        train, test = load_one("ImageFolder", data_path)
        assert train.classes == ["ant", "bee"]
        both = ["0.png", "0.png", "1.png", "1.png", "x.png", "y.png"]
        assert sorted(os.path.basename(name) for name in train.names) == sorted(both * 2)
        assert train.targets.tolist() == [0] * 6 + [1] * 6
        assert len(test) == 2
    (tmp_path / "val" / "k").symlink_to(tmp_path / "unplugged")  # perhaps a class
    assert f"mend or remove them: {tmp_path}/val/k" in rejected(load_one, "ImageFolder", tmp_path)


def test_images_of_other_formats_are_counted_in_one_warning(tmp_path, caplog):
    write("domains", tmp_path)
    for number, name in enumerate(("x.GIF", "x.avif", "x.heic", "x.JXL", "x", "x.unknown")):
        folder = tmp_path / DOMAINS[number % 3] / "train" / "ant"
        Image.new("L", (5, 5)).save(folder / name, format="gif")
        shutil.copy(folder / name, tmp_path / "photo" / "test" / "bee")
    os.mkfifo(tmp_path / "photo" / "test" / "ant" / "pipe")
    load_domains("ImageFolder", tmp_path)
    assert warned(caplog).startswith(f"left out 12 images in {tmp_path}, such as {tmp_path}/paint/")


def test_numbered_folders_are_sorted_as_numbers(tmp_path):
    for names in (["1", "2", "10"], ["08", "9", "10"], ["1", "10", "2b"], ["-1", "0", "10"]):
        folder = tmp_path / "-".join(names)
        true_formats.write_images(folder, class_folders("train", names, 1))
        shutil.copytree(folder / "train", folder / "val")
        train, _ = load_one("ImageFolder", folder)
        assert train.classes == names
        assert pairs(train, folder) == class_folders("train", names, 1)


# Domains


def test_domains_have_test_images_of_their_own(tmp_path):
    write("domains", tmp_path)
    found = list_domains("imagefolder", tmp_path)
    assert (found.names, found.classes) == (DOMAINS, 2)
    (tmp_path / "photo" / "test").rename(tmp_path / "photo" / "val")
    train, test = load_domains("imagefolder", tmp_path)
    assert tuple(train) == tuple(test) == DOMAINS
    for name in DOMAINS:
        assert train[name].classes == test[name].classes == ["ant", "bee"]
        assert pairs(train[name], tmp_path) == those("domains", f"{name}/train")
        expected = those("domains", f"{name}/test")
        if name == "photo":
            expected = [(path.replace("test", "val"), label) for path, label in expected]
        assert pairs(test[name], tmp_path) == expected


def test_names_that_are_no_text_are_escaped_where_people_see_them(tmp_path):
    write("domains", tmp_path)
    (tmp_path / "photo").rename(tmp_path / "caf\udce9")
    for split in tmp_path.glob("*/t*"):
        (split / "ant").rename(split / "\udce9nt")
    train, test = load_domains("ImageFolder", tmp_path)
    assert list(train) == list(test) == ["caf\\udce9", "paint", "sketch"]
    assert train["paint"].classes == ["bee", "\udce9nt"]  # as files store them
    assert len(list(train["caf\\udce9"])) == 8
    [path.unlink() for path in tmp_path.glob("*/test/\udce9nt/*")]
    assert "/test/\\udce9nt (1 of 2" in rejected(load_domains, "ImageFolder", tmp_path)


@pytest.mark.parametrize("name", ["test", "val"])
def test_domains_have_common_test_images(tmp_path, name):
    write("domains with common test", tmp_path)
    (tmp_path / "test").rename(tmp_path / name)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "notes.txt").touch()
    train, test = load_domains("ImageFolder", tmp_path)
    assert (tuple(train), list(test)) == (DOMAINS, [name])
    assert pairs(test[name], tmp_path) == class_folders(name, ["ant", "bee"], 4)


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [("photo fly", "fly is no domain"), ("photo photo", "one is named twice")],
)
def test_domains_are_learned_in_the_order_that_is_wanted(tmp_path, wanted, problem):
    write("domains", tmp_path)
    found = list_domains("ImageFolder", tmp_path, wanted=["sketch", "paint"])
    train, test = found.load()
    assert found.names == tuple(train) == tuple(test) == ("sketch", "paint")
    for name, source in train.items():
        assert pairs(source, tmp_path) == those("domains", f"{name}/train")
    expected = f"--domains {wanted}: {problem}, the domains are paint, photo, sketch"
    with pytest.raises(ValueError, match=expected):
        list_domains("ImageFolder", tmp_path, wanted=wanted.split())


# notMNIST


@pytest.mark.parametrize("splits", [("Train", "Test"), ("train", "test"), ("TRAIN", "Test")])
def test_not_mnist_is_read_whatever_the_letter_case(tmp_path, splits):
    write("NotMNIST", tmp_path)
    root = tmp_path / "notMNIST"
    for published, name in zip(("Train", "Test"), splits, strict=True):
        (root / published).rename(root / name)
    for name in ("notes.txt", "._A0.png"):
        (root / splits[0] / "A" / name).touch()
    assert count_classes("notmnist", tmp_path) == 10
    for source, name, images in zip(load_one("NOTMNIST", tmp_path), splits, (4, 2), strict=True):
        assert source.classes == list("ABCDEFGHIJ")
        assert pairs(source, root) == class_folders(name, source.classes, images)


def test_not_mnist_leaves_out_files_that_are_no_png_and_names_them(tmp_path, caplog):
    write("NotMNIST", tmp_path)
    root = tmp_path / "notMNIST"
    bad = [root / "Test/J/1.png", root / "Train/A/0.png", root / "Train/A/Z.png"]
    bad[0].write_bytes(b"")
    bad[1].write_bytes(b"\x89PNG\r\n\x1a")
    Image.new("L", (28, 28)).save(bad[2], format="gif")
    train, test = load_one("NotMNIST", tmp_path)
    assert pairs(train, tmp_path) == those("NotMNIST", "notMNIST/Train")[1:]
    assert pairs(test, tmp_path) == those("NotMNIST", "notMNIST/Test")[:-1]
    for part in ("left out 3 files", *map(str, bad)):
        assert part in warned(caplog)


# Flowers-102


def test_flowers_are_those_of_the_published_split(tmp_path, monkeypatch):
    write("Flowers102", tmp_path, monkeypatch)
    train, test = load_one("Flowers102", tmp_path)
    for source, number in ((train, 2), (test, 1)):
        assert source.targets.tolist() == np.repeat(range(102), number).tolist()
    os.remove(train.paths[5])
    point(monkeypatch, NOWHERE)
    missing = f"no {os.path.basename(train.paths[5])} in {tmp_path}/flowers-102/jpg"
    assert missing in rejected(load_one, "Flowers102", tmp_path)


# CORe50


@pytest.fixture
def root(tmp_path):
    """The folder of CORe50."""
    write("CORe50", tmp_path)
    return tmp_path / "core50_128x128"


@pytest.fixture
def lists(tmp_path, root):
    """The folder of published lists, beside the data."""
    return tmp_path / "batches_filelists" / "NI_inc" / "run0"


def as_list(source, root):
    return "".join(f"{name} {label}\n" for name, label in pairs(source, root))


@pytest.mark.parametrize("place", [".", "core50_128x128"])
def test_core50_sessions_are_domains_in_their_order(tmp_path, root, place):
    data_path = tmp_path / place
    assert count_classes("CORe50", data_path) == list_domains("core50", data_path).classes == 3
    train, test = load_domains("CORe50", data_path)
    assert list(train) == [f"s{number}" for number in TRAIN_SESSIONS]
    assert list(test) == ["s3+s7+s10"]
    assert all(part.classes == ["o1", "o2", "o10"] for part in (*train.values(), *test.values()))
    for number, source in zip(TRAIN_SESSIONS, train.values(), strict=True):
        assert as_list(source, root) == core50_list([number])
    some, same = load_domains("CORe50", data_path, wanted=["s11", "s2"])
    assert [as_list(x, root) for x in some.values()] == [core50_list([11]), core50_list([2])]
    assert list(same) == list(test)
    joined, joined_test = load_one("CORe50", data_path)  # without domains
    assert as_list(joined, root) == core50_list(TRAIN_SESSIONS)
    for source in (test["s3+s7+s10"], joined_test):
        assert as_list(source, root) == core50_list([3, 7, 10])


def test_file_lists_are_domains_in_their_order(tmp_path, root, lists, monkeypatch):
    for name in ("readme.txt", "train_batch_99999999999_filelist.txt"):  # would be as many domains
        (lists / name).write_text("not a list")
    reversed_list = lists / "train_batch_03_filelist.txt"
    lines = reversed_list.read_text().splitlines()[::-1]
    reversed_list.write_bytes("\r\n \r\n".join(lines).encode())
    for i in range(8, 102):
        copy = lists / f"train_batch_{i:02}_filelist.txt"
        shutil.copy(lists / "train_batch_00_filelist.txt", copy)
    names = list_domains("CORe50", tmp_path, lists).names
    assert list(names) == [f"batch_{i:02}" for i in range(102)]
    looked, scandir = [], os.scandir
    monkeypatch.setattr("os.scandir", lambda folder: looked.append(folder) or scandir(folder))
    train, test = load_domains("CORe50", tmp_path, lists)
    objects = [str(path) for path in looked if os.path.basename(path).startswith("o")]
    assert len(objects) == len(set(objects)) == 33  # each is looked into once
    assert (tuple(train), list(test)) == (names, ["test"])
    for i, session in enumerate(reversed(TRAIN_SESSIONS)):
        expected = core50_list([session]).splitlines()[:: -1 if i == 3 else 1]
        assert as_list(train[f"batch_{i:02}"], root).splitlines() == expected
    assert as_list(test["test"], root) == core50_list([3, 7, 10])
    assert train["batch_03"].classes == test["test"].classes == ["o1", "o2", "o10"]


IMAGE = "s11/o1/C_11_01_000.png"


@pytest.mark.parametrize("line", [
    f"{IMAGE} 1", f"{IMAGE} 3", f"{IMAGE} -1", IMAGE, f"{IMAGE} o1", f"{IMAGE} 0 0",
    "s11/o1/C_11_01_999.png 0", "s12/o1/C_12_01_000.png 0", "s11/o1 0",
    "s11/o1/x/C_11_01_000.png 0", "/etc/passwd 0", f"../core50_128x128/{IMAGE} 0",
    "s11/o1/.. 0", "s12/o7/C_01_01_000.png 0", "ÿþ 0",
])  # fmt: skip
def test_file_list_line_is_rejected_with_its_number(tmp_path, root, lists, line):
    shutil.copytree(root / "s1" / "o1", root / "s12" / "o7")
    right = f"'{IMAGE} 0'" if line.split()[0] == IMAGE else "an image of s1 to s11 and its"
    for path in (lists / "test_filelist.txt", lists / "train_batch_02_filelist.txt"):
        lines = path.read_text().splitlines()
        path.write_text("\n".join([*lines[:3], line, *lines[3:]]), encoding="latin-1")
        message = rejected(load_domains, "CORe50", tmp_path, lists)
        assert message.startswith(f"{path}, line 4: '")
        assert f"is not {right}" in message


def test_missing_empty_or_unreadable_file_list_is_named(tmp_path, lists):
    def assert_rejected(call, problem, folder=lists):
        message = rejected(call, "CORe50", tmp_path, folder)
        assert message.startswith(f"{problem}; expected train_batch_00_filelist.txt"), message

    path, test = lists / "train_batch_01_filelist.txt", lists / "test_filelist.txt"
    for content in ("", "\n\n"):
        path.write_text(content)
        assert_rejected(load_domains, f"{path}: the list is empty")
    path.unlink()
    assert_rejected(list_domains, f"no {path.name} in {lists}")
    os.mkfifo(path)
    message = rejected(load_domains, "CORe50", tmp_path, lists)
    assert message == f"{path}: is no regular file"
    test.unlink()
    assert_rejected(list_domains, f"no {test.name} in {lists}")
    empty(lists)
    assert_rejected(list_domains, f"no train_batch_00_filelist.txt, {test.name} in {lists}")
    assert_rejected(list_domains, f"no folder {lists}/none", lists / "none")


def test_digest_tells_files_and_labels_apart_wherever_they_are(tmp_path, root):
    train, _ = load_domains("CORe50", tmp_path)
    digests = {source.digest() for source in train.values()}
    assert len(digests) == len(train)
    shutil.copytree(root, tmp_path / "moved" / root.name)
    again, _ = load_domains("CORe50", tmp_path / "moved")
    assert {source.digest() for source in again.values()} == digests
    joined = ConcatSource(list(train.values()), train["s1"].classes)
    swapped = ConcatSource(list(reversed(train.values())), train["s1"].classes)
    assert joined.digest() != swapped.digest()


# ImageNet-R

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


@pytest.mark.parametrize("place", [".", "imagenet-r"])
def test_imagenet_r_is_read_from_the_true_layout(tmp_path, place):
    write("Imagenet-R", tmp_path)
    for other in ("misc", "n0144353", "n01443537x"):
        (tmp_path / "imagenet-r" / other).mkdir()
    (tmp_path / "imagenet-r" / "README.txt").write_text("n01443537 goldfish\n")
    assert count_classes("ImagenetR", tmp_path / place) == 3
    train, test = load_one("Split-ImageNet-R", tmp_path / place)
    assert train.classes == test.classes == list(WNIDS)
    assert train.targets.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert test.targets.tolist() == [0] * 2 + [1] * 2 + [2] * 2
    assert sorted(pairs(train, tmp_path) + pairs(test, tmp_path)) == FOLDERS["Imagenet-R"]


def test_imagenet_r_split_depends_on_nothing_but_names(tmp_path):
    write_renditions(tmp_path / "one" / "imagenet-r", RENDITIONS)
    write_renditions(tmp_path / "other" / "imagenet-r", RENDITIONS[::-1], WNIDS[1:])
    before = sorted((tmp_path / "one").rglob("*"))
    splits = load_one("Imagenet-R", tmp_path / "one")
    expected = ["art_0.jpg", "sketch_5.jpg"]  # the least two of 8 / 5, rounded
    rest = [name for name in RENDITIONS if name not in expected]
    fewer = load_one("Imagenet-R", tmp_path / "other")
    for source, part, names in zip(splits, fewer, (rest, expected), strict=True):
        assert [os.path.basename(path) for path in source.paths[: len(names)]] == names
        others = [path.replace("/other/", "/one/") for path in part.paths]
        assert source.paths[len(names) :] == others
    assert sorted((tmp_path / "one").rglob("*")) == before


@pytest.mark.parametrize(("images", "tests"), [(2, 1), (3, 1), (7, 1), (8, 2), (12, 2), (13, 3)])
def test_imagenet_r_fifth_is_rounded(tmp_path, images, tests):
    write_renditions(tmp_path / "imagenet-r", [f"{i}.jpg" for i in range(images)])
    train, test = load_one("Imagenet-R", tmp_path)
    assert np.bincount(test.targets).tolist() == [tests] * 3
    assert np.bincount(train.targets).tolist() == [images - tests] * 3


# What is wrong with the folders


def empty(folder):
    for path in folder.rglob("*.*"):
        path.unlink()


def empty_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def all_but_first(folder):
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_file(), path.name))[1:]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def rename_to_fly(folder):
    folder.rename(folder.with_name("fly"))


def all_in_one(folder):
    shutil.copytree(folder / "ant", folder / "images")
    [shutil.rmtree(folder / name) for name in ("ant", "bee", "cat")]


def split_already(folder):
    empty_folder(folder)
    [(folder / split).mkdir() for split in ("train", "test")]


#: The data, what is done to which folder of them, and parts of the message.
LAYOUT_PROBLEMS = [
    ("ImageFolder", shutil.rmtree, "", "is not a folder", "/train/<class>", "val/<class>"),
    ("ImageFolder", shutil.rmtree, "val", "no folder val or test in {root}; ", "val/<class>"),
    ("ImageFolder", empty_folder, "train", "no class folder in {root}/train; ", "/train/<class>"),
    ("ImageFolder", rename_to_fly, "val/bee", "only in {root}/train: bee;", "{root}/val: fly)"),
    ("domains", shutil.rmtree, "", "is not a folder", "{root}/<domain>/train/<class>/*"),
    ("domains", empty_folder, "", "no domain in {root}; ", "<domain>/test/<class>"),
    ("domains", os.mkdir, "train", "{root} holds a folder train", "<domain>/train/<class>"),
    ("domains", shutil.rmtree, "photo/train", "no folder train in {root}/photo; ", "<domain>"),
    ("domains", shutil.rmtree, "photo/test", "no folder val or test in {root}/photo; ", "<domain>"),
    ("domains", shutil.rmtree, "photo/test/ant", "{root}/photo/test differ", "train: ant)"),
    ("domains", os.mkdir, "photo/train/fly", "of {root}/paint/train and", "photo/train: fly)"),
    ("domains with common test", os.mkdir, "test/fly", "only in {root}/test: fly"),
    ("NotMNIST", shutil.rmtree, "Test", "and 5 more in {root}/Test; ", "<A to J>", "Adversarial"),
    ("NotMNIST", shutil.rmtree, "Train/C", "no folder C in {root}/Train; "),
    ("CORe50", shutil.rmtree, "s7", "no session s7 in {root}; ", "s1/o1/C_"),
    ("CORe50", shutil.rmtree, "s9/o2", "only in {root}/s1: o2"),
    ("CORe50", empty_folder, "s1", "no class folder in {root}/s1; "),
    ("Imagenet-R", empty_folder, "", "no class folder in {root}", "hendrycks"),
    ("Imagenet-R", split_already, "", "ImageFolder --data-path {root} to use"),
    ("ImageFolder", all_in_one, "val", "{root}/val holds all images in one folder, images: move"),
]
IMAGE_PROBLEMS = [
    ("ImageFolder", empty, "train", "no image in {root}/train/ant, bee, cat (3 of 3 folders; look"),
    ("ImageFolder", empty, "val/ant", "no image in {root}/val/ant (1 of 3", ": add images"),
    ("domains", empty, "photo/train/bee", "no image in {root}/photo/train/bee (1 of 2"),
    ("NotMNIST", empty, "Test/C", "no image in {root}/Test/C"),
    ("CORe50", empty, "s9/o2", "no image in {root}/s9/o2"),
    ("Imagenet-R", all_but_first, WNIDS[1], "only one image in {root}/n01484850"),
]


@pytest.mark.parametrize("problem", [*LAYOUT_PROBLEMS, *IMAGE_PROBLEMS])
def test_what_is_wrong_with_folders_is_named(tmp_path, problem):
    written, change, folder, *parts = problem
    name = "ImageFolder" if written.startswith("domains") else written
    data_path = tmp_path / "data"
    write(written, data_path)
    root = data_path / getattr(SOURCES[name], "folder", "")
    change(root / folder)
    calls = [(count_classes, load_one)] if name == written else []
    calls += [(list_domains, load_domains)] if written == "CORe50" or name != written else []
    for at_once, later in calls:
        for call in [at_once, later] if problem in LAYOUT_PROBLEMS else [later]:
            message = rejected(call, name, data_path)
            assert all(part.format(root=root) in message for part in parts), message


@pytest.mark.parametrize(("written", "given", "where"), [
    ("ImageFolder", "up/data/train", "above"), ("ImageFolder", "up/data/train/ant", "above"),
    ("ImageFolder", "up", "below"), ("ImageFolder", ".", "below"),
    ("domains", "up/data/photo", "above"), ("domains", "up/data/photo/train", "above"),
    ("domains", "up", "below"), ("domains", ".", "below"),
    ("Imagenet-R", "up/data/imagenet-r/n01443537", "above"), ("Imagenet-R", "up", "below"),
    ("CORe50", "up/data/core50_128x128/s1/o1", "above"), ("CORe50", ".", "below"),
    ("NotMNIST", "up/data/notMNIST/Train", "above"),
])  # fmt: skip
def test_folder_a_level_too_deep_or_too_high_is_guessed(tmp_path, written, given, where):
    data_path = tmp_path / "up" / "data"
    write(written, data_path)
    call, name = (count_classes, written)
    if written == "domains":
        call, name = list_domains, "ImageFolder"
    message = rejected(call, name, tmp_path / given)
    assert f"; give the folder {where}: --data-path {data_path}" in message


def test_other_layouts_are_named(tmp_path):
    write("domains", tmp_path)
    assert "give --scenario domain-incremental" in rejected(count_classes, "ImageFolder", tmp_path)
    unsplit = tmp_path / "photo" / "train"
    unsplit.rename(tmp_path / "unsplit")
    message = rejected(count_classes, "ImageFolder", tmp_path / "unsplit")
    assert "; its classes are not split: move them to train, and a part of each to val" in message


@pytest.mark.parametrize("name", ["test", "val"])
def test_imagenet_r_that_another_program_has_split_keeps_its_split(tmp_path, name, caplog):
    root, parts = tmp_path / "imagenet-r", (("train", 9), (name, 1))
    splits = [class_folders(split, WNIDS, number, ".jpg") for split, number in parts]
    true_formats.write_images(root, splits[0] + splits[1])
    caplog.set_level("INFO")
    for data_path in (tmp_path, root):
        assert count_classes("Imagenet-R", data_path) == 3
        assert [pairs(x, root) for x in load_one("Imagenet-R", data_path)] == splits
    assert f"Imagenet-R is split already: using {root}/train and {root}/{name}" in caplog.text
    message = rejected(count_classes, "Imagenet-R", root / "train")
    assert "; give the folder above: --data-path " in message
