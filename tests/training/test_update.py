"""One update: what is summed, scaled, clipped, checked and applied, and that nothing waits."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from cli.settings import OptimizerSettings
from experiment import build
from training.update import OptimizerStep

CPU = torch.device("cpu")

#: Those that skip a step on a GPU without copies.
FUSED = build._SKIP_STEPS


def make_step(*values, opt=torch.optim.SGD, **kwargs):
    parameters = [nn.Parameter(torch.tensor(value)) for value in values]
    return OptimizerStep(parameters, lambda: opt(parameters, lr=0.5), CPU, **kwargs)


def step(update, *gradients, loss=1.0):
    """A step whose gradients are given."""
    update.begin()
    value = sum(
        (p * torch.tensor(g)).sum() for p, g in zip(update.parameters, gradients, strict=True)
    )
    update.backward(value)
    return update.step(torch.tensor(loss)).item()


def values(update):
    return [p.tolist() for p in update.parameters]


def test_step_applies_gradients_and_gives_their_norm():
    update = make_step([1.0, 2.0], [3.0])
    assert step(update, [3.0, 0.0], [4.0]) == pytest.approx(5)
    assert values(update) == [[-0.5, 2.0], [1.0]]


def test_norm_is_that_before_clipping():
    update = make_step([1.0, 2.0], [3.0], clip_grad=0.5)
    assert step(update, [3.0, 0.0], [4.0]) == pytest.approx(5)
    moved = [1 - 0.5 * 0.3, 2.0, 3 - 0.5 * 0.4]
    assert torch.cat(update.parameters).tolist() == pytest.approx(moved, rel=1e-5)


def test_frozen_parameters_are_no_business_of_an_update():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    trained = nn.Parameter(torch.ones(2))
    update = OptimizerStep([frozen, trained], lambda: torch.optim.SGD([trained], lr=1.0), CPU)
    assert update.parameters == [trained]


@pytest.mark.parametrize(
    ("opt", "waiting"),
    [
        *[(opt, waits) for opt in (torch.optim.SGD, torch.optim.Adam) for waits in (True, False)],
        *[
            (partial(opt, fused=True), False)
            for opt in (*FUSED, partial(torch.optim.SGD, momentum=0.9))
        ],
    ],
)
@pytest.mark.parametrize(
    ("gradient", "loss"), [("nan", 1.0), ("inf", 1.0), (1.0, "nan"), (1.0, "-inf")]
)
def test_nothing_changes_from_a_value_on_that_is_not_finite(
    opt, waiting, gradient, loss, monkeypatch
):
    update = make_step([1.0, 2.0], [3.0], opt=opt)
    if not waiting:  # as on a GPU
        monkeypatch.setattr(update, "waits", False)
    step(update, [1.0, 1.0], [1.0])
    before = values(update)
    assert before != [[1.0, 2.0], [3.0]]
    step(update, [float(gradient), 1.0], [1.0], loss=float(loss))
    for _ in range(3):
        step(update, [1.0, 1.0], [1.0])
    assert values(update) == before


@pytest.mark.parametrize("fused", [False, True], ids=["on the CPU", "fused on a GPU"])
def test_step_takes_no_copies(fused, monkeypatch):
    update = make_step([1.0, 2.0], opt=partial(torch.optim.SGD, fused=fused))
    update.waits = not fused
    monkeypatch.setattr(torch.Tensor, "clone", None)
    step(update, [1.0, 1.0])
    assert values(update) == [[0.5, 1.5]]


@pytest.mark.parametrize("opt", FUSED)
@pytest.mark.parametrize("fused", [False, True])
def test_state_of_a_fused_optimizer_loads_into_another_and_back(opt, fused):
    one, other = (make_step([1.0], opt=partial(opt, fused=f)) for f in (fused, not fused))
    step(one, [1.0])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    other.waits = fused  # where it is fused, a step is skipped on the device
    other.parameters[0].data.copy_(one.parameters[0].data)
    for update in (one, other):
        step(update, [0.5])
    assert other.optimizer.param_groups[0]["fused"] is not fused
    assert values(other)[0] == pytest.approx(values(one)[0], rel=1e-6)


def test_renew_forgets_the_state_of_the_optimizer():
    update = make_step([1.0], opt=torch.optim.Adam)
    step(update, [1.0])
    first = update.optimizer
    update.renew()
    assert update.optimizer is not first
    assert not update.optimizer.state


# Scaled losses


def test_scaled_loss_gives_the_same_update():
    plain, scaled = make_step([1.0, 2.0]), make_step([1.0, 2.0], loss_scaling=True)
    assert step(plain, [0.25, -0.5]) == step(scaled, [0.25, -0.5])
    assert values(plain) == values(scaled)


def test_process_without_an_image_steps_with_a_scaled_loss():
    """Its gradients are those of the others."""
    update = make_step([1.0, 2.0], loss_scaling=True)
    update.parameters[0].grad = torch.tensor([2.0, 4.0]) * update.scaler.get_scale()
    update.step(torch.tensor(1.0))
    assert values(update) == [[0.0, 0.0]]


def test_overflow_leaves_a_step_out_and_lowers_the_scale():
    update = make_step([1.0, 2.0], loss_scaling=True)
    scale = update.scaler.get_scale()
    step(update, [float("inf"), 1.0])
    assert update.scaler.get_scale() == scale / 2
    assert values(update) == [[1.0, 2.0]]
    step(update, [1.0, 1.0])
    assert values(update) == [[0.5, 1.5]]


def test_a_loss_that_is_not_finite_ends_a_scaled_run_too():
    update = make_step([1.0], loss_scaling=True)
    step(update, [1.0], loss=float("nan"))
    step(update, [1.0])
    assert values(update) == [[1.0]]


def test_renew_keeps_the_scale_or_takes_that_of_a_state():
    update, other = (make_step([1.0], loss_scaling=True) for _ in range(2))
    step(update, [float("inf")])
    scale = update.scaler.get_scale()
    assert scale != other.scaler.get_scale()
    other.renew(update.state_dict())
    update.renew()
    for one in (update, other):
        assert not one.optimizer.state
        step(one, [1.0])
        assert one.scaler.get_scale() == scale


def test_overflow_at_any_scale_is_no_matter_of_precision():
    update = make_step([1.0], loss_scaling=True)
    scales = []
    while update.may_overflow:
        step(update, [float("inf")])
        scales.append(update.scaler.get_scale())
    assert len(scales) == 26  # from 2^16 to 2^-10
    assert not make_step([1.0]).may_overflow


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_state_continues_where_it_was(loss_scaling):
    torch.manual_seed(0)
    gradients = [torch.randn(2).tolist() for _ in range(6)]
    gradients[1] = [float("inf"), 1.0] if loss_scaling else gradients[1]
    whole = make_step([1.0, 2.0], opt=torch.optim.Adam, loss_scaling=loss_scaling)
    for gradient in gradients[:3]:
        step(whole, gradient)
    state, middle = copy.deepcopy(whole.state_dict()), values(whole)[0]
    other = make_step(middle, opt=torch.optim.Adam, loss_scaling=loss_scaling)
    other.load_state_dict(state)
    for update in (whole, other):
        for gradient in gradients[3:]:
            step(update, gradient)
    assert values(whole) == values(other)
    assert whole.scaler.get_scale() == other.scaler.get_scale()


class OnCuda(nn.Parameter):
    """Looks as if it were on a GPU."""

    is_cuda = True


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lookahead_adam", "lamb"])
def test_optimizers_that_can_skip_a_step_on_a_gpu_are_fused_there(name):
    found = []
    for kind in (nn.Parameter, OnCuda):
        model = nn.Module()
        model.weight, model.no_weight_decay = kind(torch.ones(2)), set
        optimizer = build.make_optimizer(OptimizerSettings(opt=name), model, lr=0.1)
        found.append(bool(optimizer.param_groups[0].get("fused")))
    assert found == [False, name in ("adam", "adamw", "sgd")]
