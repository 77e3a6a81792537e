"""README.md and docs/ say what the program has: its flags, configurations, files, commands."""

import itertools
import re
import shlex

import pytest

import plots
import summarize
import sweep
from cli import configurations
from cli.flags import flags_of
from cli.parser import parse
from cli.paths import ROOT
from cli.settings import GROUPS, LEGACY_FLAGS, all_flags

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]

#: What stands in commands for a value of the reader's.
PLACEHOLDERS = {
    "N": "4", "GB": "4", "CONFIG": "digits_l2p", "output/config.yaml": "digits_l2p", "...": "",
    "$overlay": "joint", "$replay": "linear_probe replay_small",
}  # fmt: skip

FLAG = re.compile(r"(?<![\w-])--[a-z][\w-]*")

#: What takes the arguments of main.py, and its own flags with a value.
PROGRAMS = {
    "main.py": (),
    "train.sh": (),
    "benchmark.py": ("--repetitions", "--warm_up", "--json", "--only", "--synthetic"),
    "run_with_submitit.py": (
        "--shared_folder", "--cluster", "--nodes", "--gpus_per_node", "--tasks_per_node",
        "--cpus_per_task", "--timeout", "--max_requeues", "--partition", "--nodelist", "--comment",
        "--mem_gb", "--job_name",
    ),
}  # fmt: skip

#: Flags of launchers, of l2p-pytorch alone, of nobody.
OTHER_FLAGS = {
    "--use_env", "--nproc_per_node", "--master_port", "--standalone", "--nodes", "--gpus-per-node",
    "--ntasks-per-node", "--kill-on-bad-exit", "--use_volta32", "--wait", "--dr", "--job_dir",
    "--array", "--flag", "--no-flag", "--lerning-rate",
}  # fmt: skip


#: Commands with flags of their own alone, and what reads them.
OWN_COMMANDS = {"plots.py": plots._parse, "summarize.py": summarize._read}


def text_of(page):
    return page.read_text(encoding="utf-8")


def code_blocks(page):
    """Lines of the code blocks of a page, continued ones joined."""
    blocks = re.findall(r"^ *```bash\n(.*?)^ *```", text_of(page), re.DOTALL | re.MULTILINE)
    return "".join(blocks).replace("\\\n", " ").splitlines()


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", text)


def commands(page):
    """Commands of a page, each with the arguments of main.py in it."""
    lines = [*code_blocks(page), *inline_code(text_of(page))]
    return [(line, argv) for line in lines if (argv := arguments(line)) is not None]


def arguments(line):
    """What main.py gets from a line; None: it is no command, or has a form for its arguments."""
    program = re.search(rf"[ =](?:{'|'.join(map(re.escape, PROGRAMS))})(?= |$)", line)
    if program is None or "[CONFIG" in line or "--help" in line:
        return None
    own = PROGRAMS[program[0][1:]]
    words = shlex.split(line[program.end() :], comments=True)
    kept = [w for before, w in itertools.pairwise(["", *words]) if not {before, w} & set(own)]
    return [
        word
        for place in kept
        for word in (PLACEHOLDERS[place].split() if place in PLACEHOLDERS else [place])
    ]


def table(heading):
    """Cells of the rows of the tables under a heading of the README, their heads left out."""
    section = re.split(r"^#+ (.+)\n", text_of(ROOT / "README.md"), flags=re.MULTILINE)
    body = section[section.index(heading) + 1]
    lines = [line for line in body.splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    heads = {i for i, row in enumerate(rows) if set("".join(row)) == {"-"}}
    return [row for i, row in enumerate(rows) if i not in heads and i + 1 not in heads]


def groups():
    """Spelling of the flags that `--help` shows, by group."""
    old_names = {new: f"--{old}" for old, (new, _) in LEGACY_FLAGS.items()}
    return {
        (group.__doc__ or "").rstrip("."): [
            spelling
            for one in flags_of(group)
            if one.help
            for spelling in (one.spelling, old_names.get(one.name))
            if spelling
        ]
        for group in GROUPS.values()
    }


def slugs(page):
    """Anchors of the headings of a page, as GitHub makes them."""
    text = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]
    return plain


def links(page):
    text = re.sub(r"^ *```.*?^ *```", "", text_of(page), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


# Options


def test_option_table_has_each_flag_in_the_row_of_its_group():
    rows = {row[0]: inline_code(row[2]) for row in table("Options")}
    assert rows == groups()


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_flags_in_the_text_exist(page):
    names = [*(one.name for one in all_flags()), *LEGACY_FLAGS, "help"]
    known = {f"--{name}" for name in names} | {f"--{name.replace('_', '-')}" for name in names}
    known |= {f"--no-{flag[2:]}" for flag in known} | OTHER_FLAGS | set().union(*PROGRAMS.values())
    known |= {s for a in summarize._parser()._actions for s in a.option_strings}
    known |= {s for a in sweep._parser()._actions for s in a.option_strings}
    known |= {"--only", "--against", "--lines"}  # of plots.py, whose commands are read below
    said = {flag for code in inline_code(text_of(page)) for flag in FLAG.findall(code)}
    assert said - known == set()


# Configurations


def test_every_configuration_and_overlay_is_in_the_readme_and_no_other():
    named = [name for row in table("Configurations") for name in inline_code(row[0])]
    assert sorted(named) == configurations.names()


# Commands


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_are_typed_correctly(page):
    for line, argv in commands(page):
        _, problems = parse(argv)
        assert not problems, line


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_of_pictures_and_tables_are_typed_correctly(page):
    for line in code_blocks(page):
        for name, read in OWN_COMMANDS.items():
            if f"python {name} " in line:
                words = shlex.split(line.partition(name)[2], comments=True)
                assert read(words), line


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_commands_name_files_that_exist(page):
    for line in [*code_blocks(page), *inline_code(text_of(page))]:
        for name in re.findall(r"(?:^|\s)(?:bash|python) ([\w./-]+)", line):
            assert name.startswith("-") or (ROOT / name).is_file(), line


def test_commands_are_found():
    lines = [line for page in PAGES for line, _ in commands(page)]
    for start in ("bash train.sh", "python main.py", "torchrun", "sbatch", "srun", "python -m"):
        assert any(line.startswith(start) for line in lines), start


# Links and files


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_links_lead_somewhere(page):
    for link in links(page):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_headings_of_a_page_differ(page):
    assert len(set(slugs(page))) == len(slugs(page))


def test_every_page_is_linked_from_the_readme():
    linked = {link.partition("#")[0] for link in links(ROOT / "README.md")}
    assert {name for name in NAMES if name.startswith("docs/")} <= linked


def test_every_source_file_is_in_the_table_of_files_and_every_file_there_exists():
    named = [name for row in table("Where things are") for name in inline_code(row[0])]
    assert len(named) == len(set(named))
    assert {path.name for path in ROOT.glob("*.py")} <= set(named)
    assert [name for name in named if not (ROOT / name).exists()] == []
