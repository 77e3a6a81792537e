"""README.md and docs/ say what the program has: its flags, configurations, files, commands."""

import itertools
import re
import shlex

import pytest

import plots
import predict
import summarize
from benchmark import BenchmarkOptions
from benchmarks.gpu_check import CheckOptions
from cli import configurations
from cli.flags import flags_of
from cli.options import take, take_all
from cli.parser import parse
from cli.paths import ROOT
from cli.settings import FLAGS, GROUPS, LEGACY_FLAGS, REMOVED_FLAGS
from launch.sweep_plan import SweepOptions
from run_with_submitit import SubmitOptions

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]

#: What stands in commands for a value of the reader's.
PLACEHOLDERS = {
    "N": ["4"], "GB": ["4"], "CONFIG": ["digits_l2p"], "output/config.yaml": ["digits_l2p"],
    "...": [], "$overlay": ["joint"], "$replay": ["linear_probe", "replay_small"],
}  # fmt: skip

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

#: What takes the arguments of main.py, and the flags of its own that it takes out of them.
PROGRAMS = {
    "main.py": None, "train.sh": None, "benchmark.py": BenchmarkOptions,
    "run_with_submitit.py": SubmitOptions,
}  # fmt: skip

#: Flags of launchers, of l2p-pytorch alone, of nobody.
OTHER_FLAGS = set(
    "--use_env --nproc_per_node --master_port --standalone --gpus-per-node --ntasks-per-node "
    "--kill-on-bad-exit --job_dir --array --flag --no-flag --lerning-rate --shm-size".split()
)

#: Commands with flags of their own alone, and their options.
OWN_COMMANDS = {
    "plots.py": plots.PlotOptions, "summarize.py": summarize.TableOptions,
    "predict.py": predict.PredictOptions, "benchmarks/gpu_check.py": CheckOptions,
}  # fmt: skip

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def code_blocks(page):
    """Lines of the code blocks of a page, continued ones joined."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", page.read_text(), re.DOTALL | re.MULTILINE)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def prose(page):
    """A page without its code blocks."""
    return re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", text)


def code(page):
    return [*code_blocks(page), *inline_code(page.read_text())]


def commands(page):
    """Commands of a page, each with the arguments of main.py in it."""
    return [(line, argv) for line in code(page) if (argv := arguments(line)) is not None]


def arguments(line):
    """What main.py gets from a line; None: it is no command, or has a form for its arguments."""
    program = re.search(rf"[ =](?:{'|'.join(map(re.escape, PROGRAMS))})(?= |$)", line)
    if program is None or "[CONFIG" in line or "--help" in line:
        return None
    words = shlex.split(line[program.end() :], comments=True)
    filled = [value for word in words for value in PLACEHOLDERS.get(word, [word])]
    kind = PROGRAMS[program[0][1:]]
    return take(kind, filled)[1] if kind else filled


def table(heading):
    """Cells of the rows of the tables under a heading of the README, their heads left out."""
    section = re.split(r"^#+ (.+)\n", README.read_text(), flags=re.MULTILINE)
    lines = [x for x in section[section.index(heading) + 1].splitlines() if x.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {i for i, row in enumerate(rows) if set("".join(row)) == {"-"}}
    return [row for i, row in enumerate(rows) if i not in heads and i + 1 not in heads]


def slugs(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links(page):
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def test_option_table_has_each_flag_in_the_row_of_its_group():
    old_names = {new: [f"--{old}"] for old, (new, _) in LEGACY_FLAGS.items()}
    wanted = {}
    for group in GROUPS.values():
        shown = [one for one in flags_of(group) if one.help]
        spelled = [[one.spelling, *old_names.get(one.name, [])] for one in shown]
        wanted[group.__doc__.rstrip(".")] = [*itertools.chain(*spelled)]
    assert {row[0]: inline_code(row[2]) for row in table("Options")} == wanted


@every_page
def test_flags_in_the_text_exist(page):
    names = [*(one.name for one in FLAGS.values()), *LEGACY_FLAGS, *REMOVED_FLAGS, "help"]
    known = {f"--{name}" for name in names} | {f"--{name.replace('_', '-')}" for name in names}
    known |= {f"--no-{flag[2:]}" for flag in known} | OTHER_FLAGS
    kinds = (SubmitOptions, SweepOptions, BenchmarkOptions, *OWN_COMMANDS.values())
    known |= {f"--{one.name}" for kind in kinds for one in flags_of(kind)}
    said = {flag for text in inline_code(page.read_text()) for flag in FLAG.findall(text)}
    assert said - known == set()


def test_every_configuration_and_overlay_is_in_the_readme_and_no_other():
    named = [name for row in table("Configurations") for name in inline_code(row[0])]
    assert sorted(named) == configurations.names()


@every_page
def test_commands_are_typed_correctly(page):
    for line, argv in commands(page):
        _, problems = parse(argv)
        assert not problems, line
    for line in code_blocks(page):
        for name, kind in OWN_COMMANDS.items():
            if f"python {name} " in line:
                words = shlex.split(line.partition(name)[2], comments=True)
                assert take_all(kind, words, once=("label",))[2] == [], line
    for line in code(page):
        for name in re.findall(r"(?:^|\s)(?:bash|python) ([\w./-]+)", line):
            assert name.startswith("-") or (ROOT / name).is_file(), line


def test_commands_are_found():
    lines = [line for page in PAGES for line, _ in commands(page)]
    for start in ("bash train.sh", "python main.py", "torchrun", "sbatch", "srun", "python -m"):
        assert any(line.startswith(start) for line in lines), start


@every_page
def test_links_lead_somewhere(page):
    assert len(set(slugs(page))) == len(slugs(page))
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def test_readme_links_every_page_and_lists_every_source_file_that_exists():
    linked = {link.partition("#")[0] for link in links(README)}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= linked
    named = [name for row in table("Where things are") for name in inline_code(row[0])]
    assert len(named) == len(set(named))
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
