"""What command lines come to: their settings, or everything that is wrong with them."""

from cli.parser import UsageError, parse
from experiment.validate import validate

#: Behind a command line: a model that is built in no time, where only the rest matters.
SHALLOW = "--model-kwargs depth=1 weight_init=skip"


def read(*argv):
    """Settings and problems of a command line; text is split into words, a path is one."""
    return parse([w for a in argv for w in (a.split() if isinstance(a, str) else [str(a)])])


def settings_of(*argv):
    settings, problems = read(*argv)
    assert problems == []
    return settings


def problems_of(*argv):
    """What is wrong with a command line by itself."""
    return read(*argv)[1]


def rejections(*argv, elsewhere=False):
    """Everything that is wrong with a run."""
    try:
        validate(*read(*argv), elsewhere=elsewhere)
    except UsageError as error:
        return error.problems
    return []
