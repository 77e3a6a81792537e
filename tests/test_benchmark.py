import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmark
from benchmarks import measure
from benchmarks.programs import Program, TwoCopies, read_workload
from cli.settings import Settings
from continual_datasets.readers import registry
from experiment import speed
from experiment.session import explain
from experiment.signals import Preempted
from helpers.process_groups import by_launcher, context
from helpers.tables import assert_says, cases
from helpers.tiny_model import keys_that_divide, pictures

close = torch.testing.assert_close

D, DEPTH, N, P, M = 16, 3, 16, 25, 10
TINY = [
    "--model-kwargs", f"embed_dim={D}", f"depth={DEPTH}", "num_heads=2", "patch_size=8",
    "--input-size", "32", "--num_workers", "0", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _alone(no_launcher, monkeypatch):
    monkeypatch.setitem(registry.SOURCES, "CIFAR100", registry.SOURCES["CIFAR100"])


@pytest.fixture
def pair():
    """The program and the baseline, with the same weights; images choose different prompts."""
    digits = ["--dataset", "digits", "--num_tasks", "2", "--vote_group_size", "8", "--lr", "1"]
    workload = read_workload([*TINY, *digits])
    programs = Program(workload), TwoCopies(workload)
    queries = programs[0].model.eval().query(images(M, seed=1))
    for program in programs:
        program.model.prompt.prompt_key.data = keys_that_divide(queries)
    return programs


def images(number=16, seed=0):
    return pictures(number, torch.Generator().manual_seed(seed), side=32)


# The baseline computes the same in its own way


def test_baseline_gives_equal_logits_gradients_parameters_and_accuracies(pair):
    many = images(64)
    nearest = pair[0].model.eval()(many, vote_group_size=1)["prompt_idx"][:, 0]
    batch = many[nearest.argsort()[[*range(8), *range(-8, 0)]]]  # two groups that differ
    one, other = (program.model.eval()(batch, vote_group_size=8) for program in pair)
    close(other["logits"], one["logits"], rtol=1e-5, atol=1e-5)
    close(other["reduce_sim"], one["reduce_sim"])
    rows = one["prompt_idx"].sort(dim=1).values
    assert (rows[0] != rows[8]).any(), "both groups chose the same"
    targets = torch.tensor(pair[0].stream.tasks[0].classes)[torch.arange(16) % 4]
    for _ in range(3):
        for program in pair:
            program.steps((batch, targets))
        for name in ("prompt.prompt", "prompt.prompt_key", "head.weight", "head.bias"):
            one, other = (program.model.get_parameter(name) for program in pair)
            close(other.grad, one.grad, rtol=1e-4, atol=1e-6)
            close(other, one, rtol=1e-4, atol=1e-5)
            assert one.grad.abs().max() > 0
    assert all(p.grad is None for p in pair[1].model.query_backbone.parameters())
    results = [[found.stats["batch"] for found in program.evaluate()] for program in pair]
    for one, other in zip(*results, strict=True):
        assert other == pytest.approx(one, rel=1e-5)


def test_baseline_computes_all_tokens_of_each_image_once_in_both_copies(pair):
    """Again in every evaluation, but it has no instance-wise accuracy."""
    model, shapes = pair[1].model, ([], [])
    for vit, seen in zip((model.query_backbone, model.backbone), shapes, strict=True):
        vit.blocks[-1].register_forward_hook(lambda _, x, y, seen=seen: seen.append(y.shape))
    for _ in range(2):
        pair[1].evaluate()
    number = sum(len(part.data) for part in pair[1].stream.tasks[-1].test_sets)
    assert [sum(len_ for len_, *_ in seen) for seen in shapes] == [2 * number, 2 * number]
    assert [{tokens for _, tokens, _ in seen} for seen in shapes] == [{1 + N}, {1 + P + N}]
    assert pair[1].loop.read_every == 1


@pytest.mark.slow
def test_baseline_learns_all_tasks_and_saves_the_whole_model(pair, tmp_path):
    model = pair[1].model
    before = model.prompt.prompt_key.clone()
    pair[1].run(tmp_path)
    assert not torch.equal(model.prompt.prompt_key, before)
    assert {path.name for path in tmp_path.iterdir()} == {f"task{n}_checkpoint.pth" for n in (1, 2)}
    state = torch.load(tmp_path / "task2_checkpoint.pth", weights_only=True)["model"]
    assert state.keys() == {name for name, _ in model.public_parameters()}
    assert torch.equal(state["prompt.prompt_key"], model.prompt.prompt_key)


def test_baseline_stays_plain():
    fast = {"amp": "bf16", "compile": True, "grad_checkpointing": True, "data_on_device": True}
    workload = read_workload([*TINY, *(f"--{name}={value}" for name, value in fast.items())])
    assert {name: workload.settings[name] for name in fast} == fast
    baseline = TwoCopies(workload)
    assert baseline.model.amp_dtype is None
    assert not baseline.stream.pipeline.on_device
    assert baseline.loop.settings.precision == Settings().precision
    torch.set_float32_matmul_precision("high")
    assert baseline.seconds(lambda: None) < 1
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cudnn.allow_tf32


# Measuring


def bench_of(**values):
    bench = object.__new__(measure.Bench)
    vars(bench).update(repetitions=3, warm_up=1, **values)
    return bench


def test_backward_counts_gradients_of_activations_only(pair):
    """Once for each layer behind the embeddings, twice for attention."""
    gmacs = speed.count_gmacs(pair[0].model, torch.zeros(1, 3, 32, 32))
    tokens, embedding = 1 + P + N, N * 3 * 64 * D
    attention = 2 * tokens * D * ((DEPTH - 1) * tokens + P) + D * M
    assert 1e9 * (gmacs["backward"] - gmacs["prompted"]) == pytest.approx(attention - embedding)


def test_turns_are_taken_and_the_first_left_out():
    turns = [{"ours": a, "baseline": b} for a, b in ((2, 100), (9, 3), (1, 4), (7, 7))]
    found = bench_of().take_turns(turns.pop)
    assert found["ours"] == {"median": 2, "lowest": 1, "highest": 9, "all": [1, 9, 2], "ratio": 2}
    assert (found["baseline"]["ratio"], turns) == (1, [])


@pytest.mark.slow
def test_later_evaluations_know_the_queries_and_repeat_what_the_vote_overruled(pair, monkeypatch):
    ours, known, evaluate = pair[0], [], pair[0].evaluate

    def queries():
        parts = ours.stream.tasks[-1].test_sets
        return [ours.loop.queries.get(part.index, (None, None))[1] for part in parts]

    monkeypatch.setattr(ours, "evaluate", lambda: known.append(queries()[0] is None) or evaluate())
    monkeypatch.setattr(measure, "WAYS", {"ours": lambda _: ours, "baseline": lambda _: pair[1]})
    monkeypatch.setattr(measure, "_BATCHES", 0)
    evaluate()
    ours.model.prompt.prompt_key.data = keys_that_divide(torch.cat(queries())[:M])
    found = measure.measure_evaluation(bench_of(workload=None))
    assert known == 4 * [True, False]
    overruled = 0
    for of_part in queries():
        chosen = ours.model.eval().prompt(of_part, vote_group_size=8)
        rows = chosen.prompt_idx.sort(dim=1).values, chosen.own_prompt_idx.sort(dim=1).values
        overruled += int((rows[0] != rows[1]).any(dim=1).sum())
    assert found["share_overruled"] == pytest.approx(overruled / found["images"])
    assert 0 < found["share_overruled"] < 1


# The command line


def test_flags_and_configurations_win_over_the_workload():
    usual = read_workload([]).settings.stored()
    wanted = {"dataset": "digits", "num_tasks": 2, "batch_size": 16, "input_size": 224}
    wanted |= {"model": "vit_tiny_patch16_224", "pretrained": False}
    assert {name: usual[name] for name in wanted} == wanted
    given = read_workload(["digits_l2p", "--epochs", "2", "--output_dir", "x"]).settings.stored()
    wanted = {"num_tasks": 5, "classes_per_task": None, "epochs": 2, "output_dir": ""}
    wanted |= {"pretrained": "assets/glyph_vit.safetensors"}
    assert {name: given[name] for name in wanted} == wanted


def test_random_images_stand_in_for_cifar100():
    stream = Program(read_workload(TINY, (300, 200))).stream
    assert [len(task.data) for task in stream.tasks] == [30] * 10
    assert [len(part.data) for part in stream.test_sets] == [20] * 10
    assert stream.num_classes == 100
    image = np.asarray(stream.train[0][0])
    assert (image.shape, image.std() > 50) == ((32, 32, 3), True)


REJECTED = cases("""
--only stages,speed --repetitions 0 --warm_up -1 --synthetic 5000 --json gone/x.json
    --repetitions 0: must be at least 1
    --warm_up -1: must be at least 0
    'speed' is none of stages, step, evaluation, run, memory
    --json: 'gone/x.json' is no file in a folder that exists
    --synthetic: '5000' is not two numbers of images
--synthetic 50,1000 --json .
    --json: '.' is no file in a folder that exists
    --synthetic: '50,1000' is not two numbers of images, each in [100, 999999]
--synthetic 200,100 --dataset digits
    stands in for CIFAR100 alone
--freeze none --buffer_size 20 --batchsize 4
    --batchsize is no option: did you mean --batch
    --freeze none: the baseline supports blocks patch_embed
    --buffer_size 20: the baseline supports none only
--batch-size 0
    --batch-size 0: must be at least 1 and at most 100000
""")


@pytest.mark.parametrize(("line", "expected"), REJECTED)
def test_everything_wrong_is_reported_at_once(line, expected, tmp_path, monkeypatch, capsys):
    """One more problem is that a launcher started it."""
    monkeypatch.chdir(tmp_path)
    for name, value in by_launcher(2)(0).items():
        monkeypatch.setenv(name, value)
    assert benchmark.main(line.split()) == 2
    first, *problems = capsys.readouterr().err.splitlines()
    assert first == "benchmark.py: this command line cannot run:"
    assert_says(problems, [*expected, "the baseline is a single process"])


def test_what_ends_it_is_one_line(tmp_path, monkeypatch, capsys):
    path = tmp_path / "broken.pth"
    path.write_bytes(b"no weights")
    assert benchmark.main([*TINY, "--pretrained", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
    ends = (
        (KeyboardInterrupt(), 130, "interrupted"),
        (Preempted(""), 1, "ended by a signal"),
        (OSError("full"), 1, "full"),
        (MemoryError(), 1, explain(MemoryError())),
    )
    for error, code, word in ends:
        monkeypatch.setattr(benchmark, "_measure", lambda *_, e=error: (_ for _ in ()).throw(e))
        assert benchmark.main([]) == code
        assert capsys.readouterr().err == f"benchmark.py: {word}\n"


# What it reports


def test_steps_are_measured_and_written_down(monkeypatch, tmp_path, capsys):
    times = SimpleNamespace(times=[1e-3, 3e-3, 2e-3])
    timer = SimpleNamespace(blocked_autorange=lambda min_run_time: times)
    monkeypatch.setattr(measure, "_SQUARE", {"cpu": 64})
    monkeypatch.setattr(measure, "Timer", lambda *args, **kwargs: timer)
    path = tmp_path / "report.json"
    argv = [*TINY, "--only", "stages,step", "--repetitions", "2", "--json", str(path)]
    assert benchmark.main(argv) == 0
    report = json.loads(path.read_text())
    assert capsys.readouterr().out == benchmark.table(report) + "\n"
    assert not {"run", "evaluation", "memory"} & set(report)
    product, loading, *stages = report["stages"].values()
    assert list(report["stages"]) == [
        "product of 64 x 64", "loading", "query", "prompted forward", "backward and update",
        "whole step",
    ]  # fmt: skip
    assert all(len(stage["all"]) == 2 for stage in (loading, *stages, *report["step"].values()))
    assert product["flop_per_second"] == pytest.approx(2 * 64**3 / 2e-3)
    gmacs = speed.count_gmacs(Program(read_workload(TINY)).model, torch.zeros(1, 3, 32, 32))
    flop = [16 * 2e9 * gmacs[name] for name in ("query", "prompted", "backward")]
    assert [stage["flop"] for stage in stages] == pytest.approx([*flop, sum(flop)])
    assert stages[0]["flop_per_second"] == pytest.approx(flop[0] / stages[0]["median"])
    assert sum(stage["all"][0] for stage in stages[:3]) == pytest.approx(stages[3]["all"][0])
    assert report["settings"]["input_size"] == 32
    assert report["hardware"]["threads"] == torch.get_num_threads()


def test_table_shows_medians_and_ratios():
    def times(median, **more):
        return {"median": median, "all": [median] * 3, **more}

    def ways(**medians):
        return {n: times(m, ratio=medians["baseline"] / m) for n, m in medians.items()}

    report = {
        "settings": dict.fromkeys(benchmark._NAMED, 7), "numerics": {"amp": "bf16", "tf32": None},
        "hardware": {"cpu": "A CPU", "threads": 1, "gpu": None},
        "versions": {"torch": "2.6.0", "torchvision": "0.21.0", "timm": "1.0.20"},
        "repetitions": 5, "warm_up": 1,
        "stages": {"loading": times(0.02), "query": times(0.05, flop=4e9, flop_per_second=8e10)},
        "step": ways(ours=0.1, baseline=0.15),
        "evaluation": ways(first=0.02, later=0.01, baseline=0.03) | {"share_overruled": 0.25},
        "run": ways(ours=10.0, baseline=12.0),
        "memory": {"step": {"ours": 400.0, "baseline": 600.0, "ratio": 1.5}},
    }  # fmt: skip
    text = benchmark.table(report)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "model 7, " in text
    assert "amp bf16, cpu A CPU, threads 1, torch 2.6.0" in " ".join(rows)
    assert "the vote overruled 25.0 %" in text
    assert {
        "5 turns after 1 to warm up", "loading | 20.0", "query, 80.0 GFLOP/s | 50.0",
        "training step, 1.50 times as fast | 100.0 | 150.0",
        "later evaluation of an image, 3.00 times as fast | 10.0 | 30.0",
        "whole run, 1.20 times as fast | 10000.0 | 12000.0",
        "step, MiB ours 400.00, two copies 600.00: 1.50 times as much",
    } <= set(rows)  # fmt: skip


@pytest.mark.slow
def test_whole_runs_and_memory_are_measured(monkeypatch, tmp_path):
    monkeypatch.setattr(measure, "get_context", lambda _: context())  # one that has torch loaded
    path = tmp_path / "report.json"
    argv = [*TINY, "--synthetic", "200,100", "--num_tasks", "2", "--repetitions", "1"]
    argv += ["--warm_up", "0", "--only", "evaluation,run,memory", "--json", str(path)]
    assert benchmark.main(argv) == 0
    report = json.loads(path.read_text())
    assert report["evaluation"]["images"] == 100
    assert report["run"]["baseline"]["lowest"] > 0
    for sizes in report["memory"].values():
        assert sizes["ratio"] == sizes["baseline"] / sizes["ours"]
        assert sizes["ours"] > 0
    assert report["memory"]["checkpoint"]["ratio"] > 1
