"""One update: what is summed, scaled, clipped, checked and applied, and that nothing waits."""

import copy

import pytest
import torch
from torch import nn

from training.update import Updater

CPU = torch.device("cpu")


def make_updater(*values, opt=torch.optim.SGD, **kwargs):
    parameters = [nn.Parameter(torch.tensor(value)) for value in values]
    return Updater(parameters, lambda: opt(parameters, lr=0.5), CPU, **kwargs)


def step(updater, *gradients, loss=1.0):
    """A step whose gradients are given."""
    updater.begin()
    value = sum(
        (p * torch.tensor(g)).sum() for p, g in zip(updater.parameters, gradients, strict=True)
    )
    updater.backward(value)
    return updater.step(torch.tensor(loss)).item()


def values(updater):
    return [p.detach().clone() for p in updater.parameters]


def test_step_applies_gradients_and_gives_their_norm():
    updater = make_updater([1.0, 2.0], [3.0])
    assert step(updater, [3.0, 0.0], [4.0]) == pytest.approx(5)
    assert [v.tolist() for v in values(updater)] == [[-0.5, 2.0], [1.0]]


def test_norm_is_that_before_clipping():
    updater = make_updater([1.0, 2.0], [3.0], clip_grad=0.5)
    assert step(updater, [3.0, 0.0], [4.0]) == pytest.approx(5)
    moved = [1 - 0.5 * 0.3, 2.0, 3 - 0.5 * 0.4]
    assert torch.cat(values(updater)).tolist() == pytest.approx(moved, rel=1e-5)


def test_frozen_parameters_are_no_business_of_an_update():
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    trained = nn.Parameter(torch.ones(2))
    updater = Updater([frozen, trained], lambda: torch.optim.SGD([trained], lr=1.0), CPU)
    assert updater.parameters == [trained]


@pytest.mark.parametrize("opt", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize(
    ("gradient", "loss"), [("nan", 1.0), ("inf", 1.0), (1.0, "nan"), (1.0, "-inf")]
)
def test_nothing_changes_from_a_value_on_that_is_not_finite(opt, gradient, loss):
    updater = make_updater([1.0, 2.0], [3.0], opt=opt)
    step(updater, [1.0, 1.0], [1.0])
    before = values(updater)
    step(updater, [float(gradient), 1.0], [1.0], loss=float(loss))
    for _ in range(3):
        step(updater, [1.0, 1.0], [1.0])
    assert all(torch.equal(a, b) for a, b in zip(values(updater), before, strict=True))


def test_renew_forgets_the_state_of_the_optimizer():
    updater = make_updater([1.0], opt=torch.optim.Adam)
    step(updater, [1.0])
    first = updater.optimizer
    updater.renew()
    assert updater.optimizer is not first
    assert not updater.optimizer.state


def test_scaled_loss_gives_the_same_update():
    plain, scaled = make_updater([1.0, 2.0]), make_updater([1.0, 2.0], loss_scaling=True)
    norms = [step(updater, [0.25, -0.5]) for updater in (plain, scaled)]
    assert norms[0] == norms[1]
    assert torch.equal(*[values(updater)[0] for updater in (plain, scaled)])


def test_overflow_leaves_a_step_out_and_lowers_the_scale():
    updater = make_updater([1.0, 2.0], loss_scaling=True)
    scale, before = updater.scaler.get_scale(), values(updater)
    step(updater, [float("inf"), 1.0])
    assert updater.scaler.get_scale() == scale / 2
    assert torch.equal(values(updater)[0], before[0])
    step(updater, [1.0, 1.0])
    assert values(updater)[0].tolist() == [0.5, 1.5]


def test_a_loss_that_is_not_finite_ends_a_scaled_run_too():
    updater = make_updater([1.0], loss_scaling=True)
    step(updater, [1.0], loss=float("nan"))
    step(updater, [1.0])
    assert values(updater)[0].tolist() == [1.0]


def test_renew_keeps_the_scale():
    updater = make_updater([1.0], loss_scaling=True)
    step(updater, [float("inf")])
    scale = updater.scaler.get_scale()
    updater.renew()
    step(updater, [1.0])
    assert updater.scaler.get_scale() == scale


def test_renew_takes_the_scale_of_a_state():
    updater, other = (make_updater([1.0], loss_scaling=True) for _ in range(2))
    step(updater, [float("inf")])
    other.renew(updater.state_dict())
    assert other.scaler.get_scale() == updater.scaler.get_scale()
    assert not other.optimizer.state


def test_overflow_at_any_scale_is_no_matter_of_precision():
    updater = make_updater([1.0], loss_scaling=True)
    scales = []
    while updater.may_overflow:
        step(updater, [float("inf")])
        scales.append(updater.scaler.get_scale())
    assert len(scales) == 26  # from 2^16 to 2^-10
    assert not make_updater([1.0]).may_overflow


@pytest.mark.parametrize("loss_scaling", [False, True])
def test_state_goes_on_where_it_was(loss_scaling):
    torch.manual_seed(0)
    gradients = [torch.randn(2).tolist() for _ in range(6)]
    gradients[1] = [float("inf"), 1.0] if loss_scaling else gradients[1]
    whole = make_updater([1.0, 2.0], opt=torch.optim.Adam, loss_scaling=loss_scaling)
    for gradient in gradients[:3]:
        step(whole, gradient)
    state, middle = copy.deepcopy(whole.state_dict()), values(whole)[0]
    other = make_updater(middle.tolist(), opt=torch.optim.Adam, loss_scaling=loss_scaling)
    other.load_state_dict(state)
    for updater in (whole, other):
        for gradient in gradients[3:]:
            step(updater, gradient)
    assert torch.equal(values(whole)[0], values(other)[0])
    assert whole.scaler.get_scale() == other.scaler.get_scale()


def test_nothing_waits_for_the_device():
    """A tensor without memory refuses to be read."""
    device = torch.device("meta")
    weight = nn.Parameter(torch.ones(3, device=device))
    updater = Updater([weight], lambda: torch.optim.Adam([weight]), device, clip_grad=1.0)
    for _ in range(2):
        updater.begin()
        loss = (weight * 2).sum()
        updater.backward(loss)
        norm = updater.step(loss.detach())
    with pytest.raises((RuntimeError, NotImplementedError)):
        norm.item()
