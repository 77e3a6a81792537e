import copy
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

import benchmark
import engine
from benchmarks import clocks, measure
from benchmarks import workload as benchmark_workload
from benchmarks.baseline import TwoCopies
from benchmarks.table import table
from benchmarks.workload import Ours, plain_model, plain_stream, read_workload, standing_in
from continual_datasets.readers import registry
from experiment import build, speed
from experiment.signals import Preempted
from training.evaluation import evaluate
from training.losses import class_mask
from training.update import OptimizerStep

close = torch.testing.assert_close

C, D, DEPTH, N, P, M, MLP = 10, 16, 3, 16, 25, 10, 64
TINY = [
    "--model-kwargs", f"embed_dim={D}", f"depth={DEPTH}", "num_heads=2", "patch_size=8",
    "--input-size", "32", "--num_workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(no_launcher):
    pass


@pytest.fixture(scope="module")
def workload():
    return read_workload([*TINY, "--vote_group_size", "8", "--lr", "1"])


@pytest.fixture
def pair(workload):
    """Our model and the baseline with the same weights, whose images choose different prompts."""
    model = plain_model(workload, C)
    model.prompt.prompt_key.data = keys_that_divide(model.eval().query(pictures(64, seed=1)[0]))
    options = build.engine_options(workload.plain, workload.device, tuple(range(C)))
    baseline = TwoCopies(
        copy.deepcopy(model),
        workload.lr,
        options,
        build.loader_options(workload.plain, workload.processes, 16),
        workload.plain.transforms,
    )
    return model, baseline, options


def pictures(number=16, seed=0):
    """Images of different colours, so that their queries differ."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(number, 3, 1, 1, generator=generator)
    images = 4 * colours * torch.rand(number, 3, 32, 32, generator=generator)
    return images, torch.arange(number) % 4


def keys_that_divide(queries):
    """Keys for the ways in which queries differ."""
    directions = torch.linalg.svd(queries - queries.mean(dim=0)).Vh[: M // 2]
    return torch.cat([directions, -directions])


# The baseline computes the same


def test_baseline_gives_equal_logits_and_pull_term(pair):
    model, baseline, _ = pair
    images, _ = pictures()
    ours = model.eval()(images, vote_group_size=8)
    logits, reduce_sim = baseline._forward(images)
    close(logits, ours["logits"], rtol=1e-5, atol=1e-5)
    close(reduce_sim, ours["reduce_sim"])
    rows = ours["prompt_idx"].sort(dim=1).values
    assert (rows[0] != rows[8]).any(), "both groups chose the same"


@pytest.mark.parametrize(("train_mask", "clip_grad"), [(True, 1.0), (False, 1.0), (True, 0.01)])
def test_baseline_gives_equal_loss_gradients_and_parameters(workload, pair, train_mask, clip_grad):
    model, baseline, options = pair
    options = replace(options, train_mask=train_mask, clip_grad=clip_grad)
    baseline.options = options
    images, targets = pictures()
    classes = (0, 1, 2, 3)
    mask = class_mask(classes, C, workload.device)
    make_optimizer = partial(
        build.make_optimizer, workload.settings.optimizer, model, lr=workload.lr
    )
    update = OptimizerStep(
        model.train().parameters(), make_optimizer, options.device, options.clip_grad
    )
    for _ in range(3):
        target = engine.StepTarget(0, mask if train_mask else None, global_size=16)
        ours = engine.train_step(model, update, (images, targets), target, options)
        theirs = baseline.train_step(images, targets, classes)
        close(torch.tensor(theirs[0]), ours[0], rtol=1e-5, atol=1e-5)
        assert theirs[1:] == pytest.approx((100 * ours[1:3] / 16).tolist())
        for name in ("prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"):
            one, other = model.get_parameter(name), baseline.model.get_parameter(name)
            close(other.grad, one.grad, rtol=1e-4, atol=1e-6)
            close(other, one, rtol=1e-4, atol=1e-5)
    assert model.prompt.prompt.grad.abs().max() > 0
    assert all(p.grad is None for p in baseline.original.parameters())


def test_baseline_gives_equal_batchwise_accuracy():
    all_classes = ["--dataset", "digits", "--num_tasks", "2", "--batch-size", "8"]
    workload = read_workload([*TINY, *all_classes])
    ours, stream = Ours(workload), plain_stream(workload)
    baseline = benchmark_workload.two_copies(workload, stream)
    baseline.model.load_state_dict(
        {n.replace("backbone.", "vit."): p for n, p in ours.model.state_dict().items()}
    )
    baseline.original.load_state_dict(ours.model.backbone.state_dict())
    part = stream.tasks[-1].test_sets[1]
    result = evaluate(ours.model, ours.run.test_loader(part), part, ours.loop)
    assert baseline.evaluate(part) == pytest.approx(result.stats["batch"], rel=1e-5)


@pytest.mark.parametrize("size", [32, 40])
def test_baseline_shows_equal_test_images(size):
    workload = read_workload([*TINY, "--input-size", str(size)])
    ours, stream = Ours(workload), plain_stream(workload)
    part = stream.test_sets[0]
    baseline = benchmark_workload.two_copies(workload, stream).test_loader(part)
    pairs = zip(ours.run.test_loader(part), baseline, strict=True)
    for (images, targets), (same_images, same_targets) in pairs:
        close(same_images, images)
        assert torch.equal(same_targets, targets)


def test_baseline_trains_on_all_images_of_a_task(workload):
    stream = plain_stream(workload)
    baseline = benchmark_workload.two_copies(workload, stream)
    task = stream.tasks[1]
    batches = list(baseline.train_loader(stream, task))
    assert sum(len(targets) for _, targets in batches) == len(task.data)
    assert {int(t) for _, targets in batches for t in targets} == set(task.classes)
    assert batches[0][0].shape == (16, 3, 32, 32)
    assert 0 <= batches[0][0].min() < batches[0][0].max() <= 1


def test_baseline_rejects_a_loss_that_is_no_number(pair):
    images, targets = pictures()
    with pytest.raises(RuntimeError, match="loss is nan"):
        pair[1].train_step(images * torch.nan, targets, (0, 1, 2, 3))


def test_baseline_saves_the_whole_model(pair, tmp_path):
    model, baseline, _ = pair
    baseline.save(tmp_path / "all.pth")
    state = torch.load(tmp_path / "all.pth", weights_only=True)["model"]
    assert sum(v.numel() for v in state.values()) == sum(p.numel() for p in model.parameters())


# FLOP


def test_flop_are_those_of_the_matrix_products(workload):
    def block(tokens, read):
        linear = 2 * (2 * tokens * D * D + 2 * read * D * D + 2 * read * D * 4 * D)
        return linear, 2 * 2 * read * tokens * D

    def blocks(tokens, read):
        each = [block(tokens, tokens)] * (DEPTH - 1) + [block(tokens, read)]
        return [sum(parts) for parts in zip(*each, strict=True)]

    embed, head, match = 2 * N * 3 * 64 * D, 2 * D * C, 2 * D * M
    linear, attention = blocks(1 + P + N, P)
    assert measure.count_flop(workload, C) == {
        "query": sum(blocks(1 + N, 1)),
        "prompted forward": embed + match + linear + attention + head,
        "backward": match + linear + 2 * attention + 2 * head,
        "update": 0,
    }


def test_flop_of_vit_base_agree_with_torchprofile():
    args = read_workload([*TINY, "--model-kwargs", "depth=4", "--input-size", "128"])
    flop = measure.count_flop(args, C)
    gmacs = speed.count_gmacs(plain_model(args, C), torch.zeros(1, 3, 128, 128))
    embed = 2 * 64 * 3 * 16**2 * 192
    assert flop["query"] + embed == pytest.approx(2e9 * gmacs["query"], rel=0.01)
    assert flop["prompted forward"] == pytest.approx(2e9 * gmacs["prompted"], rel=0.01)


# Measuring


def test_turns_are_taken_and_the_first_left_out():
    calls = []

    def work(name):
        calls.append(name)
        return len(calls)

    works = {name: partial(work, name) for name in "ab"}
    assert clocks.take_turns(works, repetitions=2, warm_up=1) == {"a": [3, 5], "b": [4, 6]}
    assert "".join(calls) == "ababab"


def test_ratio_is_one_of_medians():
    found = clocks.comparison({"ours": [1.0, 9.0, 2.0], "baseline": [4.0, 3.0, 100.0]})
    assert found["ours"] == {
        "median": 2.0, "lowest": 1.0, "highest": 9.0, "all": [1.0, 9.0, 2.0], "ratio": 2.0
    }  # fmt: skip
    assert found["baseline"]["ratio"] == 1


def test_step_is_split_where_its_passes_begin_and_end(workload):
    ours = Ours(workload)
    (batch, *_) = ours.batches()
    run_query = ours.model.run_query
    ticks = iter([0.0, 1.0, 3.0, 7.0, 15.0, 31.0])
    marks = ours.split_step(batch, lambda: next(ticks))
    assert marks.stages() == {
        "query": 2, "prompted forward": 5, "backward": 8, "update": 16
    }  # fmt: skip
    assert marks.at_ends() == {
        "query": 3, "prompted forward": 7, "backward": 15, "update": 31
    }  # fmt: skip
    assert ours.model.run_query is run_query
    assert "backward" not in vars(ours.update)


def test_share_overruled_counts_images_that_a_later_evaluation_computes_twice(monkeypatch):
    ours = Ours(read_workload([*TINY, "--vote_group_size", "4"]))
    ours.evaluate()
    version = ours.model.query_version()
    queries = [ours.loop.queries.of(part, version) for part in ours.run.stream.test_sets]
    ours.model.prompt.prompt_key.data = keys_that_divide(torch.cat(queries))
    share, computed = ours.share_overruled(), 0
    forward = ours.model.forward

    def counted(images, *args, **kwargs):
        nonlocal computed
        computed += len(images)
        return forward(images, *args, **kwargs)

    monkeypatch.setattr(ours.model, "forward", counted)
    ours.evaluate()
    number = sum(len(part.data) for part in ours.run.stream.test_sets)
    assert 0 < share < 1
    assert computed == round(number * (1 + share))


def test_only_later_evaluations_know_the_queries(workload, monkeypatch):
    bench, known = measure.Bench(workload, repetitions=2, warm_up=1), []
    evaluate = bench.ours.evaluate

    def watched():
        version = bench.ours.model.query_version()
        part = bench.ours.run.stream.test_sets[0]
        known.append(bench.ours.loop.queries.of(part, version) is not None)
        evaluate()

    monkeypatch.setattr(bench.ours, "evaluate", watched)
    found = measure.measure_evaluation(bench)
    assert known == 3 * [False, True]
    query = bench.flop["query"]
    assert found["first"]["flop"] - found["later"]["flop"] == pytest.approx(query)


def test_evaluation_begins_with_what_the_first_steps_learned(workload):
    ours = Ours(workload)
    untrained = ours.model.trained_state()
    ours.learn()
    learned = ours.model.trained_state()
    assert not torch.equal(learned["prompt.prompt_key"], untrained["prompt.prompt_key"])
    ours.steps(next(ours.batches()), 2)
    assert not torch.equal(ours.model.prompt.prompt_key, learned["prompt.prompt_key"])
    ours.learn()
    again = ours.model.trained_state()
    assert all(torch.equal(again[name], value) for name, value in learned.items())


def test_product_has_the_shape_that_is_reported(workload):
    model = plain_model(workload, C)
    shapes = measure.matrix_products(model, 4, torch.device("cpu"))
    assert shapes["MLP"] == (4 * (1 + P + N), D, MLP)
    clocks.matrix_product(shapes["MLP"], torch.bfloat16, torch.device("cpu"), 2)()


def test_checkpoint_of_vit_base_is_counted_without_building_it():
    learned = 122_980 + 25 * 768
    assert measure._bytes_of_vit_base() == {
        "ours": 4 * learned, "baseline": 4 * (85_798_656 + learned)
    }  # fmt: skip


def test_baseline_rounds_as_torch_does(workload):
    torch.set_float32_matmul_precision("high")
    try:
        with measure._torch_defaults():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


# The command line


def test_flags_and_configurations_win_over_the_workload():
    usual = read_workload([]).settings
    assert (usual.model.model, usual.model.pretrained) == ("vit_tiny_patch16_224", False)
    assert (usual.data.dataset, usual.tasks.num_tasks) == ("digits", 2)
    assert (usual.optimizer.batch_size, usual.transforms.input_size) == (16, 224)
    given = read_workload(["digits_l2p", "--epochs", "2", "--output_dir", "x"]).settings
    assert (given.tasks.num_tasks, given.tasks.classes_per_task) == (5, None)
    assert given.optimizer.epochs == 2
    assert given.model.pretrained == "assets/glyph_vit.safetensors"
    assert given.run.output_dir == ""


def test_baseline_stays_plain():
    workload = read_workload(["--amp", "bf16", "--compile", "--data_on_device", "true"])
    assert benchmark_workload.compute_dtype(workload.settings) == torch.bfloat16
    assert benchmark_workload.compute_dtype(workload.plain) == torch.float32
    settings, plain = workload.settings, workload.plain
    assert settings.precision.compile
    assert not plain.precision.compile
    assert settings.data.data_on_device is not plain.data.data_on_device is False


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--only", "stages,speed"], "'speed' is none of stages, step, evaluation, run, memory"),
        (["--repetitions", "0"], "'0' is no whole number of at least 1"),
        (["--synthetic", "5000"], "not two numbers of images"),
        (["--synthetic", "50,1000"], "not two numbers of images"),
        (["--head_type", "token"], "--head_type token: the baseline supports prompt only"),
        (["--buffer_size", "20"], "--buffer_size 20: the baseline supports none only"),
        (["--batchsize", "4"], "--batchsize is no option: did you mean --batch"),
        (["--synthetic", "200,100", "--dataset", "digits"], "stands in for CIFAR100 alone"),
        (["--batch-size", "0"], "--batch-size 0: must be at least 1"),
    ],
)
def test_rejected_command_line_reports_why(argv, message, capsys):
    try:
        code = benchmark.main(argv)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert message in capsys.readouterr().err


def test_everything_wrong_is_reported_at_once(capsys):
    assert benchmark.main(["--head_type", "token", "--opt", "sgd", "--epochs", "0"]) == 2
    printed = capsys.readouterr().err
    assert printed.count("  - ") == 3
    assert printed.startswith("benchmark.py: this command line cannot run:\n")


def test_launcher_is_rejected(monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    assert benchmark.main([]) == 2
    assert "the baseline is a single process" in capsys.readouterr().err


def test_missing_weights_are_reported(monkeypatch, tmp_path, capsys):
    path = tmp_path / "broken.pth"
    path.write_bytes(b"no weights")
    assert benchmark.main([*TINY, "--pretrained", str(path)]) == 1
    assert str(path) in capsys.readouterr().err


def test_random_images_stand_in_for_cifar100():
    real = registry.SOURCES["CIFAR100"]
    with standing_in((300, 200)):
        workload = read_workload(TINY, (300, 200))
        stream = plain_stream(workload)
    assert registry.SOURCES["CIFAR100"] is real
    assert [len(task.data) for task in stream.tasks] == [30] * 10
    assert [len(part.data) for part in stream.test_sets] == [20] * 10
    assert stream.num_classes == 100
    image = np.asarray(stream.train[0][0])
    assert image.shape == (32, 32, 3)
    assert image.std() > 50
    assert benchmark_workload.describe(workload)["data"] == "300 and 200 random images"


# What it says


def made_up():
    """A report of round numbers."""

    def times(median):
        return {"median": median, "lowest": median / 2, "highest": 2 * median, "all": [median]}

    def ways(**medians):
        return {n: {**times(m), "ratio": medians["baseline"] / m} for n, m in medians.items()}

    stage = {**times(0.05), "flop": 4e9, "flop_per_second": 8e10, "of_best": 0.8}
    product = {**times(0.02), "shape": [1024, 1024, 1024], "flop_per_second": 1e11}
    later = {"flop": 3e9, "flop_per_second": 5e10}
    evaluation = ways(first=0.02, later=0.01, baseline=0.03)
    evaluation["later"] |= later
    memory = {
        "ours": {"before": 300.0, "query": 310.0, "highest": 400.0},
        "baseline": {"before": 301.0, "highest": 600.0},
        "ratio": 1.5,
    }
    size = {"ours": 2**19, "baseline": 328 * 2**20, "ratio": 656.0}
    return {
        "date": "2000-01-02T03:04:05",
        "machine": {"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None},
        "versions": {"torch": "2.6.0", "torchvision": "0.21.0", "timm": "1.0.20"},
        "workload": {
            "model": "vit_tiny", "weights": "random", "input_size": 224, "batch_size": 16,
            "vote_group_size": 8, "dtype": "bfloat16", "tf32": False, "compile": True,
            "grad_checkpointing": False, "data_on_device": True,
            "data": "digits", "tasks": 3, "epochs": 1, "workers": 2,
        },
        "repetitions": 5,
        "warm_up": 1,
        "stages": {
            "products": {"square 1024": product},
            "best": 1e11,
            "of_step": {"data": times(0.003), "query": stage},
        },
        "step": ways(ours=0.1, baseline=0.15),
        "evaluation": {**evaluation, "images": 108, "share_overruled": 0.25},
        "run": ways(ours=10.0, baseline=12.0),
        "memory": {"step": memory, "evaluation": memory},
        "checkpoints": {"workload": size, "vit_base": size},
    }  # fmt: skip


def test_table_shows_the_report():
    text = table(made_up())
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "vit_tiny (weights: random), 224 pixels, bfloat16, compile, data_on_device" in rows
    assert "digits, 3 tasks, epochs: 1; 16 images a step, vote group of 8, 2 workers" in rows
    assert "A CPU, 2 cores, 1 threads" in rows
    assert "medians of 5 turns, after 1 to warm up" in rows
    assert "1024 x 1024 x 1024 (square 1024) 100.0 best" in rows
    assert "data 3.00" in rows
    assert "query 50.00 4 80.0 80.0 % 310" in rows
    assert "training step, ms 100.00 (50.00 - 200.00) 150.00 (75.00 - 300.00) 1.50" in rows
    assert "later evaluation, ms an image 10.00 (5.00 - 20.00) 30.00 (15.00 - 60.00) 3.00" in rows
    assert "whole run, s 10.00 (5.00 - 20.00) 12.00 (6.00 - 24.00) 1.20" in rows
    assert "peak memory, step, MiB 400 (300 before) 600 (301) 1.50" in rows
    assert "checkpoint, ViT-B/16, MiB 0.50 328 656.00" in rows
    assert "the vote overruled 25.0 % of the 108 test images," in text
    assert max(map(len, text.splitlines())) <= 100


@pytest.mark.parametrize("part", ["stages", "step", "evaluation", "run", "memory"])
def test_table_leaves_out_what_was_not_measured(part):
    report = made_up()
    wanted = {part, "checkpoints"} if part == "memory" else {part}
    parts = {"stages", "step", "evaluation", "run", "memory", "checkpoints"} - wanted
    lines = table({k: v for k, v in report.items() if k not in parts}).splitlines()
    whole = table(report).splitlines()
    assert len(lines) < len(whole)
    assert all(any(line.startswith(some) for line in whole) for some in lines)
    nothing = table({k: v for k, v in report.items() if k not in parts | wanted})
    assert len(nothing.splitlines()) == 5
    assert len(lines) > 5


def test_steps_are_measured_and_written_down(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "_SQUARES", {"cpu": (64,)})
    monkeypatch.setattr(measure, "_TURN_FLOP", {"cpu": 1e6})
    monkeypatch.setattr(measure, "_TURN_SECONDS", 0.01)
    path = tmp_path / "report.json"
    argv = [*TINY, "--only", "stages,step", "--repetitions", "2", "--json", str(path)]
    assert benchmark.main(argv) == 0
    report = json.loads(path.read_text())
    assert capsys.readouterr().out == table(report) + "\n"
    assert {"stages", "step"} < set(report)
    assert not {"run", "evaluation", "memory"} & set(report)
    stages = report["stages"]["of_step"]
    assert list(stages) == ["data", "query", "prompted forward", "backward", "update", "whole step"]
    assert all(len(stage["all"]) == 2 and stage["lowest"] > 0 for stage in stages.values())
    query = stages["query"]
    assert query["flop"] == 16 * measure.count_flop(read_workload(TINY), C)["query"]
    assert query["flop_per_second"] == pytest.approx(query["flop"] / query["median"])
    assert query["of_best"] == pytest.approx(query["flop_per_second"] / report["stages"]["best"])
    assert len(report["step"]["ours"]["all"]) == len(report["step"]["baseline"]["all"]) == 2
    assert report["settings"]["input_size"] == 32
    assert report["machine"]["threads"] == torch.get_num_threads()


@pytest.mark.slow
def test_everything_is_measured(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(measure, "_SQUARES", {"cpu": (64,)})
    path = tmp_path / "report.json"
    argv = [*TINY, "--synthetic", "200,100", "--num_tasks", "2", "--repetitions", "1"]
    assert benchmark.main([*argv, "--warm_up", "0", "--json", str(path)]) == 0
    report = json.loads(path.read_text())
    assert capsys.readouterr().out == table(report) + "\n"
    assert report["run"]["training_images"] == 200
    assert report["run"]["test_images"] == 150  # of the first task twice
    assert report["evaluation"]["images"] == 100
    for work in ("step", "evaluation"):
        for way in ("ours", "baseline"):
            levels = report["memory"][work][way]
            assert 0 < levels["before"] < levels["highest"]
    levels = report["memory"]["step"]["ours"]
    assert levels["before"] < levels["query"] <= levels["backward"] <= levels["highest"]
    sizes = report["checkpoints"]["workload"]
    assert sizes["ratio"] == sizes["baseline"] / sizes["ours"] > 1


@pytest.mark.parametrize("file", [".", "gone/x.json"])
def test_file_that_cannot_be_written_is_rejected_before_anything_is_measured(
    file, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as rejection:
        benchmark.main(["--json", file])
    assert rejection.value.code == 2
    assert "is no file in a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "word"),
    [(KeyboardInterrupt(), 130, "interrupted"), (Preempted("SIGTERM"), 1, "ended by a signal")],
)
def test_signal_ends_it_in_one_line(error, code, word, monkeypatch, capsys):
    def interrupted(*args):
        raise error

    monkeypatch.setattr(benchmark, "measure", interrupted)
    assert benchmark.main([]) == code
    assert capsys.readouterr().err == f"benchmark.py: {word}\n"
