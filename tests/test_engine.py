import copy
import logging
import re
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
    OPTIONS,
    SECOND,
    STREAM,
    Loader,
    data,
    evaluate,
    make_run,
    run,
    sgd,
)
from helpers.tiny_model import C, K, M, make_model, pictures
from reports import metrics
from reports.metrics import SELECTIONS
from training.evaluation import average_stats
from training.losses import masked_cross_entropy
from training.state import Evaluation, Monitor, NonFiniteLossError, TrainState

close = torch.testing.assert_close


def train_epoch(model, loader, task=FIRST, options=OPTIONS, *, lr=0.1, state=None, **parts):
    """One epoch of a task with SGD; the first one unless `state` says another: statistics."""
    run = make_run(model, options, make_optimizer=lambda: sgd(model, lr), **parts)
    update = engine.make_update(model, run)
    state = state or TrainState(task.index)
    return engine.train_one_epoch(model, loader, update, task, state, run)


def train_step(model, options=OPTIONS, task=FIRST, lr=0.0, **loader):
    """One step on one batch: statistics; the gradients stay in the model."""
    return train_epoch(model, Loader(*data(task, 8), batch_size=8, **loader), task, options, lr=lr)


def local(targets, task):
    """Class ids as positions among the task's own classes."""
    return torch.tensor([task.classes.index(t) for t in targets.tolist()])


# Loss


def test_train_mask_gives_other_classes_no_gradient():
    model = make_model({})
    train_step(model)
    rows = model.head.weight.grad.abs().sum(dim=1)
    assert (rows > 0).tolist() == [c in FIRST.classes for c in range(C)]
    assert (model.head.bias.grad == 0).tolist() == [c not in FIRST.classes for c in range(C)]


def test_train_mask_leaves_other_classes_as_they_were():
    model = make_model({})
    before = copy.deepcopy(model.head.state_dict())
    train_step(model, lr=0.5)
    others = list(SECOND.classes)
    assert torch.equal(model.head.weight[others], before["weight"][others])
    assert torch.equal(model.head.bias[others], before["bias"][others])
    assert not torch.equal(model.head.weight[0], before["weight"][0])


def test_train_mask_loss_is_cross_entropy_over_own_classes():
    model = make_model({})
    images, targets = data(SECOND, 8)
    stats = train_step(model, replace(OPTIONS, pull_coeff=0), SECOND)
    logits = model(images, vote_group_size=4)["logits"][:, list(SECOND.classes)]
    assert stats["Loss"] == pytest.approx(F.cross_entropy(logits, local(targets, SECOND)).item())
    hits = logits.argmax(dim=1) == local(targets, SECOND)
    assert stats["Acc@1"] == pytest.approx(100 * hits.float().mean().item())
    assert stats["Acc@5"] == 100  # three classes may be predicted


def test_train_mask_off_trains_all_classes():
    model = make_model({})
    images, targets = data(FIRST, 8)
    stats = train_step(model, replace(OPTIONS, pull_coeff=0, train_mask=False))
    assert (model.head.weight.grad.abs().sum(dim=1) > 0).all()
    logits = model(images, vote_group_size=4)["logits"]
    assert stats["Loss"] == pytest.approx(F.cross_entropy(logits, targets).item())


def test_pull_term_is_subtracted_with_its_coefficient():
    model = make_model({})
    plain = train_step(model, replace(OPTIONS, pull_coeff=0))["Loss"]
    pulled = train_step(model, replace(OPTIONS, pull_coeff=0.5))["Loss"]
    reduce_sim = model(data(FIRST, 8)[0], vote_group_size=4)["reduce_sim"].item()
    assert pulled == pytest.approx(plain - 0.5 * reduce_sim, rel=1e-5)


def test_pull_coeff_zero_leaves_keys_without_gradient():
    model = make_model({})
    train_step(model, replace(OPTIONS, pull_coeff=0))
    assert model.prompt.prompt_key.grad is None
    train_step(model, replace(OPTIONS, pull_coeff=0.1))
    first = model.prompt.prompt_key.grad.clone()
    assert first.any()
    train_step(model, replace(OPTIONS, pull_coeff=0.2))
    close(model.prompt.prompt_key.grad, 2 * first)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.6])
@pytest.mark.parametrize("masked", [True, False])
def test_smoothing_spreads_over_allowed_classes(smoothing, masked):
    logits = torch.randn(5, C, requires_grad=True)
    targets = torch.tensor([0, 2, 4, 4, 0])
    classes = list(FIRST.classes) if masked else list(range(C))
    allowed = torch.tensor([c in classes for c in range(C)]) if masked else None
    found = masked_cross_entropy(logits, targets, allowed, smoothing)
    probability = logits[:, classes].softmax(dim=1)
    hand = 0
    for row, target in zip(probability, targets.tolist(), strict=True):
        for p, c in zip(row, classes, strict=True):
            weight = smoothing / len(classes) + (1 - smoothing) * (c == target)
            hand = hand - weight * p.log() / 5
    close(found, hand)
    (gradient,) = torch.autograd.grad(found, logits)
    assert gradient.isfinite().all()
    close(gradient, torch.autograd.grad(hand, logits)[0])


def test_smoothing_reaches_the_training_loss():
    model = make_model({})
    images, targets = data(FIRST, 8)
    stats = train_step(model, replace(OPTIONS, pull_coeff=0, smoothing=0.3))
    logits = model(images, vote_group_size=4)["logits"][:, list(FIRST.classes)]
    wanted = F.cross_entropy(logits, local(targets, FIRST), label_smoothing=0.3)
    assert stats["Loss"] == pytest.approx(wanted.item(), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.25])
def test_cross_entropy_takes_a_mask_for_every_image(smoothing):
    logits = torch.randn(4, C, requires_grad=True)
    targets = torch.tensor([0, 3, 5, 1])
    rows = [[0, 2, 4], [0, 1, 2, 3, 4, 5], [1, 3, 5], [1, 2]]
    allowed = torch.tensor([[c in row for c in range(C)] for row in rows])
    found = masked_cross_entropy(logits, targets, allowed, smoothing)
    hand = 0
    for values, target, row in zip(logits, targets.tolist(), rows, strict=True):
        chances = values[row].softmax(dim=0)
        for p, c in zip(chances, row, strict=True):
            weight = smoothing / len(row) + (1 - smoothing) * (c == target)
            hand = hand - weight * p.log() / 4
    close(found, hand)
    (gradient,) = torch.autograd.grad(found, logits)
    close(gradient, torch.autograd.grad(hand, logits)[0])
    assert (gradient == 0).tolist() == (~allowed).tolist()


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
REPLAYING = replace(OPTIONS, replayed_per_group=2, pull_coeff=0)


def replay_step(model, options=REPLAYING, lr=0.0):
    images = pictures(10, torch.Generator().manual_seed(5))
    loader = Mixed(images, MIXED_TARGETS, AGAIN)
    stats = train_epoch(model, loader, SECOND, options, lr=lr)
    return images, stats


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_replayed_images_may_be_of_any_class_and_others_of_their_task_alone(smoothing):
    model = make_model({})
    images, stats = replay_step(model, replace(REPLAYING, smoothing=smoothing))
    gradient = model.head.weight.grad.clone()
    model.zero_grad()
    logits = model(images, vote_group_size=6)["logits"]
    own = list(SECOND.classes)
    new = F.cross_entropy(
        logits[~AGAIN][:, own],
        local(MIXED_TARGETS[~AGAIN], SECOND),
        label_smoothing=smoothing,
        reduction="sum",
    )
    old = F.cross_entropy(
        logits[AGAIN], MIXED_TARGETS[AGAIN], label_smoothing=smoothing, reduction="sum"
    )
    loss = (new + old) / 10
    assert stats["Loss"] == pytest.approx(loss.item(), rel=1e-5)
    loss.backward()
    close(gradient, model.head.weight.grad)
    hits = (logits[~AGAIN][:, own].argmax(dim=1) == local(MIXED_TARGETS[~AGAIN], SECOND)).sum()
    hits += (logits[AGAIN].argmax(dim=1) == MIXED_TARGETS[AGAIN]).sum()
    assert stats["Acc@1"] == pytest.approx(10 * hits.item())


def test_other_classes_learn_from_replayed_images_alone():
    model = make_model({})
    replay_step(model)
    assert (model.head.bias.grad != 0).all()
    images = pictures(10, torch.Generator().manual_seed(5))
    targets = MIXED_TARGETS.masked_fill(AGAIN, 1)  # of the task, so that nothing is infinite
    loader = Mixed(images, targets, torch.zeros(10, dtype=torch.bool))
    train_epoch(model, loader, SECOND, REPLAYING, lr=0.0)
    assert (model.head.bias.grad != 0).tolist() == [c in SECOND.classes for c in range(C)]


def test_replay_without_class_mask_masks_nobody():
    model = make_model({})
    images, stats = replay_step(model, replace(REPLAYING, train_mask=False))
    logits = model(images, vote_group_size=6)["logits"]
    assert stats["Loss"] == pytest.approx(F.cross_entropy(logits, MIXED_TARGETS).item(), rel=1e-5)


def test_replayed_images_vote_with_the_images_before_them():
    model = make_model({})
    images, stats = replay_step(model, replace(REPLAYING, pull_coeff=0.5))
    out = [model(group) for group in images.split(6)]
    pulled = sum(len(o["logits"]) * o["reduce_sim"].item() for o in out) / 10
    plain = replay_step(model)[1]["Loss"]
    assert stats["Loss"] == pytest.approx(plain - 0.5 * pulled, rel=1e-5)
    assert out[0]["prompt_idx"][0].tolist() != out[1]["prompt_idx"][0].tolist()
    others = [model(group)["reduce_sim"].item() for group in images.split(4)]
    assert sum(others) != pytest.approx(pulled, rel=1e-3)


def test_empty_piece_of_a_step_with_replay_changes_nothing():
    model = make_model({"diversify": "frequency"})
    before = copy.deepcopy(model.state_dict())
    empty = torch.empty(0, dtype=torch.long)
    loader = Mixed(torch.empty(0, 3, 8, 8), empty, empty.bool())
    loader.global_batch_size = lambda step: 6
    train_epoch(model, loader, SECOND, REPLAYING)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


# How often prompts serve


def count_by_hand(model, batches, group=4):
    counts = [0] * M
    for images, *_ in batches:
        for i in model(images, vote_group_size=group)["prompt_idx"].flatten().tolist():
            counts[i] += 1
    return counts


def test_prompts_count_the_training_images_that_they_serve():
    model = make_model({"diversify": "frequency"})
    loader = Loader(*data(FIRST, 10))
    train_epoch(model, loader, lr=0.0)
    expected = count_by_hand(model, loader)
    assert model.prompt.served_now.tolist() == expected
    assert sum(expected) == 10 * K
    assert len([n for n in expected if n]) > K
    assert model.prompt.served_before.tolist() == [0] * M
    train_epoch(model, loader, lr=0.0, state=TrainState(0, epoch=1))
    assert model.prompt.served_now.tolist() == [2 * n for n in expected]


def test_prompts_count_replayed_images_too():
    model = make_model({"diversify": "frequency"})
    images, _ = replay_step(model)
    assert model.prompt.served_now.tolist() == count_by_hand(model, [[images]], group=6)


def test_prompts_count_the_images_of_all_processes(monkeypatch):
    model = make_model({"diversify": "frequency"})
    monkeypatch.setattr(engine, "sum_over_processes", lambda values: 3 * values)
    loader = Loader(*data(FIRST, 8), share=3)
    train_epoch(model, loader, lr=0.0)
    assert model.prompt.served_now.tolist() == [3 * n for n in count_by_hand(model, loader)]


def test_counts_of_a_task_weigh_from_the_next_task_on():
    model, seen = make_model({"diversify": "frequency"}), []

    def note(report):
        seen.append((model.prompt.served_before.tolist(), model.prompt.served_now.tolist()))

    run(model, replace(OPTIONS, epochs=2), on_task_end=note)
    assert seen[0][0] == [0] * M
    assert sum(seen[0][1]) == sum(seen[1][1]) == 2 * 8 * K
    assert seen[1][0] == seen[0][1]


def test_frequency_changes_no_first_task_and_spreads_the_second():
    plain, spread = make_model({}), make_model({"diversify": "frequency"})
    trained = []
    for model in (plain, spread):
        used, states = [], []
        model.prompt.register_forward_hook(
            lambda module, args, out, used=used: (
                used.append(out.prompt_idx.unique().tolist()) if module.training else None
            )
        )
        run(model, on_task_end=lambda _, s=states, m=model: s.append(copy.deepcopy(m.state_dict())))
        trained.append((used, states))
    (used, states), (spread_used, spread_states) = trained
    for name, value in states[0].items():
        assert torch.equal(spread_states[0][name], value), name
    assert spread_used[:2] == used[:2]
    assert spread_used[2:] != used[2:]
    served = {i for ids in used[:2] for i in ids}
    fresh = set(range(M)) - served
    assert set(spread_used[2]) & fresh  # what never served comes first


@pytest.mark.parametrize("clip_grad", [None, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_step_of_a_non_finite_loss_counts_nothing(value, clip_grad):
    model = make_model({"diversify": "frequency"})
    loader, options = Loader(*data(FIRST, 12)), replace(OPTIONS, clip_grad=clip_grad)
    with pytest.raises(NonFiniteLossError):
        train_epoch(Spoiled(model, call=2, value=value), loader, FIRST, options, lr=0.0)
    assert model.prompt.served_now.tolist() == count_by_hand(model, loader.batches[:1])


class Counting(torch.nn.Linear):
    """A head that adds up the features that it observes."""

    def observe(self, features, targets):
        self.seen = getattr(self, "seen", 0) + features.sum(dim=0)
        self.targets = [*getattr(self, "targets", []), *targets.tolist()]


def test_head_observes_features_and_targets_of_every_step():
    model = make_model({})
    model.head = Counting(model.width, model.num_classes)
    loader = Loader(*data(FIRST, 10))
    train_epoch(model, loader, FIRST, OPTIONS, lr=0.0)
    expected = sum(model(x, vote_group_size=4)["pre_logits"].sum(dim=0) for x, _ in loader)
    assert torch.allclose(model.head.seen, expected, atol=1e-4)
    assert model.head.targets == [class_id for _, y in loader for class_id in y.tolist()]


def test_head_observes_zeros_from_a_non_finite_loss_on():
    model = make_model({})
    model.head = Counting(model.width, model.num_classes)
    loader = Loader(*data(FIRST, 12))
    first = model.train()(loader.batches[0][0], task_id=0, vote_group_size=4)["pre_logits"]
    spoiled = Spoiled(model, call=2, value=float("nan"))
    with pytest.raises(NonFiniteLossError):
        train_epoch(spoiled, loader, FIRST, replace(OPTIONS, read_every=3), lr=0.0)
    assert torch.allclose(model.head.seen, first.sum(dim=0), atol=1e-4)


# One epoch


def test_train_one_epoch_averages_loss_over_batches_and_accuracy_over_images():
    model = make_model({})
    images, targets = data(FIRST, 10)
    options = replace(OPTIONS, pull_coeff=0)
    stats = train_epoch(model, Loader(images, targets), FIRST, options, lr=0.0)
    losses, hits = [], 0
    for x, y in Loader(images, targets):
        logits = model(x, vote_group_size=4)["logits"][:, list(FIRST.classes)]
        losses.append(F.cross_entropy(logits, local(y, FIRST)).item())
        hits += (logits.argmax(dim=1) == local(y, FIRST)).sum().item()
    assert stats["Loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert stats["Acc@1"] == pytest.approx(10 * hits)
    assert stats["Lr"] == 0


def test_train_one_epoch_tells_the_sampler_its_epoch_and_trains_in_training_mode():
    model = make_model({}).eval()
    loader = Loader(*data())
    train_epoch(model, loader, state=TrainState(0, epoch=3))
    assert loader.epochs == [3]
    assert model.training


def test_train_one_epoch_gives_the_mask_the_task():
    model = make_model({"diversify": "mask"})
    train_step(model, replace(OPTIONS, pull_coeff=1), SECOND)
    moved = model.prompt.prompt.grad.abs().sum(dim=(1, 2)) > 0
    assert moved.nonzero().flatten().tolist() == [2, 3]
    assert (model.prompt.prompt_key.grad.abs().sum(dim=1) > 0).nonzero().flatten().tolist() == [
        2,
        3,
    ]


def test_train_step_weighs_its_share_of_the_global_batch():
    model = make_model({})
    whole = train_step(model)
    gradient = model.head.weight.grad.clone()
    half = train_step(model, share=2)
    close(model.head.weight.grad, gradient / 2)
    assert half["Loss"] == pytest.approx(whole["Loss"] / 2)
    assert half["Acc@1"] == pytest.approx(whole["Acc@1"] / 2)


def test_train_step_without_images_of_its_own_changes_nothing():
    model = make_model({})
    before = copy.deepcopy(model.state_dict())
    loader = Loader(torch.empty(0, 3, 8, 8), torch.empty(0, dtype=torch.long))
    loader.global_batch_size = lambda step: 4  # the images are at other processes
    train_epoch(model, loader)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())


def gradient_norm(model):
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return torch.cat([g.flatten() for g in grads]).norm().item()


def test_clip_grad_bounds_the_norm_of_all_gradients():
    model = make_model({})
    train_step(model)
    free = gradient_norm(model)
    direction = model.head.weight.grad / free
    assert free > 0.1
    train_step(model, replace(OPTIONS, clip_grad=0.01))
    assert gradient_norm(model) == pytest.approx(0.01, rel=1e-3)
    close(model.head.weight.grad / 0.01, direction, rtol=1e-3, atol=1e-4)
    train_step(model, replace(OPTIONS, clip_grad=100 * free))
    assert gradient_norm(model) == pytest.approx(free)


def test_clip_grad_comes_before_the_step():
    model = make_model({})
    before = model.head.weight.detach().clone()
    train_step(model, replace(OPTIONS, clip_grad=0.01), lr=1.0)
    assert 0 < (model.head.weight - before).norm() <= 0.0101


@pytest.mark.parametrize("changes", [{}, {"vote_ties": "topk"}, {"prompt_key": False}])
def test_training_leaves_frozen_weights_unchanged(changes):
    model = make_model(changes)
    before = copy.deepcopy(model.state_dict())
    run(model, replace(OPTIONS, epochs=2, clip_grad=1.0))
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name


# A loss that is no number


class Spoiled(torch.nn.Module):
    """A model whose logits turn bad in one call."""

    def __init__(self, model, call, value):
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


@pytest.mark.parametrize("clip_grad", [None, 1.0])
def test_non_finite_loss_names_place_and_value_and_keeps_the_last_good_weights(clip_grad):
    options = replace(OPTIONS, epochs=3, clip_grad=clip_grad)
    images, targets = data(SECOND, 12)
    bad = make_model({})
    spoiled, loader = Spoiled(bad, call=2, value=float("nan")), Loader(images, targets)
    message = r"loss is nan in task 2, epoch 3, step 2: lower --lr"
    with pytest.raises(NonFiniteLossError, match=message):
        train_epoch(spoiled, loader, SECOND, options, state=TrainState(1, epoch=2))
    good = make_model({})
    loader = Loader(images[:4], targets[:4])
    train_epoch(good, loader, SECOND, options, state=TrainState(1, epoch=2))
    for name, value in good.state_dict().items():
        assert torch.equal(bad.state_dict()[name], value), name


def test_non_finite_gradient_is_named_before_it_spoils_the_weights():
    model = make_model({})
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NonFiniteLossError, match=r"norm of the gradient is .* in task 1"):
        train_epoch(model, Loader(*data(FIRST, 4)))
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name], value), name


def test_non_finite_loss_of_a_target_outside_the_mask_is_named():
    model = make_model({})
    images, _ = data()
    loader = Loader(images, torch.full((8,), 1))  # class 1 belongs to the second task
    with pytest.raises(NonFiniteLossError, match=r"loss is inf in task 1, epoch 1, step 1"):
        train_epoch(model, loader)


# Steps that are read together


class Boundaries(Monitor):
    """Notes where the engine says that a run can resume."""

    def __init__(self, stop_at=None):
        self.boundaries, self.asked, self.stop_at = [], 0, stop_at

    def wants_to_stop(self):
        self.asked += 1
        return self.asked == self.stop_at

    def at_boundary(self, state, update, stop=False):
        self.boundaries.append((state.step, copy.deepcopy(state.meters), stop))


def read_every(number, steps=7, stop_at=None):
    model, monitor = make_model({}), Boundaries(stop_at)
    options = replace(OPTIONS, read_every=number)
    loader = Loader(*data(FIRST, 4 * steps))
    stats = train_epoch(model, loader, FIRST, options, monitor=monitor)
    return model, stats, monitor.boundaries


@pytest.mark.parametrize(("number", "steps_read"), [(2, [1, 3, 5, 7]), (3, [1, 4, 7]), (9, [1, 7])])
def test_steps_read_together_give_the_same_run(number, steps_read):
    model, stats, boundaries = read_every(1)
    other, other_stats, read = read_every(number)
    assert other_stats == stats
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    assert [step for step, _, _ in read] == steps_read
    assert read == [boundaries[step - 1] for step in steps_read]


def test_wish_to_stop_reads_at_once_where_there_is_nobody_else():
    _, _, boundaries = read_every(3, stop_at=3)
    assert [(step, stop) for step, _, stop in boundaries] == [
        *[(1, False), (3, True), (4, False), (7, False)]
    ]


def test_wish_to_stop_waits_for_the_others_until_steps_are_read(monkeypatch):
    monkeypatch.setattr(engine, "is_alone", lambda: False)
    _, _, boundaries = read_every(3, stop_at=3)
    assert [(step, stop) for step, _, stop in boundaries] == [(1, False), (4, True), (7, False)]


def test_gradients_that_overflow_at_any_scale_are_named():
    model = make_model({})
    model.head.weight.register_hook(lambda gradient: gradient * float("inf"))
    options = replace(OPTIONS, loss_scaling=True)
    run = make_run(model, options)
    update = engine.make_update(model, run)
    loader = Loader(*data(FIRST, 4 * 30))
    with pytest.raises(NonFiniteLossError, match=r"norm of the gradient is .* in task 1"):
        engine.train_one_epoch(model, loader, update, FIRST, TrainState(), run)
    assert update.scaler.get_scale() < 0.01


def test_non_finite_step_is_named_though_later_ones_were_made():
    options = replace(OPTIONS, read_every=100)
    bad, (images, targets) = make_model({}), data(SECOND, 28)
    spoiled = Spoiled(bad, call=4, value=float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"loss is nan in task 2, epoch 1, step 4"):
        train_epoch(spoiled, Loader(images, targets), SECOND, options)
    assert spoiled.calls == 7
    good = make_model({})
    loader = Loader(images[:12], targets[:12])
    train_epoch(good, loader, SECOND, options)
    for name, value in good.state_dict().items():
        assert torch.equal(bad.state_dict()[name], value), name


def test_resumed_epoch_reads_its_own_steps():
    _, _, boundaries = read_every(1)
    model = make_model({})
    state = TrainState(0, 0, step=2, meters=boundaries[1][1])
    monitor = Boundaries()

    class Rest(Loader):
        def __iter__(self):
            return iter(self.batches[2:])

    loader, options = Rest(*data(FIRST, 28)), replace(OPTIONS, read_every=3)
    train_epoch(model, loader, FIRST, options, lr=0.0, state=state, monitor=monitor)
    assert [step for step, _, _ in monitor.boundaries] == [4, 7]
    assert monitor.boundaries[-1][1]["Acc@1"][1] == 28


# Evaluation


def stubborn(model, favourite):
    """Makes the head prefer one class whatever it sees."""
    model.head.bias.data[favourite] = 1000
    return model


def accuracies(result):
    return [result.stats[name]["Acc@1"] for name in SELECTIONS]


def test_task_inc_restricts_evaluation_to_classes_of_the_test_set():
    model = stubborn(make_model({}), favourite=1)  # a class of the second task
    assert accuracies(evaluate(model)) == [0, 0]
    restricted = evaluate(model, replace(OPTIONS, task_inc=True))
    assert min(accuracies(restricted)) > 0
    assert np.isfinite(restricted.stats["batch"]["Loss"])
    images, targets = data(FIRST, 12)
    with torch.no_grad():
        logits = model.eval()(images, vote_group_size=4)["logits"][:, list(FIRST.classes)]
    hits = (logits.argmax(dim=1) == local(targets, FIRST)).float().mean()
    assert restricted.stats["batch"]["Acc@1"] == pytest.approx(100 * hits.item())


def test_evaluation_masks_classes_outside_the_stream():
    model = stubborn(make_model({}), favourite=5)  # an output that no task uses
    assert accuracies(evaluate(model)) == [0, 0]
    fewer = evaluate(model, replace(OPTIONS, all_classes=(0, 1, 2, 3, 4)))
    assert min(accuracies(fewer)) > 0
    assert fewer.stats["batch"]["Loss"] < 100


def test_evaluation_allows_classes_that_are_not_learned_yet():
    model = stubborn(make_model({}), favourite=5)
    assert accuracies(evaluate(model, test_set=FIRST)) == [0, 0]


def test_evaluation_counts_five_best():
    images, targets = data(FIRST, 12)
    model = make_model(None, head_type="token")
    result = evaluate(model)
    with torch.no_grad():
        ranks = model.eval()(images)["logits"].argsort(dim=1, descending=True)
    places = (ranks == targets[:, None]).long().argmax(dim=1)
    assert result.stats["batch"]["Acc@1"] == pytest.approx(100 / 12 * (places == 0).sum().item())
    assert result.stats["batch"]["Acc@5"] == pytest.approx(100 / 12 * (places < 5).sum().item())


DEFAULT_FREEZE = ModelSettings().freeze
UNFROZEN_POSITIONS = tuple(p for p in DEFAULT_FREEZE if p != "pos_embed")


@pytest.mark.parametrize("ties", ["lowest", "topk"])
@pytest.mark.parametrize("freeze", [DEFAULT_FREEZE, UNFROZEN_POSITIONS])
@pytest.mark.parametrize("head_type", ["prompt", "gap"])
def test_instance_wise_equals_vote_groups_of_one(head_type, freeze, ties):
    model = make_model({"vote_ties": ties}, freeze=freeze, head_type=head_type)
    if freeze is UNFROZEN_POSITIONS:  # the order of the prompts counts
        torch.nn.init.normal_(model.pos_embed_prompt)
    voted = evaluate(model, size=32)
    alone = evaluate(model, replace(OPTIONS, vote_group_size=1), size=32).stats["batch"]
    assert voted.stats["batch"]["Loss"] != pytest.approx(alone["Loss"], rel=1e-4)
    for key, value in alone.items():
        assert voted.stats["instance"][key] == pytest.approx(value, rel=1e-5), key


def test_instance_wise_equals_batchwise_off():
    voting, alone = make_model({}), make_model({"batchwise_prompt": False})
    alone.load_trained_state(voting.trained_state(), "other")
    found = evaluate(voting, size=16)
    assert found.stats["batch"] != found.stats["instance"]
    found = found.stats["instance"]
    for key, value in evaluate(alone, size=16).stats["batch"].items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def forward_sizes(model, calls):
    """Notes the number of images of every call of the model."""
    model.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))


def test_instance_wise_recomputes_overruled_images_only():
    model, calls = make_model({}).eval(), []
    images, _ = data(FIRST, 12)
    overruled = []
    with torch.no_grad():
        for x in images.split(4):
            out = model(x, vote_group_size=4)
            pairs = zip(out["prompt_idx"].tolist(), out["own_prompt_idx"].tolist(), strict=True)
            overruled.append(sum(set(served) != set(own) for served, own in pairs))
    assert any(0 < n < 4 for n in overruled)
    forward_sizes(model, calls)
    evaluate(model)
    assert calls == [size for n in overruled for size in (4, n) if size]


@pytest.mark.parametrize(
    ("pool", "vote_group_size"), [(None, 4), ({"batchwise_prompt": False}, 4), ({}, 1)]
)
def test_instance_wise_needs_no_second_pass_where_nobody_votes(pool, vote_group_size):
    model, calls = make_model(pool), []
    forward_sizes(model, calls)
    result = evaluate(model, replace(OPTIONS, vote_group_size=vote_group_size))
    assert calls == [4, 4, 4]
    assert result.stats["batch"] == result.stats["instance"]


@pytest.mark.parametrize("ties", ["lowest", "topk"])
def test_evaluation_does_not_depend_on_the_compute_batch(ties):
    model = make_model({"vote_ties": ties})
    wanted = evaluate(model, size=24, batch_size=4)
    assert wanted.stats["batch"] != wanted.stats["instance"]
    for batch_size in (8, 12, 24):
        found = evaluate(model, size=24, batch_size=batch_size)
        assert found.usage == wanted.usage
        for name in SELECTIONS:
            for key in ("Acc@1", "Acc@5"):
                assert found.stats[name][key] == wanted.stats[name][key]
            loss = wanted.stats[name]["Loss"]
            assert found.stats[name]["Loss"] == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("batch_size", [4, 12])
def test_evaluation_loss_is_mean_over_vote_groups(batch_size):
    model = make_model({})
    images, targets = data(FIRST, 10)
    result = evaluate(model, size=10, batch_size=batch_size)
    means = []
    with torch.no_grad():
        for x, y in zip(images.split(4), targets.split(4), strict=True):  # groups of 4, 4 and 2
            means.append(F.cross_entropy(model(x)["logits"], y).item())
    assert result.stats["batch"]["Loss"] == pytest.approx(sum(means) / 3, rel=1e-5)


def test_evaluation_counts_how_often_prompts_serve():
    model = make_model({})
    images, _ = data(FIRST, 12)
    result = evaluate(model)
    with torch.no_grad():
        outs = [model(x, vote_group_size=4) for x in images.split(4)]
    for name, key in (("batch", "prompt_idx"), ("instance", "own_prompt_idx")):
        ids = torch.cat([out[key] for out in outs]).flatten().tolist()
        assert result.usage[name] == [ids.count(i) for i in range(M)]
        assert sum(result.usage[name]) == 12 * K
    best = torch.cat([out["similarity"].topk(K, dim=1).values for out in outs])
    assert result.mean_similarity == pytest.approx(best.mean().item(), rel=1e-5)


def test_evaluation_without_pool_has_no_usage():
    result = evaluate(make_model(None, head_type="token"))
    assert result.usage == {}
    assert result.mean_similarity is None
    assert result.index == 0


def test_evaluation_ignores_the_prompt_mask_and_stays_in_evaluation_mode():
    masked, free = make_model({"diversify": "mask"}), make_model({})
    for model in (masked, free):
        model.train()
    assert evaluate(masked, test_set=SECOND) == evaluate(free, test_set=SECOND)
    assert not masked.training


def test_evaluation_changes_nothing():
    model = make_model({})
    before = copy.deepcopy(model.state_dict())
    evaluate(model)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


# Evaluation of a task


def till_now(model, task, matrices):
    run = make_run(model, matrices=matrices, test_loader=lambda test_set: Loader(*data(test_set)))
    return engine.evaluate_till_now(model, task, TrainState(task.index), None, run)


def test_evaluate_till_now_fills_the_column_of_its_task():
    matrices = {name: metrics.empty_matrix(2, 2) for name in SELECTIONS}
    results = till_now(make_model({}), STREAM[1], matrices)
    assert [r.index for r in results] == [0, 1]
    for name in SELECTIONS:
        assert np.isnan(matrices[name][:, 0]).all()
        assert matrices[name][:, 1].tolist() == [r.stats[name]["Acc@1"] for r in results]


def test_evaluate_till_now_says_what_the_original_said(caplog):
    matrices = {name: metrics.empty_matrix(2, 2) for name in SELECTIONS}
    matrices["batch"][0, 0] = matrices["instance"][0, 0] = 100
    with caplog.at_level(logging.INFO):
        results = till_now(make_model({}), STREAM[1], matrices)
    lines = [r.getMessage() for r in caplog.records]
    first = results[0].stats["batch"]
    wanted = "* Acc@1 {Acc@1:.3f} Acc@5 {Acc@5:.3f} loss {Loss:.3f}".format(**first)
    assert any(line.startswith(wanted) for line in lines)
    means = average_stats(results, "batch")
    lost = 100 - first["Acc@1"]
    summary = (
        f"[Average accuracy till task2]\tAcc@1: {means['Acc@1']:.4f}\t"
        f"Acc@5: {means['Acc@5']:.4f}\tLoss: {means['Loss']:.4f}\t"
        f"Forgetting: {lost:.4f}\tBackward: {-lost:.4f}"
    )
    assert summary in lines
    assert any(line.startswith("[Instance-wise accuracy till task2]\tAcc@1:") for line in lines)


def test_evaluate_till_now_says_nothing_of_forgetting_after_the_first_task(caplog):
    matrices = {name: metrics.empty_matrix(2, 2) for name in SELECTIONS}
    with caplog.at_level(logging.INFO):
        till_now(make_model({}), STREAM[0], matrices)
    (line,) = [m for m in caplog.messages if m.startswith("[Average accuracy till task1]")]
    assert not re.search("Forgetting|Backward", line)


def test_task_without_test_sets_is_trained_and_not_evaluated(caplog):
    model, reports = make_model({}), []
    tasks = [replace(STREAM[0], test_sets=()), STREAM[1]]
    before = model.head.weight.detach().clone()

    def on_task_end(report):
        reports.append(report)
        assert not torch.equal(model.head.weight, before)

    with caplog.at_level(logging.INFO):
        matrices = run(model, tasks=tasks, on_task_end=on_task_end)
    assert [len(report.evaluations) for report in reports] == [0, 2]
    assert reports[0].train_stats.keys() == {"Lr", "Loss", "Acc@1", "Acc@5"}
    for matrix in matrices.values():
        assert np.isnan(matrix).tolist() == [[True, False], [True, False]]
    assert [m for m in caplog.messages if "till task" in m and "task1" in m] == []
    (line,) = [m for m in caplog.messages if m.startswith("[Average accuracy till task2]")]
    assert not re.search("Forgetting|Backward", line)  # unknown without the first evaluation


def test_one_test_set_of_all_tasks_has_one_row_and_no_forgetting(caplog):
    tasks = [replace(task, test_sets=(FIRST,)) for task in STREAM]
    with caplog.at_level(logging.INFO):
        matrices = run(make_model({}), tasks=tasks)
    assert all(np.isfinite(matrix).all() for matrix in matrices.values())
    lines = [m for m in caplog.messages if "till task2" in m]
    assert len(lines) == 2
    assert not any(re.search("Forgetting|Backward", line) for line in lines)


def test_average_stats_weighs_test_sets_equally():
    def result(acc1, acc5, loss):
        return Evaluation(0, {"batch": {"Acc@1": acc1, "Acc@5": acc5, "Loss": loss}})

    found = average_stats([result(10.0, 50.0, 1.0), result(30.0, 100.0, 4.0)], "batch")
    assert found == {"Acc@1": 20, "Acc@5": 75, "Loss": 2.5}


# The stream


def test_stream_reports_every_task_and_fills_the_matrices():
    reports = []
    options = replace(OPTIONS, epochs=2)
    matrices = run(make_model({}), options, on_task_end=reports.append)
    assert [r.task for r in reports] == [0, 1]
    assert [len(r.evaluations) for r in reports] == [1, 2]
    for name in SELECTIONS:
        assert np.isnan(matrices[name]).tolist() == [[False, False], [True, False]]
        for report in reports:
            for result in report.evaluations:
                assert matrices[name][result.index, report.task] == result.stats[name]["Acc@1"]
    assert all(r.train_stats.keys() == {"Lr", "Loss", "Acc@1", "Acc@5"} for r in reports)
    assert all(r.train_seconds > 0 and r.eval_seconds > 0 for r in reports)


def test_stream_runs_all_epochs_of_every_task():
    loaders = {}

    def train_loader(task):
        return loaders.setdefault(task.index, Loader(*data(task)))

    run(make_model({}), replace(OPTIONS, epochs=3), train_loader=train_loader)
    assert [loader.epochs for loader in loaders.values()] == [[0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize(("reinit", "num_made"), [(True, 2), (False, 1)])
def test_reinit_optimizer_makes_one_for_each_task(reinit, num_made):
    model, made = make_model({}), []

    def make_optimizer():
        made.append(sgd(model))
        return made[-1]

    options = replace(OPTIONS, reinit_optimizer=reinit)
    run(model, options, make_optimizer=make_optimizer)
    assert len(made) == num_made


def test_reinit_optimizer_forgets_momentum():
    def trained(reinit):
        model = make_model({})
        parameters = [p for p in model.parameters() if p.requires_grad]
        run(
            model,
            replace(OPTIONS, reinit_optimizer=reinit),
            make_optimizer=lambda: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        )
        return model.head.weight.detach()

    first_task_rows = list(FIRST.classes)
    fresh, kept = trained(True), trained(False)
    assert not torch.equal(fresh[first_task_rows], kept[first_task_rows])


class Steps:
    def __init__(self, optimizer):
        self.optimizer, self.steps = optimizer, []

    def step(self, epoch, metric=None):
        self.steps.append((epoch, metric))


@pytest.mark.parametrize("reinit", [True, False])
def test_scheduler_is_new_for_each_task_and_steps_each_epoch(reinit):
    model, optimizers, schedulers, last = make_model({}), [], [], []

    def make_optimizer():
        optimizers.append(sgd(model))
        return optimizers[-1]

    def make_scheduler(optimizer):
        schedulers.append(Steps(optimizer))
        return schedulers[-1]

    run(
        model,
        replace(OPTIONS, epochs=3, reinit_optimizer=reinit),
        make_optimizer=make_optimizer,
        make_scheduler=make_scheduler,
        on_task_end=lambda report: last.append(report.train_stats["Acc@1"]),
    )
    assert [[epoch for epoch, _ in s.steps] for s in schedulers] == [[1, 2, 3], [1, 2, 3]]
    assert [s.steps[-1][1] for s in schedulers] == last
    wanted = optimizers if reinit else optimizers * 2
    assert all(s.optimizer is o for s, o in zip(schedulers, wanted, strict=True))


@pytest.mark.parametrize("reinit", [True, False])
def test_scheduler_of_timm_starts_each_task_at_the_full_rate(reinit, monkeypatch):
    model, rates = make_model({}), []
    train_one_epoch = engine.train_one_epoch

    def watched(*args):
        stats = train_one_epoch(*args)
        rates.append(stats["Lr"])
        return stats

    monkeypatch.setattr(engine, "train_one_epoch", watched)
    run(
        model,
        replace(OPTIONS, epochs=3, reinit_optimizer=reinit),
        make_scheduler=lambda optimizer: CosineLRScheduler(optimizer, t_initial=3),
    )
    assert rates[:3] == pytest.approx([0.1, 0.075, 0.025])
    assert rates[3:] == pytest.approx(rates[:3])


@pytest.mark.parametrize(("prompts", "keys"), [(True, False), (False, True), (False, False)])
def test_shared_pool_and_keys_start_from_the_task_before(prompts, keys):
    model = make_model({"diversify": "mask"})
    before = copy.deepcopy(model.state_dict())
    after_first = []

    def note(report):
        after_first.append(copy.deepcopy(model.state_dict()))

    class Frozen(torch.optim.SGD):
        """Trains the first task alone, so that the second shows what it started from."""

        def step(self):
            if not after_first:
                super().step()

    parameters = [p for p in model.parameters() if p.requires_grad]
    run(
        model,
        replace(OPTIONS, shared_prompt_pool=prompts, shared_prompt_key=keys),
        make_optimizer=lambda: Frozen(parameters, lr=0.1),
        on_task_end=note,
    )
    for name, shared in (("prompt.prompt", prompts), ("prompt.prompt_key", keys)):
        first = after_first[0][name][:K]
        assert not torch.equal(first, before[name][:K])
        wanted = first if shared else before[name][K : 2 * K]
        assert torch.equal(model.state_dict()[name][K : 2 * K], wanted), name


def test_stream_without_pool_trains_the_head():
    model = make_model(None, head_type="token")
    before = model.head.weight.detach().clone()
    matrices = run(model, replace(OPTIONS, shared_prompt_pool=True, shared_prompt_key=True))
    assert not torch.equal(model.head.weight, before)
    assert np.array_equal(matrices["batch"], matrices["instance"], equal_nan=True)


def test_stream_repeats_itself_to_the_bit():
    first, second = make_model({}), make_model({})
    matrices = [run(model, replace(OPTIONS, epochs=2, clip_grad=1.0)) for model in (first, second)]
    for name in SELECTIONS:
        assert np.array_equal(matrices[0][name], matrices[1][name], equal_nan=True)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
