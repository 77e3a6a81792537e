"""Settings that have an effect only together with others, in one table.

Some are rejected without the others. The rest is reported at the start of a run, and runs that
differ in nothing else are runs of one configuration.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cli.parser import shown
from cli.settings import FLAGS, Settings, plain

#: Settings, what they need, and what to do where they are rejected without it. A need is a setting
#: that is on or given, has one of some values (`=`), or none of them (`!=`); `|`: or another.
_REJECTED = (
    ("diversify shared_prompt_pool shared_prompt_key", "prompt_pool", "leave it on"),
    ("shared_prompt_key", "prompt_key", "leave it on"),
    ("replay_batch", "buffer_size|buffer_per_class", "give one of them"),
    ("earlier_data", "continue_from|eval", "leave it out"),
    ("checkpoint", "eval", "give it too, to evaluate the checkpoint"),
    ("save_predictions tensorboard wandb seeds", "output_dir", "give the folder to write into"),
    ("lr_noise", "sched!=constant", "choose a schedule"),
    ("buffer_size buffer_per_class", "head!=ncm", "its means count each image once; leave it out"),
)

#: The same for settings that are not rejected. Of the optimizers, only common ones are listed.
_NEEDS = (
    (
        "size length top_k initializer prompt_key prompt_key_init batchwise_prompt vote_ties",
        "prompt_pool",
    ),
    ("embedding_key pull_constraint pull_constraint_coeff prompt_position", "prompt_pool"),
    ("vote_group_size", "prompt_pool|buffer_size|buffer_per_class"),
    ("vote_group_size", "batchwise_prompt|buffer_size|buffer_per_class"),
    ("prompt_key_init", "prompt_key"),
    ("pull_constraint_coeff", "pull_constraint"),
    ("warmup_lr", "warmup_epochs"),
    ("warmup_lr warmup_epochs", "sched!=constant"),
    ("min_lr", "sched=cosine,tanh,poly,plateau"),
    ("decay_rate", "sched=step,multistep,plateau,poly"),
    ("decay_epochs", "sched=step"),
    ("decay_milestones", "sched=multistep"),
    ("patience_epochs", "sched=plateau"),
    ("cooldown_epochs", ""),  # a task ends with its schedule
    ("lr_noise_pct lr_noise_std", "lr_noise"),
    ("momentum", "opt!=adam,adamw,nadam,nadamw,radam,adamax,adadelta,adagrad,adafactor,lamb,lion"),
    ("opt_eps", "opt!=sgd,sgdw,momentum,nesterov,lion"),
    ("remode recount", "reprob"),
    ("scale ratio crop_rule hflip train_interpolation train_resize train_jpeg", "augment"),
    ("color_jitter aa reprob remode recount", "augment"),
    ("head_init opt opt_eps opt_betas lr lr_scale sched lr_noise clip_grad", "head!=ncm"),
    ("momentum weight_decay reinit_optimizer smoothing train_mask", "head!=ncm"),
    ("steps_per_task", "gaussian_reading=paper"),
    ("shuffle", "class_order=none"),
    ("shuffle", "scenario!=domain-incremental,dataset-incremental"),
    ("reinit_optimizer eval_every", "joint=false"),
    ("reinit_optimizer eval_every", "scenario!=joint"),
    ("save_every", "output_dir"),
)


def problems(settings: Settings) -> Iterator[str]:
    """Settings that are rejected without others, a line each."""
    for names, need, advice in _REJECTED:
        for one in map(FLAGS.__getitem__, names.split()):
            if settings[one.name] != one.default and not _holds(need, settings):
                yield f"{one.spelling} needs {_text(need)}: {advice}"


def note(settings: Settings) -> str:
    """A line on given settings without effect, from flags or a file of one's own; or nothing."""
    said = [
        f"{FLAGS[name].spelling} {shown(settings[name])} (needs {_text(need)})"
        for name, need in _idle(settings).items()
        if name in settings.given.own
    ]
    return f"Without effect: {'; '.join(said)}" if said else ""


def effective(values: Mapping[str, Any]) -> dict[str, Any]:
    """Stored settings in which all that have no effect have their defaults."""
    idle = {name: plain(FLAGS[name].default) for name in _idle(values) if name in values}
    return {**values, **idle}


def _idle(values: Mapping[str, Any] | Settings) -> dict[str, str]:
    """The settings that have no effect, by name, and what they need."""
    unmet = [(names, need) for names, need in _NEEDS if not _holds(need, values)]
    return {name: need for names, need in unmet for name in names.split()}


def _holds(need: str, values: Mapping[str, Any] | Settings) -> bool:
    name, is_choice, choice = need.partition("=")
    if not is_choice:
        return bool(need) and any(values[name] for name in need.split("|"))
    is_one = shown(values[name.rstrip("!")]).lower().removeprefix("lookahead_") in choice.split(",")
    return is_one != name.endswith("!")


def _text(need: str) -> str:
    """A need as messages say it."""
    name, is_choice, choice = need.partition("=")
    if not need:
        return "epochs after the schedule, which no task has"
    if not is_choice:
        return " or ".join(FLAGS[name].spelling for name in need.split("|"))
    other = "other than " * name.endswith("!")
    return f"{FLAGS[name.rstrip('!')].spelling} {other}{choice.replace(',', ' or ')}"
