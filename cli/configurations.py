"""Configurations: YAML files of settings, those of configs/ and people's own.

A key of a configuration is a flag without its dashes and is read by the same rules. A full
configuration describes an experiment; an overlay changes a few settings of the one before it.
"""

import difflib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from cli.paths import ROOT, expanded, open_regular

CONFIG_DIR = ROOT / "configs"

#: Largest file of settings; and most aliases in it, each of which may double what is read.
_MOST_BYTES, _MOST_ALIASES = 200_000, 16

#: What the first line of an overlay begins with.
_OVERLAY = "Overlay: "


def names() -> list[str]:
    """Names of the configurations that ship with the program."""
    return sorted(path.stem for path in CONFIG_DIR.glob("*.yaml"))


def is_file_name(word: str) -> bool:
    """Whether a word is the path of a configuration of one's own."""
    return word.endswith((".yaml", ".yml"))


def exists(name: str) -> bool:
    """Whether there is a configuration of that name, or a file at that path."""
    return os.path.isfile(_path(name))


def load(name: str) -> dict[str, Any]:
    """The content of a configuration: of that name, or in that .yaml file.

    Raises:
        ValueError: If there is none, it is no YAML, or it sets a key twice.
    """
    path = expanded(_path(name))
    if not os.path.exists(path):
        near = difflib.get_close_matches(name.lower(), names(), n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        if is_file_name(name):
            raise ValueError(f"there is no file {path}: {hint}--list shows the configurations")
        raise ValueError(
            f"{name!r} is neither a configuration nor the value of a flag: {hint}"
            "--list shows the configurations; a file of your own must end in .yaml"
        )
    try:
        with open_regular(path) as file:
            text = file.read(_MOST_BYTES + 1).decode("utf-8")
        if len(text) > _MOST_BYTES:
            raise ValueError(f"it is larger than {_MOST_BYTES} bytes")
        loader = yaml.SafeLoader(text)
        tree = loader.get_single_node()  # a RecursionError where it is nested too deep
        if sum(isinstance(one, yaml.AliasEvent) for one in yaml.parse(text)) > _MOST_ALIASES:
            raise ValueError(f"it has more than {_MOST_ALIASES} aliases")
        twice = sorted(_set_twice(tree))
        content = (tree and loader.construct_document(tree)) or {}
        str(content)  # raises ValueError for a number that is too long to write
    except (yaml.YAMLError, ValueError, OSError, RecursionError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold `name: value` lines")
    if twice:
        raise ValueError(f"{path} sets {', '.join(twice)} twice: once is enough")
    return content


def problems_of_order(given: Sequence[str]) -> Iterator[str]:
    """Problems of configurations on one command line, merged left to right."""
    shipped = [(n, _first_line(n).startswith(_OVERLAY)) for n in given if n in names()]
    for (name, is_overlay), (behind, is_behind_overlay) in itertools.pairwise(shipped):
        if is_overlay and not is_behind_overlay:
            yield f"{name} is an overlay: put it behind {behind}, which would overwrite it"
    full = [name for name, is_overlay in shipped if not is_overlay]
    if len(full) > 1:
        yield (
            f"{' and '.join(full)} are full configurations, of which a run has one: leave all but "
            "one out (--list shows which ones are overlays)"
        )


def list_text() -> str:
    """Every configuration that ships with the program, overlays last, with a line about it."""
    text = {
        False: "Configurations (python main.py CONFIG):\n",
        True: "\nOverlays (python main.py CONFIG OVERLAY ...):\n",
    }
    width = max(map(len, names())) + 2
    for name in names():
        line = _first_line(name)
        text[line.startswith(_OVERLAY)] += f"  {name:{width}}{line.removeprefix(_OVERLAY)}\n"
    return "".join(text.values()).rstrip()


def to_yaml(settings: dict[str, Any]) -> str:
    """Settings as a configuration that gives the same values again."""
    return yaml.safe_dump(settings, sort_keys=True, default_flow_style=None)


def _path(name: str) -> str:
    return os.path.expanduser(name) if is_file_name(name) else f"{CONFIG_DIR / name}.yaml"


def _set_twice(node: yaml.Node | None) -> set[str]:
    """Keys that a YAML mapping, or one in it, has twice; its reader would take the last."""
    if not isinstance(node, yaml.MappingNode):
        return set()
    keys = [str(key.value).replace("-", "_") for key, _ in node.value]
    twice = {key for key in keys if keys.count(key) > 1}
    return twice.union(*(_set_twice(value) for _, value in node.value))


def _first_line(name: str) -> str:
    """What a configuration says of itself."""
    with (CONFIG_DIR / f"{name}.yaml").open(encoding="utf-8") as file:
        return file.readline().removeprefix("#").strip()
