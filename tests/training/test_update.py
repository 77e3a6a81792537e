"""One update: what is summed, scaled, clipped, checked and applied, and that nothing waits."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cli.settings import OptimizerSettings
from experiment import build
from helpers.engine_doubles import make_run
from training.update import OptimizerStep

#: Those that skip a step on a GPU without copies.
FUSED = build._SKIP_STEPS


def make_step(*values, opt=torch.optim.SGD, **kwargs):
    parameters = [nn.Parameter(torch.tensor(value)) for value in values]
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    model = SimpleNamespace(parameters=lambda: [frozen, *parameters])
    return OptimizerStep(make_run(model, make_optimizer=lambda: opt(parameters, lr=0.5), **kwargs))


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


@pytest.mark.parametrize(
    ("clip_grad", "amp", "wanted"),
    [(None, None, [-0.5, 2, 1]), (None, "fp16", [-0.5, 2, 1]), (0.5, None, [0.85, 2, 2.8])],
)
def test_step_applies_gradients_and_gives_their_norm_before_clipping(clip_grad, amp, wanted):
    update = make_step([1.0, 2.0], [3.0], clip_grad=clip_grad, amp=amp)
    assert update.waits
    assert step(update, [3.0, 0.0], [4.0]) == pytest.approx(5)
    assert torch.cat(update.parameters).tolist() == pytest.approx(wanted, rel=1e-5)


MOMENTUM = partial(torch.optim.SGD, momentum=0.9)


@pytest.mark.parametrize(
    ("opt", "waiting"),
    [(opt, waits) for opt in (torch.optim.SGD, torch.optim.Adam) for waits in (True, False)]
    + [(partial(opt, fused=True), False) for opt in (*FUSED, MOMENTUM)],
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


@pytest.mark.parametrize("amp", [None, "fp16"])
def test_step_without_parameters_does_nothing_but_check_the_loss(amp):
    update = make_step(opt=lambda *_, **rate: torch.optim.SGD([{"params": []}], **rate), amp=amp)
    for loss, sound in ((1.0, True), (float("nan"), False), (1.0, False)):
        update.begin()
        assert (update.step(torch.tensor(loss)).item(), update.sound.item()) == (0, sound)


# Scaled losses


def test_process_without_an_image_steps_with_a_scaled_loss():
    """Its gradients are those of the others."""
    update = make_step([1.0, 2.0], amp="fp16")
    update.parameters[0].grad = torch.tensor([2.0, 4.0]) * update.scaler.get_scale()
    update.step(torch.tensor(1.0))
    assert values(update) == [[0.0, 0.0]]


def test_overflow_leaves_a_step_out_and_lowers_the_scale():
    update = make_step([1.0, 2.0], amp="fp16")
    scale = update.scaler.get_scale()
    step(update, [float("inf"), 1.0])
    assert update.scaler.get_scale() == scale / 2
    assert values(update) == [[1.0, 2.0]]
    step(update, [1.0, 1.0])
    assert values(update) == [[0.5, 1.5]]


def test_a_loss_that_is_not_finite_ends_a_scaled_run_too():
    update = make_step([1.0], amp="fp16")
    step(update, [1.0], loss=float("nan"))
    step(update, [1.0])
    assert values(update) == [[1.0]]


def test_renew_keeps_the_scale_or_takes_that_of_a_state():
    adam = {"opt": torch.optim.Adam, "amp": "fp16"}
    update, other = make_step([1.0], **adam), make_step([1.0], **adam)
    for one, gradient in ((update, 1.0), (update, float("inf")), (other, 1.0)):
        step(one, [gradient])
    assert update.optimizer.state
    scale = update.scaler.get_scale()
    assert scale != other.scaler.get_scale()
    other.renew(update.state_dict())
    update.renew()
    for one in (update, other):
        assert not one.optimizer.state
        step(one, [1.0])
        assert one.scaler.get_scale() == scale


def test_overflow_at_any_scale_is_no_matter_of_precision():
    update = make_step([1.0], amp="fp16")
    scales = []
    while update.may_overflow:
        step(update, [float("inf")])
        scales.append(update.scaler.get_scale())
    assert len(scales) == 26  # from 2^16 to 2^-10
    assert not make_step([1.0]).may_overflow


@pytest.mark.parametrize("amp", [None, "fp16"])
def test_state_continues_where_it_was(amp):
    torch.manual_seed(0)
    gradients = [torch.randn(2).tolist() for _ in range(6)]
    gradients[1] = [float("inf"), 1.0] if amp else gradients[1]
    whole = make_step([1.0, 2.0], opt=torch.optim.Adam, amp=amp)
    for gradient in gradients[:3]:
        step(whole, gradient)
    state, middle = copy.deepcopy(whole.state_dict()), values(whole)[0]
    other = make_step(middle, opt=torch.optim.Adam, amp=amp)
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
