import logging
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch.nn import functional as F

import engine
from cli.settings import ModelSettings
from helpers.engine_doubles import (
    FIRST,
    SECOND,
    STREAM,
    Loader,
    data,
    evaluate,
    make_run,
    run,
    sgd,
)
from helpers.tiny_model import C, K, M, differing, make_model, pictures, snapshot
from reports.metrics import SELECTIONS
from training.evaluation import average_stats
from training.state import Monitor, NonFiniteLossError, TrainState
from training.update import OptimizerStep

close = torch.testing.assert_close

FREQUENCY = {"diversify": "frequency"}
UNPULLED = {"pull_constraint": False}
STATS = {"Lr", "Loss", "Acc@1", "Acc@5"}


def train_epoch(model, loader, task=FIRST, *, lr=0.1, epoch=0, state=None, **values):
    """An epoch of a task with SGD: statistics."""
    run = make_run(model, make_optimizer=lambda: sgd(model, lr), **values)
    state = state or TrainState(task.index, epoch)
    return engine.train_one_epoch(run, loader, OptimizerStep(run), task, state)


def train_step(model, task=FIRST, lr=0.0, share=1, **values):
    """One step on one batch: statistics; the gradients stay in the model."""
    loader = Loader(*data(task, 8), batch_size=8, share=share)
    return train_epoch(model, loader, task, lr=lr, **values)


def local(targets, task):
    """Class ids as positions among the task's own classes."""
    return torch.tensor([task.classes.index(t) for t in targets.tolist()])


def near(value):
    return pytest.approx(value, rel=1e-5)


# Loss


def test_train_mask_trains_the_classes_of_the_task_alone():
    model = make_model({})
    before = snapshot(model.head)
    train_step(model, lr=0.5)
    own = [c in FIRST.classes for c in range(C)]
    for name, parameter in model.head.named_parameters():
        assert parameter.grad.reshape(C, -1).any(dim=1).tolist() == own
        assert (parameter != before[name]).reshape(C, -1).any(dim=1).tolist() == own


@pytest.mark.parametrize("smoothing", [0, 0.3])
@pytest.mark.parametrize("train_mask", [True, False])
def test_train_loss_is_cross_entropy_over_the_allowed_classes(train_mask, smoothing):
    model, (images, targets) = make_model({}), data(SECOND, 8)
    stats = train_step(model, SECOND, train_mask=train_mask, smoothing=smoothing, **UNPULLED)
    logits = model(images, vote_group_size=4)["logits"]
    if train_mask:
        logits, targets = logits[:, list(SECOND.classes)], local(targets, SECOND)
    else:
        assert model.head.weight.grad.any(dim=1).all()
    assert stats["Loss"] == near(F.cross_entropy(logits, targets, label_smoothing=smoothing).item())
    for key, number in (("Acc@1", 1), ("Acc@5", min(5, logits.shape[1]))):
        hits = (logits.topk(number, dim=1).indices == targets[:, None]).any(dim=1)
        assert stats[key] == pytest.approx(100 * hits.float().mean().item())


def test_pull_term_is_subtracted_with_its_coefficient_and_trains_the_keys():
    model, found = make_model({}), {}
    for coefficient in (0, 0.1, 0.5):
        loss = train_step(model, pull_constraint_coeff=coefficient)["Loss"]
        found[coefficient] = loss, model.prompt.prompt_key.grad
    reduce_sim = model(data(FIRST, 8)[0], vote_group_size=4)["reduce_sim"].item()
    assert not found[0][1].any()
    assert found[0.1][1].any()
    close(found[0.5][1], 5 * found[0.1][1])
    assert found[0.5][0] == near(found[0][0] - 0.5 * reduce_sim)


# Replayed images


class Mixed(Loader):
    """One batch of vote groups of four images of a task, two replayed ones behind each."""

    def __init__(self, images, targets, flags):
        super().__init__(images, targets)
        self.batches = [(images, targets, flags)]


#: Four and two images of the second task, each followed by two replayed ones; the last of these is
#: of a class of the second task.
AGAIN = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 1, 1]).bool()
MIXED_TARGETS = torch.tensor([1, 3, 5, 5, 0, 4, 3, 1, 2, 3])
#: Two for each vote group of four, of a batch of sixteen.
REPLAYING = {**UNPULLED, "buffer_size": 9, "replay_batch": 8}


def replay_step(model, **values):
    images = pictures(10, torch.Generator().manual_seed(5))
    loader = Mixed(images, MIXED_TARGETS, AGAIN)
    return images, train_epoch(model, loader, SECOND, lr=0.0, **{**REPLAYING, **values})


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_replayed_images_may_be_of_any_class_and_others_of_their_task_alone(smoothing):
    model = make_model({})
    images, stats = replay_step(model, smoothing=smoothing)
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    logits = model(images, vote_group_size=6)["logits"]
    new = logits[~AGAIN][:, list(SECOND.classes)], local(MIXED_TARGETS[~AGAIN], SECOND)
    old = logits[AGAIN], MIXED_TARGETS[AGAIN]
    how = {"label_smoothing": smoothing, "reduction": "sum"}
    loss = (F.cross_entropy(*new, **how) + F.cross_entropy(*old, **how)) / 10
    assert stats["Loss"] == near(loss.item())
    loss.backward()
    close(gradient, model.head.weight.grad)
    assert gradient.any(dim=1).all()  # other classes learn from replayed images
    hits = sum((x.argmax(dim=1) == y).sum().item() for x, y in (new, old))
    assert stats["Acc@1"] == pytest.approx(10 * hits)


def test_replay_without_class_mask_masks_nobody_and_counts_replayed_images():
    model = make_model(FREQUENCY)
    images, stats = replay_step(model, train_mask=False)
    logits = model(images, vote_group_size=6)["logits"]
    assert stats["Loss"] == near(F.cross_entropy(logits, MIXED_TARGETS).item())
    assert model.prompt.served_now.tolist() == count_by_hand(model, [[images]], group=6)


def test_replayed_images_vote_with_the_images_before_them():
    model = make_model({})
    images, stats = replay_step(model, pull_constraint=True, pull_constraint_coeff=0.5)
    out = [model(group) for group in images.split(6)]
    pulled = sum(len(o["logits"]) * o["reduce_sim"].item() for o in out) / 10
    assert stats["Loss"] == near(replay_step(model)[1]["Loss"] - 0.5 * pulled)
    assert out[0]["prompt_idx"][0].tolist() != out[1]["prompt_idx"][0].tolist()
    others = [model(group)["reduce_sim"].item() for group in images.split(4)]
    assert sum(others) != pytest.approx(pulled, rel=1e-3)


# How often prompts serve; what the head observes


def count_by_hand(model, batches, group=4):
    counts = [0] * M
    for images, *_ in batches:
        for i in model(images, vote_group_size=group)["prompt_idx"].flatten().tolist():
            counts[i] += 1
    return counts


@pytest.mark.parametrize("processes", [1, 3])
def test_prompts_count_the_training_images_of_all_processes_that_they_serve(monkeypatch, processes):
    monkeypatch.setattr(engine, "sum_over_processes", lambda values: processes * values)
    model, loader = make_model(FREQUENCY), Loader(*data(FIRST, 10), share=processes)
    train_epoch(model, loader, lr=0.0)
    expected = [processes * n for n in count_by_hand(model, loader)]
    assert model.prompt.served_now.tolist() == expected
    assert sum(expected) == processes * 10 * K
    assert len([n for n in expected if n]) > K
    assert model.prompt.served_before.tolist() == [0] * M
    train_epoch(model, loader, lr=0.0, epoch=1)
    assert model.prompt.served_now.tolist() == [2 * n for n in expected]


def test_counts_of_a_task_weigh_from_the_next_task_on():
    model, states = make_model(FREQUENCY), []
    run(model, on_task_end=lambda _: states.append(snapshot(model.prompt)))
    names = "served_before", "served_now"
    (before, now), (next_before, next_now) = ([state[name] for name in names] for state in states)
    assert not before.any()
    assert now.sum() == next_now.sum() == 8 * K
    assert torch.equal(next_before, now)


class Counting(torch.nn.Linear):
    """A head that adds up the features that it observes."""

    seen, targets = 0, ()

    def observe(self, features, targets):
        self.seen = self.seen + features.sum(dim=0)
        self.targets = [*self.targets, *targets.tolist()]


@pytest.fixture
def counting():
    model = make_model(FREQUENCY)
    model.head = Counting(model.width, model.num_classes)
    return model


def test_head_observes_features_and_targets_of_every_step(counting):
    loader = Loader(*data(FIRST, 10))
    train_epoch(counting, loader, lr=0.0)
    expected = sum(counting(x, vote_group_size=4)["pre_logits"].sum(dim=0) for x, _ in loader)
    assert torch.allclose(counting.head.seen, expected, atol=1e-4)
    assert counting.head.targets == [class_id for _, y in loader for class_id in y.tolist()]


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_counted_or_observed_from_a_non_finite_loss_on(counting, value, clip_grad):
    loader, values = Loader(*data(FIRST, 12)), {"clip_grad": clip_grad, "read_every": 3}
    first = counting.train()(loader.batches[0][0], task_id=0, vote_group_size=4)["pre_logits"]
    with pytest.raises(NonFiniteLossError):
        train_epoch(Spoiled(counting, 2, value), loader, lr=0.0, **values)
    assert counting.prompt.served_now.tolist() == count_by_hand(counting, loader.batches[:1])
    assert torch.allclose(counting.head.seen, first.sum(dim=0), atol=1e-4)


# One epoch


def test_train_one_epoch_averages_loss_over_batches_and_accuracy_over_images():
    model, loader = make_model({}).eval(), Loader(*data(FIRST, 10))
    stats = train_epoch(model, loader, lr=0.0, epoch=3, **UNPULLED)
    assert loader.epochs == [3]
    assert model.training
    losses, hits = [], 0
    for x, y in loader:
        logits = model(x, vote_group_size=4)["logits"][:, list(FIRST.classes)]
        losses.append(F.cross_entropy(logits, local(y, FIRST)).item())
        hits += (logits.argmax(dim=1) == local(y, FIRST)).sum().item()
    assert stats["Loss"] == near(sum(losses) / 3)
    assert stats["Acc@1"] == pytest.approx(10 * hits)
    assert stats["Lr"] == 0


def test_train_step_weighs_its_share_of_the_global_batch():
    model = make_model({})
    whole = train_step(model)
    gradient = model.head.weight.grad.clone()
    half = train_step(model, share=2)
    close(model.head.weight.grad, gradient / 2)
    for key in ("Loss", "Acc@1"):
        assert half[key] == pytest.approx(whole[key] / 2)


@pytest.mark.parametrize("replay", [False, True])
def test_train_step_without_images_of_its_own_changes_nothing(replay):
    model, images = make_model(FREQUENCY), torch.empty(0, 3, 8, 8)
    before, targets = snapshot(model), torch.empty(0, dtype=torch.long)
    loader = Mixed(images, targets, targets.bool()) if replay else Loader(images, targets)
    loader.global_batch_size = lambda step: 6  # the images are at other processes
    train_epoch(model, loader, SECOND, **(REPLAYING if replay else {}))
    assert not differing(model, before)


@pytest.mark.parametrize("changes", [{}, {"vote_ties": "topk"}, {"prompt_key": False}])
def test_training_leaves_frozen_weights_unchanged_and_repeats_itself_to_the_bit(changes):
    runs = []
    for _ in range(2):
        model = make_model(changes)
        before = snapshot(model)
        runs.append((run(model, epochs=2, clip_grad=1.0), snapshot(model)))
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
        assert differing(model, before) == trained
    assert not differing(runs[0][1], runs[1][1])
    for name in SELECTIONS:
        assert np.array_equal(runs[0][0][name], runs[1][0][name], equal_nan=True)


# A loss that is no number


class Spoiled(torch.nn.Module):
    """A model whose logits turn bad in one call."""

    def __init__(self, model, call, value=float("nan")):
        super().__init__()
        self.model, self.call, self.value, self.calls = model, call, value, 0
        self.prompt, self.num_classes = model.prompt, model.num_classes
        self.observe = model.observe

    def forward(self, *args, **kwargs):
        out = self.model(*args, **kwargs)
        self.calls += 1
        if self.calls == self.call:
            out["logits"] = out["logits"] * self.value
        return out


@pytest.mark.parametrize(
    ("values", "call", "made"),
    [({}, 2, 2), ({"clip_grad": 1.0}, 2, 2), ({"read_every": 100}, 4, 7)],  # later steps are made
)
def test_non_finite_loss_names_place_and_value_and_keeps_the_last_good_weights(values, call, made):
    how, (images, targets) = {"epochs": 3, "epoch": 2, **values}, data(SECOND, 28)
    spoiled, good = Spoiled(make_model({}), call), make_model({})
    message = f"loss is nan in task 2, epoch 3, step {call}: lower --lr"
    with pytest.raises(NonFiniteLossError, match=message):
        train_epoch(spoiled, Loader(images, targets), SECOND, **how)
    assert spoiled.calls == made
    train_epoch(good, Loader(images[: 4 * call - 4], targets[: 4 * call - 4]), SECOND, **how)
    assert not differing(spoiled.model, good)


@pytest.mark.parametrize("amp", [None, "fp16"])
def test_non_finite_gradient_is_named_before_it_spoils_the_weights(amp):
    """A scaled loss is given smaller scales first."""
    model = make_model({})
    before = snapshot(model)
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    made = make_run(model, amp=amp)
    update, loader = OptimizerStep(made), Loader(*data(FIRST, 4 * 30))
    with pytest.raises(NonFiniteLossError, match=r"norm of the gradient is .* in task 1") as error:
        engine.train_one_epoch(made, loader, update, FIRST, TrainState())
    assert not differing(model, before)
    assert ("step 1:" in str(error.value)) is (amp is None)
    assert amp is None or update.scaler.get_scale() < 0.01


def test_non_finite_loss_of_a_target_outside_the_mask_is_named():
    loader = Loader(data()[0], torch.full((8,), 1))  # class 1 belongs to the second task
    with pytest.raises(NonFiniteLossError, match=r"loss is inf in task 1, epoch 1, step 1"):
        train_epoch(make_model({}), loader)


# Steps that are read together


class Boundaries(Monitor):
    """Notes where the engine says that a run can resume."""

    def __init__(self, stop_at=None):
        self.boundaries, self.asked, self.stop_at = [], 0, stop_at

    def wants_to_stop(self):
        self.asked += 1
        return self.asked == self.stop_at

    def at_boundary(self, state, update, stop=False):
        meters = {name: list(values) for name, values in state.meters.items()}
        self.boundaries.append((state.step, meters, stop))


def read_every(number, stop_at=None):
    """A model after seven steps, their statistics, and the boundaries."""
    model, monitor = make_model({}), Boundaries(stop_at)
    stats = train_epoch(model, Loader(*data(FIRST, 28)), monitor=monitor, read_every=number)
    return model, stats, monitor.boundaries


def test_steps_read_together_give_the_same_run():
    model, stats, boundaries = read_every(1)
    for number, steps_read in ((2, [1, 3, 5, 7]), (3, [1, 4, 7]), (9, [1, 7])):
        other, other_stats, read = read_every(number)
        assert other_stats == stats
        assert not differing(other, model)
        assert [step for step, _, _ in read] == steps_read
        assert read == [boundaries[step - 1] for step in steps_read]


def test_wish_to_stop_waits_for_the_next_reading():
    _, _, boundaries = read_every(3, stop_at=3)
    assert [(step, stop) for step, _, stop in boundaries] == [(1, False), (4, True), (7, False)]


class Rest(Loader):
    """An epoch of which some steps are done."""

    done = 2

    def __iter__(self):
        return iter(self.batches[self.done :])


def test_resumed_epoch_reads_its_own_steps():
    _, _, boundaries = read_every(1)
    state, monitor = TrainState(0, 0, step=2, meters=boundaries[1][1]), Boundaries()
    how = {"state": state, "monitor": monitor, "read_every": 3}
    train_epoch(make_model({}), Rest(*data(FIRST, 28)), lr=0.0, **how)
    assert [step for step, _, _ in monitor.boundaries] == [4, 7]
    assert monitor.boundaries[-1][1]["Acc@1"][1] == 28


# Evaluation


@pytest.mark.parametrize(
    ("favourite", "values"),
    [
        (1, {"task_inc": True}),  # a class of the second task
        (5, {"classes": (0, 1, 2, 3, 4)}),  # an output that no task uses
    ],
)
def test_evaluation_masks_classes_outside_the_stream_or_the_test_set(favourite, values):
    """A head that prefers one class whatever it sees, and may be restricted."""
    model = make_model({})
    model.head.bias.data[favourite] = 1000
    free, few = evaluate(model), evaluate(model, **values)
    allowed = list(values.get("classes", FIRST.classes))
    images, targets = data(FIRST, 12)
    with torch.no_grad():
        logits = model.eval()(images, vote_group_size=4)["logits"][:, allowed]
    hits = (torch.tensor(allowed)[logits.argmax(dim=1)] == targets).double().mean().item()
    assert few.stats["batch"]["Acc@1"] == pytest.approx(100 * hits)
    assert few.stats["batch"]["Loss"] < 100
    for name in SELECTIONS:  # classes that are not learned yet are allowed, too
        assert free.stats[name]["Acc@1"] == 0
        assert few.stats[name]["Acc@1"] > 0


def test_stream_without_pool_trains_the_head_counts_five_best_and_no_usage():
    (images, targets), model = data(FIRST, 12), make_model(None, head_type="token")
    result = evaluate(model)
    with torch.no_grad():
        ranks = model.eval()(images)["logits"].argsort(dim=1, descending=True)
    places = (ranks == targets[:, None]).long().argmax(dim=1)
    for key, number in (("Acc@1", 1), ("Acc@5", 5)):
        hits = (places < number).sum().item()
        assert result.stats["batch"][key] == pytest.approx(100 / 12 * hits)
    before = snapshot(model)
    matrices = run(model, shared_prompt_pool=True, shared_prompt_key=True)
    assert differing(model, before) == {"head.weight", "head.bias"}
    assert np.array_equal(matrices["batch"], matrices["instance"], equal_nan=True)
    unused = (result.usage, result.mean_similarity, result.key_similarity, result.index)
    assert unused == ({}, None, [], 0)


@pytest.mark.parametrize("ties", ["lowest", "topk"])
@pytest.mark.parametrize("head_type", ["prompt", "gap"])
@pytest.mark.parametrize("positions", ["frozen", "trained"])
def test_instance_wise_equals_vote_groups_of_one(head_type, positions, ties):
    freeze = ModelSettings().freeze
    if positions == "trained":  # the order of the prompts counts
        freeze = tuple(prefix for prefix in freeze if prefix != "pos_embed")
    model = make_model({"vote_ties": ties}, freeze=freeze, head_type=head_type)
    if positions == "trained":
        torch.nn.init.normal_(model.pos_embed_prompt)
    voted = evaluate(model, size=32)
    alone = evaluate(model, size=32, vote_group_size=1).stats["batch"]
    model.prompt.batchwise = False
    unvoted = evaluate(model, size=32).stats["batch"]
    assert voted.stats["batch"]["Loss"] != pytest.approx(alone["Loss"], rel=1e-4)
    for key in ("Acc@1", "Acc@5"):
        assert voted.stats["instance"][key] == alone[key] == unvoted[key]
    assert [alone["Loss"], unvoted["Loss"]] == near([voted.stats["instance"]["Loss"]] * 2)


def test_instance_wise_needs_no_second_pass_where_nobody_votes():
    for pool, vote_group_size in ((None, 4), ({"batchwise_prompt": False}, 4), ({}, 1)):
        model, calls = make_model(pool), []
        model.register_forward_hook(lambda _, args, out, calls=calls: calls.append(len(args[0])))
        result = evaluate(model, vote_group_size=vote_group_size)
        assert calls == [4, 4, 4]
        assert result.stats["batch"] == result.stats["instance"]


def test_evaluation_counts_how_often_prompts_serve():
    model = make_model({})
    result = evaluate(model)
    with torch.no_grad():
        outs = [model(x, vote_group_size=4) for x in data(FIRST, 12)[0].split(4)]
    for name, key in (("batch", "prompt_idx"), ("instance", "own_prompt_idx")):
        ids = torch.cat([out[key] for out in outs]).flatten().tolist()
        assert result.usage[name] == [ids.count(i) for i in range(M)]
        assert sum(result.usage[name]) == 12 * K
    best = torch.cat([out["similarity"].topk(K, dim=1).values for out in outs])
    assert result.mean_similarity == pytest.approx(best.double().mean().item(), rel=1e-12)


def test_evaluation_ignores_the_prompt_mask_and_changes_nothing_but_the_mode():
    masked, free = make_model({"diversify": "mask"}).train(), make_model({}).train()
    before = snapshot(masked)
    assert evaluate(masked, SECOND) == evaluate(free, SECOND)
    assert not masked.training
    assert not differing(masked, before)
    assert all(p.grad is None for p in masked.parameters())


# Evaluation of a task


def test_evaluate_till_now_fills_its_column_and_says_what_the_original_said(caplog):
    caplog.set_level(logging.INFO)
    made = make_run(make_model({}), test_loader=lambda test_set: Loader(*data(test_set)))
    matrices = made.matrices
    matrices["batch"][0, 0] = matrices["instance"][0, 0] = 100
    state = TrainState(1)
    engine.evaluate_till_now(made, STREAM[1], state)
    results = state.evaluations
    assert [r.index for r in results] == [0, 1]
    for name in SELECTIONS:
        assert matrices[name][:, 1].tolist() == [r.stats[name]["Acc@1"] for r in results]
        assert np.isnan(matrices[name][1, 0])
    first, lines = results[0].stats["batch"], caplog.messages
    wanted = "* Acc@1 {Acc@1:.3f} Acc@5 {Acc@5:.3f} loss {Loss:.3f}".format(**first)
    assert any(line.startswith(wanted) for line in lines)
    means, lost = average_stats(results, "batch"), 100 - first["Acc@1"]
    stats = [result.stats["batch"] for result in results]
    assert means == {k: pytest.approx((stats[0][k] + stats[1][k]) / 2) for k in stats[0]}
    assert (
        f"[Average accuracy till task2]\tAcc@1: {means['Acc@1']:.4f}\t"
        f"Acc@5: {means['Acc@5']:.4f}\tLoss: {means['Loss']:.4f}\t"
        f"Forgetting: {lost:.4f}\tBackward: {-lost:.4f}"
    ) in lines
    assert any(line.startswith("[Instance-wise accuracy till task2]\tAcc@1:") for line in lines)


def said_till(messages, number):
    """Averages that were logged after a task, and whether one of them names forgetting."""
    lines = [m for m in messages if f"till task{number}]" in m]
    return len(lines), any(re.search("Forgetting|Backward", line) for line in lines)


def test_forgetting_is_named_only_where_all_tasks_before_were_evaluated(caplog):
    caplog.set_level(logging.INFO)
    model, reports = make_model({}), []
    before = model.head.weight.detach().clone()

    def on_task_end(report):
        reports.append(report)
        assert not torch.equal(model.head.weight, before)

    tasks = [replace(STREAM[0], test_sets=()), STREAM[1]]
    matrices = run(model, tasks=tasks, on_task_end=on_task_end)
    assert [len(report.evaluations) for report in reports] == [0, 2]
    assert reports[0].train_stats.keys() == STATS
    for matrix in matrices.values():
        assert np.isnan(matrix).tolist() == [[True, False], [True, False]]
    assert said_till(caplog.messages, 1) == (0, False)
    assert said_till(caplog.messages, 2) == (2, False)  # unknown without the first evaluation
    caplog.clear()  # nor with one test set of all tasks
    matrices = run(make_model({}), tasks=[replace(t, test_sets=(FIRST,)) for t in STREAM])
    assert all(np.isfinite(matrix).all() for matrix in matrices.values())
    assert said_till(caplog.messages, 2) == (2, False)


# The stream


class Seconds:
    """A clock that advances by a second where a loader begins, and does not otherwise."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)

    def loader(self, seconds, *args):
        clock = self

        class Slow(Loader):
            def __iter__(self):
                clock.now += seconds
                return super().__iter__()

        return Slow(*args)


@pytest.mark.parametrize("read_every", [1, 3])
def test_stream_reports_every_task_with_its_seconds_and_fills_the_matrices(
    caplog, monkeypatch, read_every
):
    caplog.set_level(logging.INFO)
    reports, loaders, clock = [], {}, Seconds(monkeypatch)
    matrices = run(
        make_model({}),
        epochs=3,
        read_every=read_every,
        on_task_end=reports.append,
        train_loader=lambda t: loaders.setdefault(t.index, clock.loader(8, *data(t))),
        test_loader=lambda test_set: clock.loader(1, *data(test_set, seed=1)),
    )
    assert [loader.epochs for loader in loaders.values()] == [[0, 1, 2], [0, 1, 2]]
    assert [(r.task, len(r.evaluations)) for r in reports] == [(0, 1), (1, 2)]
    assert [(r.train_seconds, r.eval_seconds) for r in reports] == [(24, 1), (24, 2)]
    for name in SELECTIONS:
        assert np.isnan(matrices[name]).tolist() == [[False, False], [True, False]]
        for report in reports:
            for result in report.evaluations:
                assert matrices[name][result.index, report.task] == result.stats[name]["Acc@1"]
    assert all(r.train_stats.keys() == STATS for r in reports)
    assert said_till(caplog.messages, 1) == (2, False)
    assert said_till(caplog.messages, 2) == (2, True)


@pytest.mark.parametrize("reinit", [True, False])
def test_scheduler_is_new_for_each_task_and_starts_at_the_full_rate(reinit):
    model, optimizers, schedulers, reports = make_model({}), [], [], []

    class Noted(CosineLRScheduler):
        def step(self, epoch, metric=None):
            self.steps = [*getattr(self, "steps", []), (epoch, metric)]
            super().step(epoch, metric)

    def make_scheduler(optimizer):
        schedulers.append(Noted(optimizer, t_initial=3))
        return schedulers[-1]

    run(
        model,
        epochs=3,
        reinit_optimizer=reinit,
        make_optimizer=lambda: optimizers.append(sgd(model)) or optimizers[-1],
        make_scheduler=make_scheduler,
        on_task_end=reports.append,
    )
    assert len(optimizers) == (2 if reinit else 1)
    wanted = optimizers if reinit else optimizers * 2
    for report, scheduler, optimizer in zip(reports, schedulers, wanted, strict=True):
        stats = report.epoch_stats
        assert scheduler.optimizer is optimizer
        assert scheduler.steps == [(n + 1, stats[n]["Acc@1"]) for n in range(3)]
        assert [s["Lr"] for s in stats] == pytest.approx([0.1, 0.075, 0.025])


@pytest.mark.parametrize(("prompts", "keys"), [(True, False), (False, True), (False, False)])
def test_shared_pool_and_keys_start_from_the_task_before(prompts, keys, caplog):
    """With the mask, which gives each task prompts of its own."""
    model, after_first = make_model({"diversify": "mask"}), []
    before = snapshot(model)

    class Frozen(torch.optim.SGD):
        """Trains the first task alone, so that the second shows what it started from."""

        def step(self):
            if not after_first:
                super().step()

    parameters = [p for p in model.parameters() if p.requires_grad]
    caplog.set_level(logging.INFO)
    run(
        model,
        shared_prompt_pool=prompts,
        shared_prompt_key=keys,
        make_optimizer=lambda: Frozen(parameters, lr=0.1),
        on_task_end=lambda report: after_first.append(snapshot(model)),
    )
    said = "Task 2 starts from the prompts of task 1"
    assert (said in caplog.messages) == (prompts or keys)
    for name, shared in (("prompt.prompt", prompts), ("prompt.prompt_key", keys)):
        trained = (after_first[0][name] != before[name]).flatten(1).any(dim=1)
        assert trained.nonzero().flatten().tolist() == list(range(K))
        first = after_first[0][name][:K]
        wanted = first if shared else before[name][K : 2 * K]
        assert torch.equal(model.state_dict()[name][K : 2 * K], wanted), name


def test_pool_without_room_for_another_task_shares_nothing(caplog):
    run(make_model({"top_k": M}), shared_prompt_pool=True)
    said = "Task 2 shares no prompts with task 1: the pool of 6 has no slots left for it"
    assert said in caplog.messages


# Queries ahead of the steps


def with_queries_ahead(loader, number=3, model=None, **values):
    """An epoch of batches of four images: model, statistics, images of each pass for queries."""
    model, sizes = model or make_model({}), []
    encode_query = model.encode_query
    model.encode_query = lambda tokens: sizes.append(len(tokens)) or encode_query(tokens)
    stats = train_epoch(model, loader, queries_ahead=number, read_every=3, **values)
    return model, stats, sizes


def test_queries_of_small_batches_share_a_pass_and_change_no_number():
    one, stats, sizes = with_queries_ahead(Loader(*data(FIRST, 26)), number=1)
    other, other_stats, shared = with_queries_ahead(Loader(*data(FIRST, 26)))
    assert (sizes, shared) == ([4] * 6 + [2], [4, 12, 10])
    assert other_stats == pytest.approx(stats, rel=1e-5)
    close(other.trained_state(), one.trained_state(), rtol=1e-4, atol=1e-6)
    assert with_queries_ahead(Loader(*data(FIRST, 26)), model=make_model())[2] == []


def test_resumed_epoch_has_the_passes_for_queries_of_a_whole_one():
    for done, shared in ((1, [12, 12]), (4, [12])):
        loader = Rest(*data(FIRST, 28))
        loader.done = done
        state = TrainState(0, 0, step=done)
        assert with_queries_ahead(loader, state=state, lr=0.0)[2] == shared
