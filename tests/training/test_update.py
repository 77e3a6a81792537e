"""One update: what is summed, scaled, clipped, checked and applied, and that nothing waits."""

import copy

import pytest
import torch
from torch import nn

from training.update import OptimizerStep

CPU = torch.device("cpu")


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
    return [p.detach().clone() for p in update.parameters]


def test_step_applies_gradients_and_gives_their_norm():
    update = make_step([1.0, 2.0], [3.0])
    assert step(update, [3.0, 0.0], [4.0]) == pytest.approx(5)
    assert [v.tolist() for v in values(update)] == [[-0.5, 2.0], [1.0]]


def test_norm_is_that_before_clipping():
    update = make_step([1.0, 2.0], [3.0], clip_grad=0.5)
    assert step(update, [3.0, 0.0], [4.0]) == pytest.approx(5)
    moved = [1 - 0.5 * 0.3, 2.0, 3 - 0.5 * 0.4]
    assert torch.cat(values(update)).tolist() == pytest.approx(moved, rel=1e-5)


def test_frozen_parameters_are_no_business_of_an_update():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    trained = nn.Parameter(torch.ones(2))
    update = OptimizerStep([frozen, trained], lambda: torch.optim.SGD([trained], lr=1.0), CPU)
    assert update.parameters == [trained]


@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("gradient", "loss"), [("nan", 1.0), ("inf", 1.0), (1.0, "nan"), (1.0, "-inf")]
)
def test_nothing_changes_from_a_value_on_that_is_not_finite(opt, gradient, loss):
    update = make_step([1.0, 2.0], [3.0], opt=opt)
    step(update, [1.0, 1.0], [1.0])
    before = values(update)
    step(update, [float(gradient), 1.0], [1.0], loss=float(loss))
    for _ in range(3):
        step(update, [1.0, 1.0], [1.0])
    assert all(torch.equal(a, b) for a, b in zip(values(update), before, strict=True))


def test_renew_forgets_the_state_of_the_optimizer():
    update = make_step([1.0], opt=torch.optim.Adam)
    step(update, [1.0])
    first = update.optimizer
    update.renew()
    assert update.optimizer is not first
    assert not update.optimizer.state


def test_scaled_loss_gives_the_same_update():
    plain, scaled = make_step([1.0, 2.0]), make_step([1.0, 2.0], loss_scaling=True)
    norms = [step(update, [0.25, -0.5]) for update in (plain, scaled)]
    assert norms[0] == norms[1]
    assert torch.equal(*[values(update)[0] for update in (plain, scaled)])


def test_overflow_leaves_a_step_out_and_lowers_the_scale():
    update = make_step([1.0, 2.0], loss_scaling=True)
    scale, before = update.scaler.get_scale(), values(update)
    step(update, [float("inf"), 1.0])
    assert update.scaler.get_scale() == scale / 2
    assert torch.equal(values(update)[0], before[0])
    step(update, [1.0, 1.0])
    assert values(update)[0].tolist() == [0.5, 1.5]


def test_a_loss_that_is_not_finite_ends_a_scaled_run_too():
    update = make_step([1.0], loss_scaling=True)
    step(update, [1.0], loss=float("nan"))
    step(update, [1.0])
    assert values(update)[0].tolist() == [1.0]


def test_renew_keeps_the_scale():
    update = make_step([1.0], loss_scaling=True)
    step(update, [float("inf")])
    scale = update.scaler.get_scale()
    update.renew()
    step(update, [1.0])
    assert update.scaler.get_scale() == scale


def test_renew_takes_the_scale_of_a_state():
    update, other = (make_step([1.0], loss_scaling=True) for _ in range(2))
    step(update, [float("inf")])
    other.renew(update.state_dict())
    assert other.scaler.get_scale() == update.scaler.get_scale()
    assert not other.optimizer.state


def test_overflow_at_any_scale_is_no_matter_of_precision():
    update = make_step([1.0], loss_scaling=True)
    scales = []
    while update.may_overflow:
        step(update, [float("inf")])
        scales.append(update.scaler.get_scale())
    assert len(scales) == 26  # from 2^16 to 2^-10
    assert not make_step([1.0]).may_overflow


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_state_goes_on_where_it_was(loss_scaling):
    torch.manual_seed(0)
    gradients = [torch.randn(2).tolist() for _ in range(6)]
    gradients[1] = [float("inf"), 1.0] if loss_scaling else gradients[1]
    whole = make_step([1.0, 2.0], opt=torch.optim.Adam, loss_scaling=loss_scaling)
    for gradient in gradients[:3]:
        step(whole, gradient)
    state, middle = copy.deepcopy(whole.state_dict()), values(whole)[0]
    other = make_step(middle.tolist(), opt=torch.optim.Adam, loss_scaling=loss_scaling)
    other.load_state_dict(state)
    for update in (whole, other):
        for gradient in gradients[3:]:
            step(update, gradient)
    assert torch.equal(values(whole)[0], values(other)[0])
    assert whole.scaler.get_scale() == other.scaler.get_scale()


def test_nothing_waits_for_the_device():
    """A tensor without memory cannot be read."""
    device = torch.device("meta")
    weight = nn.Parameter(torch.ones(3, device=device))
    update = OptimizerStep([weight], lambda: torch.optim.Adam([weight]), device, clip_grad=1.0)
    for _ in range(2):
        update.begin()
        loss = (weight * 2).sum()
        update.backward(loss)
        norm = update.step(loss.detach())
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm.item()
