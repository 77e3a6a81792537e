"""The command line: spellings, what belongs to what, and everything that is wrong, in one go."""

import re

import pytest
import yaml

import main
from cli.parser import SYNONYMS, command_words, read_mapping, shown
from cli.settings import FLAGS, GROUPS, LEGACY_FLAGS, REMOVED_FLAGS, Settings, plain
from helpers.command_lines import problems_of, read, settings_of
from helpers.tables import assert_says


def spellings(name):
    return list(dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}"]))


def test_dashes_underscores_and_an_equals_sign_are_the_same():
    for name, one in FLAGS.items():
        words = ["0.2", "0.9"] if one.most_values == 2 else ["0.25" if one.accepts("0.25") else "7"]
        words = [one.choices[0]] if one.choices else ["false"] if one.is_switch else words
        words = {"model_kwargs": ["a=1"], "norm": ["half"]}.get(name, words)
        expected = one.read(words)
        assert expected != one.default or one.choices or one.is_switch
        for spelling in spellings(name):
            assert settings_of(spelling, *words)[name] == expected
            if len(words) == 1:
                assert settings_of(f"{spelling}={words[0]}")[name] == expected


def test_yes_no_flags_go_both_ways():
    switches = {name for name, one in FLAGS.items() if one.is_switch}
    assert len(switches) > 20
    for name in switches:
        for flag in spellings(name):
            for line in (flag, f"{flag} True", f"{flag}=yes"):
                assert settings_of(line)[name] is True, line
            for line in (f"{flag} 0", f"{flag}=no", f"--no-{flag[2:]}", f"--no_{flag[2:]}"):
                assert settings_of(line)[name] is False, line


def test_flags_win_over_configurations_and_later_ones_over_earlier(yaml_file):
    one = yaml_file("size: 7\nlength: 3\ntop_k: 1\n", "one")
    two = yaml_file("length: 4\ntop_k: 2\n", "two")
    settings = settings_of(one, "--top_k 6", two)
    prompts, given = settings.prompts, settings.given
    assert (prompts.size, prompts.top_k, prompts.length) == (7, 6, 4)
    assert (given.explicit, given.flags) == ({"size", "length", "top_k"}, {"top_k": 6})
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
"""


def test_flag_leaves_the_configuration_behind_it_alone():
    for line, wanted in (line.split("->") for line in BELONGS.strip().splitlines()):
        settings = settings_of(line, "digits_l2p")
        ((name, value),) = yaml.safe_load(wanted).items()
        assert plain(settings[name]) == value, line
        assert settings.given.configurations == ("digits_l2p",)
        assert settings.data.dataset == "digits"


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


def test_two_names_of_a_setting_must_agree(yaml_file):
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
    path = yaml_file("diversify: none\nuse-prompt-mask: true\n")
    assert problems_of(path) == [f"{path}: --diversify none and --use-prompt-mask true {same}"]
    assert problems_of(yaml_file("diversify: mask\nuse-prompt-mask: true\n")) == []
    assert settings_of(yaml_file("dr: 0.3\n"), "--decay-rate 0.4").optimizer.decay_rate == 0.4


#: Settings, and what people write for them; by letters, or by meaning.
MEANT = yaml.safe_load("""
{lr: lerning-rate, data-path: data_dir, size: sizes, input-size: imagesize, amp: fp16,
 prompt_pool: prompt_pol, shuffle: no-shufle, use_prompt_mask: use_prompt_maks, device: gpu}
""")


def test_unknown_flag_gets_the_nearest_by_meaning():
    """Its values are not mistaken for configurations; what is one stays one."""
    names = [(f, name) for name in MEANT for one in MEANT[name].split() for f in spellings(one)]
    for name, line in yaml.safe_load(SYNONYMS.read_text()).items():
        assert line == line.lower().replace("-", "_")
        names += [(f"--{word}", FLAGS[name].spelling[2:]) for word in line.split()]
    settings, problems = read(*(f"{flag} 0 1" for flag, _ in names), "digits_l2p")
    assert problems == [f"{flag} is no option: did you mean --{name}?" for flag, name in names]
    assert settings.given.configurations == ("digits_l2p",)


def test_flag_that_was_removed_says_why():
    """It may stand in a configuration that an older version wrote, without a value."""
    for name, reason in REMOVED_FLAGS.items():
        problem = f"--{name} is no option: {reason}"
        assert problems_of(f"--{name} 2") == [problem]
        assert read_mapping({name: "", "size": 3}) == ({"size": 3}, [])
        assert read_mapping({name: "x"})[1] == [problem]


#: Flags, and what is wrong with each; in front of a configuration.
WRONG = {
    **{f"{name}=1": f"{name} is no option: see main.py --help"
       for name in ("--bogus", "--no-idea", "-x", "-h2", "-hx")},
    "--gpu=3": "--gpu is no option: did you mean --device?",
    "--gpu 0": "--gpu is no option: did you mean --device?",
    "-h=1": "-h=1: takes no value", "--help=yes": "--help=yes: takes no value",
    "--no-lr": "--no-lr is no option", "--no-shuffle=true": "--no-shuffle is no option",
    "--no-dr": "--no-dr is no option", "--num_tasks": "--num_tasks: needs a value",
    "--opt-betas": "--opt-betas: needs a value", "--top-k=": "--top_k : '' is not a whole number",
    "--size x": "--size x: 'x' is not a whole number", "--eval tru": "--eval tru: is not true",
    "--input_size 224 224": "--input-size 224 224: takes one value",
    "--length 2 nonsense": "--length 2 nonsense: takes one value",
    "--unscale_lr 2": "--unscale_lr 2: is not true or false",
    "--use-prompt-mask x": "--use_prompt_mask x: is not true or false",
    "--dr x": "--dr x: 'x' is not a number",
    "--lr-noise-pct -.5": "--lr-noise-pct -.5: must be at least 0.01 and",  # no flag
}  # fmt: skip


def test_everything_wrong_is_reported_in_one_go(yaml_file, capsys):
    """What could not be read is left at its default, or what the first word says."""
    for flag, problem in WRONG.items():
        settings, problems = read(flag, "digits_l2p")
        assert_says(problems, [problem])
        assert settings.given.configurations == ("digits_l2p",)
    path = yaml_file("sizes: 3\nlength: x\n")
    words = ("--=3", "--", "-", "-1", "digit_l2p")
    settings, problems = read(*words, *WRONG, "digits_l2p", "cifar100_l2p", path)
    found = [f"{w!r} is neither a configuration nor the value of a flag" for w in words]
    found += ["digits_l2p and cifar100_l2p are full", f"{path}: --sizes is", f"{path}: --length x"]
    assert_says(sorted(problems), sorted([*found, *WRONG.values()]))
    defaults = Settings()
    assert (settings.prompts.size, settings.prompts.length) == (defaults.prompts.size, 2)
    assert capsys.readouterr().out == ""


def test_wrong_values_name_their_flags_all_at_once():
    line = (
        "--seed -1 --seeds -1 --save_every 0 --print_freq 0 --num_workers -1 --eval_batch_size 0 "
        "--data_on_device maybe --num_tasks 0 --eval_every 0 --steps_per_task 0 --gaussian_sigma 0 "
        "--gaussian_reading loose --buffer_size 0 --buffer_per_class 0 --replay_batch 0 --size 0 "
        "--prompt_position first --length 0 --top_k 0 --vote_group_size 0 --batch-size 0 --amp fp8 "
        "--clip-grad 0 --sched foo --epochs 0 --input-size 0 --scale .5 .1 --ratio 0 1 --hflip 1.5 "
        "--train-interpolation cubic --color-jitter -1.0 --reprob -0.1 --remode noise --recount 0 "
        "--norm cifar --train_resize 0 --train_jpeg 101 --test_interpolation nearest "
        "--decay-epochs 0 --warmup-lr 1e300 --lr-noise-pct 0"
    )
    wanted = [f"--{flag.strip()}" for flag in line.split("--")[1:]]
    assert [re.split(": | is ", problem)[0] for problem in problems_of(line)] == wanted


def test_mapping_is_read_as_the_command_line():
    values, problems = read_mapping({
        "lr": 0.5, "use-prompt-mask": True, "scale": (0.5, 1), "top_k": "x", "learning_rate": 1,
        "seeds": None, 3: 4, "train_mask": False, "opt_eps": "1e-5", "freeze": [],
        "model_kwargs": {"depth": 3, "qkv_bias": False}, "pretrained": "w.npz",
        "classes_per_task": 10,
    })  # fmt: skip
    assert values == {
        "lr": 0.5, "diversify": "mask", "scale": (0.5, 1.0), "seeds": None, "train_mask": False,
        "opt_eps": 1e-5, "freeze": (), "model_kwargs": {"depth": 3, "qkv_bias": False},
        "pretrained": "w.npz", "classes_per_task": (10,),
    }  # fmt: skip
    assert problems == [
        "--learning_rate is no option: did you mean --lr?",
        "--3 is no option: see main.py --help",
        "--top_k x: 'x' is not a whole number",
    ]


def test_values_and_commands_are_shown_as_on_the_command_line():
    values = [None, "", (), {}, True, 0.5, (1, 2), ["a"], {"a": 1, "b": "x"}]
    texts = ["none"] * 4 + ["true", "0.5", "1 2", "a", "a=1 b=x"]
    assert [shown(value) for value in values] == texts
    command = {
        "configurations": ["digits_l2p", "/far/away/own/try.yaml"],
        "flags": {"lr": 0.5, "freeze": ["a", "b"], "seed": 3, "device": "cpu", "plots": False},
    }
    assert command_words(command) == "digits_l2p own/try.yaml --lr 0.5 --freeze a b"


def test_help_shows_every_setting_and_ends(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for flag in ("-h", "--help"):
        with pytest.raises(SystemExit) as ended:
            main.main(["digits_l2p", "--top_k", "99", flag])
        assert ended.value.code == 0
        text, error = capsys.readouterr()
        assert (error, list(tmp_path.iterdir())) == ("", [])
    found = re.findall(r"^  (--[\w-]+) ", text, re.MULTILINE)
    documented = [one for one in FLAGS.values() if one.help]
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
