"""The report of `benchmark.py` as a table of text, 100 columns wide."""

from collections.abc import Iterator
from typing import Any

_COMPARED = f"{'':31s}{'ours':>9s}  {'(lowest - highest)':21s}{'two copies':>11s}" + (
    f"  {'':17s}{'ratio':>7s}"
)

#: Settings of speed and memory that the table names if they are on.
_EXTRAS = ("tf32", "compile", "grad_checkpointing", "data_on_device")


def table(report: dict[str, Any]) -> str:
    """The report as text; all its numbers are in the report."""
    blocks = [_head(report)]
    if "stages" in report:
        blocks += [_products(report["stages"]), _stages(report)]
    if lines := [*_times(report), *_sizes(report)]:
        blocks.append("\n".join([_COMPARED, *lines]))
    if "evaluation" in report:
        blocks.append(_overruled(report["evaluation"]))
    return "\n\n".join(blocks)


def _head(report: dict[str, Any]) -> str:
    w, m, versions = report["workload"], report["machine"], report["versions"]
    extras = "".join(f", {name}" for name in _EXTRAS if w[name])
    processor = f"{m['cpu']}, {m['cores']} cores, {m['threads']} threads"
    libraries = ", ".join(f"{name} {versions[name]}" for name in ("torch", "torchvision", "timm"))
    return "\n".join(
        [
            f"{w['model']} (weights: {w['weights']}), {w['input_size']} pixels, "
            f"{w['dtype']}{extras}",
            f"{w['data']}, {w['tasks']} tasks, epochs: {w['epochs']}; {w['batch_size']} images a "
            f"step, vote group of {w['vote_group_size']}, {w['workers']} workers",
            f"{m['gpu']}; {processor}" if m["gpu"] else processor,
            f"{libraries}; {report['date']}",
            f"medians of {report['repetitions']} turns, after {report['warm_up']} to warm up",
        ]
    )


def _products(stages: dict[str, Any]) -> str:
    lines = [f"{'Matrix products':40s}{'GFLOP/s':>12s}"]
    for name, product in stages["products"].items():
        label = " x ".join(map(str, product["shape"])) + f" ({name})"
        rate = product["flop_per_second"]
        best = "  best" if rate == stages["best"] else ""
        lines.append(f"  {label:38s}{rate / 1e9:12.1f}{best}")
    return "\n".join(lines)


def _stages(report: dict[str, Any]) -> str:
    levels = report.get("memory", {}).get("step", {}).get("ours", {})
    title = "Training step"
    lines = [
        f"{title:20s}{'ms':>10s}{'GFLOP':>10s}{'GFLOP/s':>12s}{'of the best':>13s}{'peak MiB':>13s}"
    ]
    for name, stage in report["stages"]["of_step"].items():
        line = f"  {name:18s}{1e3 * stage['median']:10.2f}"
        if "flop" in stage:
            line += f"{stage['flop'] / 1e9:10.3g}{stage['flop_per_second'] / 1e9:12.1f}"
            line += f"{100 * stage['of_best']:11.1f} %"
        else:
            line += " " * 35
        line += f"{levels[name]:13.0f}" if name in levels else ""
        lines.append(line.rstrip())
    return "\n".join(lines)


def _times(report: dict[str, Any]) -> Iterator[str]:
    if "step" in report:
        yield _compared("training step, ms", report["step"], "ours", 1e3)
    if "evaluation" in report:
        for way in ("first", "later"):
            yield _compared(f"{way} evaluation, ms an image", report["evaluation"], way, 1e3)
    if "run" in report:
        yield _compared("whole run, s", report["run"], "ours", 1)


def _compared(label: str, times: dict[str, Any], way: str, factor: float) -> str:
    ours, baseline = (_spread(times[name], factor) for name in (way, "baseline"))
    return (
        f"{label:31s}{ours[0]:>9s}  {ours[1]:21s}{baseline[0]:>11s}  {baseline[1]:17s}"
        f"{times[way]['ratio']:7.2f}"
    )


def _spread(seconds: dict[str, Any], factor: float) -> tuple[str, str]:
    middle, low, high = (factor * seconds[name] for name in ("median", "lowest", "highest"))
    return f"{middle:.2f}", f"({low:.2f} - {high:.2f})"


def _sizes(report: dict[str, Any]) -> Iterator[str]:
    for work, levels in report.get("memory", {}).items():
        before = f"({levels['ours']['before']:.0f} before)", f"({levels['baseline']['before']:.0f})"
        highest = levels["ours"]["highest"], levels["baseline"]["highest"]
        yield _sized(f"peak memory, {work}, MiB", highest, levels["ratio"], before)
    for name, label in (("workload", "this model"), ("vit_base", "ViT-B/16")):
        if "checkpoints" in report:
            sizes = report["checkpoints"][name]
            both = sizes["ours"] / 2**20, sizes["baseline"] / 2**20
            yield _sized(f"checkpoint, {label}, MiB", both, sizes["ratio"], ("", ""))


def _sized(label: str, sizes: tuple[float, float], ratio: float, notes: tuple[str, str]) -> str:
    ours, baseline = (f"{size:.2f}" if size < 10 else f"{size:.0f}" for size in sizes)
    return f"{label:31s}{ours:>9s}  {notes[0]:21s}{baseline:>11s}  {notes[1]:17s}{ratio:7.2f}"


def _overruled(evaluation: dict[str, Any]) -> str:
    share = 100 * evaluation["share_overruled"]
    later = evaluation["later"]
    return (
        f"Ours evaluates batch-wise and instance-wise: the vote overruled {share:.1f} % of the "
        f"{evaluation['images']} test images,\nwhich a later evaluation computes twice: "
        f"{later['flop'] / 1e9:.3g} GFLOP an image, {later['flop_per_second'] / 1e9:.1f} GFLOP/s.\n"
        "If it overruled all of them, a later evaluation would take about as long as the first."
    )
