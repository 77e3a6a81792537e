"""The table, the picture, the speed figures, and what happens to an earlier run."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from timm.layers import set_fused_attn

import backbone
import engine
import plots
import results
import speed
from prompt import Prompt
from vision_transformer import PromptedVisionTransformer

NAN = float("nan")


def record():
    matrices = {
        "batch": np.array([[90.0, 70.0], [NAN, 80.0]]),
        "instance": np.array([[88.0, 60.5], [NAN, 77.0]]),
    }
    stats = {s: {"Acc@1": 1.0, "Acc@5": 2.0, "Loss": 3.0} for s in engine.SELECTIONS}
    reports = [
        engine.TaskReport(t, {"Lr": 0.1}, [engine.Evaluation(0, stats)], 1.0, 2.0) for t in (0, 1)
    ]
    config = {"seed": 1, "epochs": 5}
    return results.RunRecord(config, {"name": "vit"}, [[0], [1]], ["a", "b"], matrices, reports)


def test_table_shows_both_matrices_and_all_metrics():
    lines = record().table().splitlines()
    rows = [line.split() for line in lines]
    assert ["test", "set", "1", "90.00", "70.00"] in rows
    assert ["test", "set", "2", "-", "80.00"] in rows
    assert ["test", "set", "1", "88.00", "60.50"] in rows
    assert ["average", "accuracy", "75.00", "68.75"] in rows
    assert ["forgetting", "20.00", "27.50"] in rows
    assert ["backward", "transfer", "-20.00", "-27.50"] in rows
    assert ["learning", "accuracy", "85.00", "82.50"] in rows
    assert ["average", "incremental", "accuracy", "82.50", "78.38"] in rows


def test_earlier_run_is_set_aside_whole(tmp_path):
    assert results.set_aside(tmp_path) is None
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "a.pth").write_text("a")
    (tmp_path / "results.json").write_text("b")
    (tmp_path / "eval_results_task1_checkpoint.json").write_text("c")
    (tmp_path / "notes.txt").write_text("the user's own")
    folder = results.set_aside(tmp_path)
    assert (folder / "checkpoint" / "a.pth").read_text() == "a"
    assert (folder / "results.json").read_text() == "b"
    assert (folder / "eval_results_task1_checkpoint.json").read_text() == "c"
    assert {p.name for p in tmp_path.iterdir()} == {"previous", "notes.txt"}


def test_picture_shows_the_numbers_of_the_results(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (drawn.append(self), save(self, *a, **k))[1]
    )
    plots.draw_results(record().as_dict(), tmp_path / "results.png")
    left, right = drawn[0].axes
    shown = np.ma.filled(left.images[0].get_array(), NAN)
    np.testing.assert_array_equal(shown, record().matrices["instance"])
    assert sorted(text.get_text() for text in left.texts) == ["60.5", "77.0", "88.0"]
    curves = {line.get_label(): line.get_ydata() for line in right.lines}
    np.testing.assert_allclose(curves["batch-wise (as published)"], [90, 75])
    np.testing.assert_allclose(curves["instance-wise"], [88, 68.75])
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("fused", [True, False])
def test_gmacs_of_vit_base_are_the_known_ones(fused):
    set_fused_attn(fused)
    vit = backbone.build_backbone("vit_base_patch16_224")
    set_fused_attn(True)
    model = PromptedVisionTransformer(vit, 100, Prompt(size=10, length=5, top_k=5, embed_dim=768))
    gmacs = speed.count_gmacs(model, torch.zeros(1, 3, 224, 224))
    assert gmacs["query"] == pytest.approx(17.57, abs=0.02)
    assert gmacs["prompted"] == pytest.approx(19.88, abs=0.02)
    assert gmacs["total"] == gmacs["query"] + gmacs["prompted"]


def test_gmacs_without_a_pool_have_no_query_pass():
    vit = backbone.build_backbone("vit_tiny_patch16_224", input_size=32)
    model = PromptedVisionTransformer(vit, 10, head_type="token")
    gmacs = speed.count_gmacs(model, torch.zeros(1, 3, 32, 32))
    assert gmacs["query"] == 0
    assert gmacs["total"] == gmacs["prompted"] > 0
