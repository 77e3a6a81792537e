"""The command line: spellings, what belongs to what, and everything that is wrong, in one go."""

import re

import pytest
import yaml

import main
from cli.parser import SYNONYMS, UsageError, command_words, read_mapping, shown
from cli.settings import GROUPS, LEGACY_FLAGS, REMOVED_FLAGS, Settings, all_flags, find_flag, plain
from helpers.command_lines import problems_of, read, settings_of

SWITCHES = [one.name for one in all_flags() if one.is_switch]


def spellings(name):
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


@pytest.fixture
def write(tmp_path):
    """Writes a configuration; gives its path."""

    def to_file(text, name="own"):
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return path

    return to_file


def test_dashes_underscores_and_an_equals_sign_are_the_same():
    for one in (one for one in all_flags() if not one.is_switch):
        words = ["0.2", "0.9"] if one.most_values == 2 else ["0.25" if one.kind is float else "7"]
        words = [one.choices[0]] if one.choices else words
        words = ["a=1"] if one.name == "model_kwargs" else words
        expected = one.read(words)
        assert expected != one.default or one.choices
        for spelling in spellings(one.name):
            assert settings_of(spelling, *words)[one.name] == expected
            if len(words) == 1:
                assert settings_of(f"{spelling}={words[0]}")[one.name] == expected


def test_yes_no_flags_are_known_and_go_both_ways():
    legacy = {name for name, (_, values) in LEGACY_FLAGS.items() if values is not None}
    assert {*SWITCHES, *legacy} == set(
        "pin_mem shuffle train_mask task_inc prompt_pool prompt_key use_prompt_mask "
        "shared_prompt_pool shared_prompt_key batchwise_prompt pull_constraint reinit_optimizer "
        "unscale_lr eval speed_test speed_test_only joint drop_last list tf32 compile "
        "grad_checkpointing dry_run plots tensorboard wandb".split()
    )
    for name, flag in ((one, flag) for one in SWITCHES for flag in spellings(one)):
        for line in (flag, f"{flag} True", f"{flag}=yes"):
            assert settings_of(line)[name] is True, line
        for line in (f"{flag} 0", f"{flag}=no", f"--no-{flag[2:]}", f"--no_{flag[2:]}"):
            assert settings_of(line)[name] is False, line
    for flag in ("--no-lr", "--no-shuffle=true", "--no-dr"):
        (problem,) = problems_of(flag)
        assert "is no option" in problem


def test_flags_win_over_configurations_and_later_ones_over_earlier(write):
    one = write("size: 7\nlength: 3\ntop_k: 1\n", "one")
    two = write("length: 4\ntop_k: 2\n", "two")
    settings = settings_of(one, "--top_k 6", two)
    prompts, given = settings.prompts, settings.given
    assert (prompts.size, prompts.top_k, prompts.length) == (7, 6, 4)
    assert given.explicit == {"size", "length", "top_k"}
    assert given.flags == {"top_k": 6}
    assert given.configurations == (str(one), str(two))
    assert settings_of("--top_k 6 --top-k 3").prompts.top_k == 3


#: Flags in front of a configuration; what one of them sets.
BELONGS = """
--eval -> eval: true
--eval true -> eval: true
--no-shuffle -> shuffle: false
--seeds 1 2 -> seeds: [1, 2]
--seeds none -> seeds: null
--scale .5 1 -> scale: [0.5, 1.0]
--clip-grad none -> clip_grad: null
--output_dir joint -> output_dir: joint
--data-path=x -> data_path: x
--model-kwargs depth=1 config=cifar100_l2p -> model_kwargs: {depth: 1, config: cifar100_l2p}
--freeze none -> freeze: []
--freeze joint --seed 1 -> freeze: [joint]
--lr 1e-3 -> lr: 0.001
--lr-noise-pct -.5 -> lr_noise_pct: -0.5
"""


def test_flag_leaves_the_configuration_behind_it_alone():
    for line, wanted in (line.split("->") for line in BELONGS.strip().splitlines()):
        settings = settings_of(line, "digits_l2p")
        ((name, value),) = yaml.safe_load(wanted).items()
        assert plain(settings[name]) == value, line
        assert settings.given.configurations == ("digits_l2p",)
        assert settings.data.dataset == "digits"
    (problem,) = problems_of("--seeds 1 2 digit_l2p")
    assert "'digit_l2p' is neither" in problem
    assert "did you mean digits_l2p?" in problem


#: Settings that `none` can take back, with a value.
TAKEN_BACK = yaml.safe_load("""
{buffer_per_class: 3, num_tasks: 3, class_order: x.txt, resume: auto, aa: original,
 model_kwargs: {depth: 3}, freeze: [a, b], opt_betas: [0.5, 0.9], lr_noise: [0.4], domains: [s1]}
""")


@pytest.mark.parametrize("name", TAKEN_BACK)
def test_setting_can_be_taken_back(name, write):
    none = {"model_kwargs": {}, "freeze": ()}.get(name)
    path = write(yaml.safe_dump({name: TAKEN_BACK[name]}))
    assert plain(settings_of(path)[name]) == TAKEN_BACK[name]
    for spelling in spellings(name):
        for line in (f"{spelling} none", f"{spelling} None", f"{spelling}=none"):
            assert settings_of(path, line)[name] == none
        for word in ("none", "null", "None", "[none]"):
            later = write(f"{spelling[2:]}: {word}\n", "later")
            assert settings_of(path, later)[name] == none


def test_name_of_the_original_stands_for_a_setting():
    for line, (name, value) in {
        "--use_prompt_mask": ("diversify", "mask"),
        "--use-prompt-mask true": ("diversify", "mask"),
        "--use_prompt_mask=false": ("diversify", "none"),
        "--no-use_prompt_mask": ("diversify", "none"),
        "--unscale-lr": ("lr_scale", "per-device"),
        "--no-unscale_lr": ("lr_scale", "global"),
        "--dr=0.3": ("decay_rate", 0.3),
    }.items():
        settings = settings_of(line)
        assert settings[name] == settings.given.flags[name] == value


def test_two_names_of_a_setting_must_agree(write):
    """On a command line and in a file; the command line wins over a file."""
    same = "are two names of one setting: give one"
    for both in (
        "--dr 0.3 and --decay-rate 0.4", "--decay-rate 0.4 and --dr 0.3",
        "--lr_scale global and --unscale_lr true", "--diversify mask and --use_prompt_mask false",
        "--use_prompt_mask false and --diversify frequency",
    ):  # fmt: skip
        assert problems_of(both.replace(" and", "")) == [f"{both} {same}"]
    for line in (
        "--dr 0.3 --decay-rate 0.3", "--unscale_lr --lr_scale per-device",
        "--lr_scale global --no-unscale_lr", "--diversify none --use_prompt_mask false",
    ):  # fmt: skip
        assert problems_of(line) == []
    path = write("diversify: none\nuse-prompt-mask: true\n")
    assert problems_of(path) == [f"{path}: --diversify none and --use-prompt-mask true {same}"]
    assert problems_of(write("diversify: mask\nuse-prompt-mask: true\n")) == []
    assert settings_of(write("dr: 0.3\n"), "--decay-rate 0.4").optimizer.decay_rate == 0.4


#: Settings, and what people write for them; by meaning, or by letters.
MEANT = yaml.safe_load("""
{lr: learning_rate base_lr lerning-rate, device: gpu gpus cuda, data-path: data_dir data_root root,
 size: pool_size num_prompts sizes, length: prompt_length prompt_len, batch-size: bs,
 input-size: img_size imagesize, model: backbone arch, weight-decay: wd, opt: optimizer,
 epochs: num_epochs, sched: scheduler, clip-grad: grad_clip, num_workers: workers, eval: evaluate,
 output_dir: out_dir, buffer_size: memory_size, smoothing: label_smoothing, drop: dropout,
 classes_per_task: increment, train_mask: class_mask, prompt_pool: prompt_pol, shuffle: no-shufle,
 use_prompt_mask: use_prompt_maks, top_k: topk, amp: fp16}
""")


def test_unknown_flag_gets_the_nearest_by_meaning():
    """Its values are not mistaken for configurations; what is one stays one."""
    names = [(f, name) for name in MEANT for one in MEANT[name].split() for f in spellings(one)]
    for name, line in yaml.safe_load(SYNONYMS.read_text()).items():
        assert line == line.lower().replace("-", "_")
        names += [(f"--{word}", find_flag(name).spelling[2:]) for word in line.split()]
    settings, problems = read(*(f"{flag} 0 1" for flag, _ in names), "digits_l2p")
    assert problems == [f"{flag} is no option: did you mean --{name}?" for flag, name in names]
    assert settings.given.configurations == ("digits_l2p",)
    assert problems_of("--gpu=3 digits_l2p") == ["--gpu is no option: did you mean --device?"]


@pytest.mark.parametrize("name", REMOVED_FLAGS)
def test_flag_that_was_removed_says_why(name):
    """It may stand in a configuration that an older version wrote, without a value."""
    problem = f"--{name} is no option: {REMOVED_FLAGS[name]}"
    assert problems_of(f"--{name} 2") == [problem]
    assert read_mapping({name: "", "size": 3}) == ({"size": 3}, [])
    assert read_mapping({name: "x"})[1] == [problem]


def test_odd_words_and_flags_like_no_other_are_rejected(capsys):
    for flag in ("--bogus", "--no-idea", "-x", "-h2", "-hx", "-h2=1"):
        name = flag.partition("=")[0]
        assert problems_of("digits_l2p", flag) == [f"{name} is no option: see main.py --help"]
    for word in ("--=3", "--", "-", "-1", "nonsense"):
        (problem,) = problems_of("digits_l2p", word)
        assert problem.startswith(f"{word!r} is neither a configuration nor the value of a flag")
    for word in ("-h=1", "--help=yes"):
        assert problems_of("digits_l2p", word) == [f"{word}: takes no value"]
    assert capsys.readouterr().out == ""


def test_wrong_values_name_their_flags_all_at_once():
    line = (
        "--seed -1 --seeds -1 --save_every 0 --print_freq 0 --num_workers -1 --eval_batch_size 0 "
        "--data_on_device maybe --num_tasks 0 --eval_every 0 --steps_per_task 0 --gaussian_sigma 0 "
        "--gaussian_reading loose --buffer_size 0 --buffer_per_class 0 --replay_batch 0 --size 0 "
        "--prompt_position first --length 0 --top_k 0 --vote_group_size 0 --batch-size 0 --amp fp8 "
        "--clip-grad 0 --sched foo --epochs 0 --input-size 0 --scale .5 .1 --ratio 0 1 --hflip 1.5 "
        "--train-interpolation cubic --color-jitter -1.0 --reprob -0.1 --remode noise --recount 0 "
        "--norm cifar --train_resize 0 --train_jpeg 101 --test_interpolation nearest"
    )
    wanted = [f"--{flag.strip()}" for flag in line.split("--")[1:]]
    assert [re.split(": | is ", problem)[0] for problem in problems_of(line)] == wanted


def test_words_that_are_no_value_name_their_flag():
    """Every kind of value is in test_flags.py."""
    for line, problem in {
        "--num_tasks --eval": "--num_tasks: needs a value",
        "--num_tasks digits_l2p": "--num_tasks: needs a value",
        "--opt-betas": "--opt-betas: needs a value",
        "--top-k=": "--top_k : '' is not a whole number",
        "--batch_size 0": "--batch-size 0: must be at least 1",
        "--input_size 224 224": "--input-size 224 224: takes one value",
        "--eval tru digits_l2p": "--eval tru: is not true or false",
        "--unscale_lr 2": "--unscale_lr 2: is not true or false",
        "--use-prompt-mask x": "--use-prompt-mask x: is not true or false",
        "--dr x": "--decay-rate x: 'x' is not a number",
        "--amp fp8": "--amp fp8 is unknown: choose one of none, bf16, fp16",
    }.items():
        assert problems_of(line) == [problem]


def test_all_problems_are_reported_in_one_go(write):
    path = write("sizes: 3\nlength: x\n")
    settings, problems = read(
        "--size x --bogus --lr fast --top_k 2 --length 2 nonsense --gpu 0 --shuffle maybe --dr 1 "
        "--decay-rate 2 digits_l2p cifar100_l2p", path, "digit_l2p",
    )  # fmt: skip
    wanted = sorted([
        "--bogus is", "--gpu is", "--size x", "--lr fast", "--length 2 nonsense: takes one value",
        "--shuffle maybe", "--dr 1 and --decay-rate 2 are two", "digits_l2p and cifar100_l2p are",
        f"{path}: --sizes is", f"{path}: --length x", "'digit_l2p' is neither a configuration",
    ])  # fmt: skip
    assert len(problems) == len(wanted), problems
    for problem, beginning in zip(sorted(problems), wanted, strict=True):
        assert problem.startswith(beginning)
    defaults = Settings()
    for name in ("size", "lr", "shuffle"):
        assert settings[name] == defaults[name]
    assert (settings.prompts.top_k, settings.prompts.length) == (2, 2)
    error = UsageError(iter(["--a is wrong", "--b too"]))
    assert error.problems == ["--a is wrong", "--b too"]
    assert error.message("main.py") == (
        "main.py: this command line cannot run:\n  - --a is wrong\n  - --b too\n"
    )


def test_mapping_is_read_as_the_command_line():
    values, problems = read_mapping({
        "lr": 0.5, "use-prompt-mask": True, "scale": (0.5, 1), "top_k": "x", "learning_rate": 1,
        "seeds": None, 3: 4, "train_mask": False, "opt_eps": "1e-5", "freeze": [],
        "model_kwargs": {"depth": 3, "qkv_bias": False}, "pretrained": "w.npz",
    })  # fmt: skip
    assert values == {
        "lr": 0.5, "diversify": "mask", "scale": (0.5, 1.0), "seeds": None, "train_mask": False,
        "opt_eps": 1e-5, "freeze": (), "model_kwargs": {"depth": 3, "qkv_bias": False},
        "pretrained": "w.npz",
    }  # fmt: skip
    assert problems == [
        "--learning_rate is no option: did you mean --lr?",
        "--3 is no option: see main.py --help",
        "--top_k x: 'x' is not a whole number",
    ]


def test_values_are_shown_as_on_the_command_line():
    values = [None, "", (), {}, True, 0.5, (1, 2), ["a"], {"a": 1, "b": "x"}]
    texts = ["none"] * 4 + ["true", "0.5", "1 2", "a", "a=1 b=x"]
    assert [shown(value) for value in values] == texts


def test_command_words_are_what_tells_configurations_apart():
    command = {
        "configurations": ["digits_l2p", "/far/away/own/try.yaml"],
        "flags": {"lr": 0.5, "freeze": ["a", "b"], "seed": 3, "device": "cpu", "plots": False},
    }
    assert command_words(command) == "digits_l2p own/try.yaml --lr 0.5 --freeze a b"


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_shows_every_setting_and_ends(flag, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        main.main(["digits_l2p", "--top_k", "99", flag])
    assert ended.value.code == 0
    text, error = capsys.readouterr()
    assert (error, list(tmp_path.iterdir())) == ("", [])
    found = re.findall(r"^  (--[\w-]+) ", text, re.MULTILINE)
    documented = [one for one in all_flags() if one.help]
    assert [f for f in found if f[2:] not in LEGACY_FLAGS] == [one.spelling for one in documented]
    assert {f[2:] for f in found} >= LEGACY_FLAGS.keys()
    letters = "".join(text.split())
    for one in documented:
        metavar = "" if one.is_switch else one.name.upper()
        for part in (one.spelling + metavar, one.help, *one.choices):
            assert "".join(part.split()) in letters
    for group in GROUPS.values():
        assert f"\n{group.__doc__.rstrip('.')}:\n" in text
    assert "--local" not in text
    assert "digits_l2p" in text
