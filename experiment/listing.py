"""`--list` and `--list_models`: the configurations and the backbones that can be chosen."""

from collections import defaultdict

from cli import configurations, terminal
from cli.parser import UsageError, shown
from cli.settings import RunSettings


def show(run: RunSettings) -> int:
    """Prints what is asked for; returns the exit code: 2 where no model matches."""
    if run.list_models is None:
        text = configurations.list_text()
    elif not (text := models_text(run.list_models)):
        given = shown(run.list_models)
        problem = f"--list_models {given} matches no model: give patterns such as '*dinov3*'"
        return UsageError([problem]).report("main.py")
    print(text)
    return terminal.exit_code(0)


def models_text(patterns: tuple[str, ...]) -> str:
    """The models of timm that `--model` takes, a line each, with the tags of timm's weights.

    `patterns` as `timm.list_models` takes them, such as `vit_*`; none: all models.
    """
    import timm

    from model.families import model_names

    tags = defaultdict[str, list[str]](list)
    for tagged in timm.list_models(pretrained=True):
        name, _, tag = tagged.partition(".")
        tags[name].append(tag)
    names = model_names(patterns)
    width = max(map(len, names), default=0) + 2
    lines = (f"{name:{width}}{' '.join(tags[name]) or '(no weights)'}" for name in names)
    return "\n".join(lines)
