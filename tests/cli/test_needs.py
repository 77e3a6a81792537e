"""Settings that have an effect only together with others."""

import pytest
import timm.optim

from cli import needs
from cli.settings import FLAGS, Settings
from helpers.command_lines import settings_of
from helpers.tables import assert_says, cases

#: A command line; the note at the start of its run.
NOTES = """
digits_l2p linear_probe
cifar100_l2p_official_v2 linear_probe
linear_probe --top_k 3 --seed 1
  Without effect: --top_k 3 (needs --prompt_pool)
--min-lr 1e-5 --warmup-epochs 2 --decay-rate .5 --lr-noise-pct .5
  --warmup-epochs 2 (needs --sched other than constant) .. --min-lr .. --decay-rate .. --lr-noise
--sched cosine --warmup-epochs 2 --min-lr 0.1 --cooldown-epochs 3
  Without effect: --cooldown-epochs 3 (needs epochs after the schedule
--sched step --decay-epochs 2 --decay-milestones 3
  Without effect: --decay-milestones 3 (needs --sched multistep)
--momentum 0.5 --opt sgd
--momentum 0.5 --opt AdamW
  Without effect: --momentum 0.5 (needs --opt other than adam or adamw or
--opt lookahead_sgd --opt-eps 1e-6
  Without effect: --opt-eps 1e-06
--opt novograd --opt-eps 1e-6 --momentum 0.5
--remode const --recount 2 --reprob 0.5
--remode const --recount 2
  Without effect: --remode const (needs --reprob); --recount 2 (needs --reprob)
--no-pull_constraint --pull_constraint_coeff 0.3 --no-prompt_key --prompt_key_init zero
  --prompt_key_init zero (needs --prompt_key); --pull_constraint_coeff 0.3 (needs --pull_constraint)
--no-batchwise_prompt --vote_group_size 8 --buffer_size 100
--no-batchwise_prompt --vote_group_size 8
  Without effect: --vote_group_size 8
--scenario domain-incremental --no-shuffle
  Without effect: --shuffle false
joint --eval_every 3
  Without effect: --eval_every 3 (needs --joint false)
"""


@pytest.mark.parametrize(("line", "expected"), cases(NOTES))
def test_what_is_said_without_effect_is_reported(line, expected):
    """A configuration that ships may set what an overlay makes idle."""
    note = needs.note(settings_of(line))
    assert_says([note] if note else [], expected)


def test_a_file_of_ones_own_is_reported_where_it_differs_from_the_default(yaml_file):
    path = yaml_file("{prompt_pool: false, head_type: token, size: 10, top_k: 3}")
    assert needs.note(settings_of(path)) == "Without effect: --top_k 3 (needs --prompt_pool)"


def test_what_has_no_effect_does_not_tell_settings_apart():
    one, same, other = (
        needs.effective(settings_of(line).stored())
        for line in ("linear_probe", "linear_probe --top_k 3 --min-lr 1", "linear_probe --lr 1")
    )
    assert one == same != other
    assert needs.effective({"prompt_pool": True, "top_k": 3} | Settings().stored())["top_k"] == 5


def test_settings_that_need_others_are_settings():
    for names, *_ in (*needs._NEEDS, *needs._REJECTED):
        assert [name for name in names.split() if name not in FLAGS] == []


@pytest.mark.parametrize(("name", "option"), [("momentum", "has_momentum"), ("opt_eps", "has_eps")])
def test_optimizers_lack_what_the_table_says(name, option):
    known = set(map(str, timm.optim.list_optimizers()))
    names = dict(needs._NEEDS)[name].removeprefix("opt!=").split(",")
    found = {n: getattr(timm.optim.get_optimizer_info(n), option) for n in known & {*names}}
    assert found == dict.fromkeys(found, False)
    assert len(found) > 3
