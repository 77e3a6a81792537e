"""A run of the original, replayed through the real model and engine."""

import functools
import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import engine
from cli.settings import FLAGS, PrecisionSettings, Settings
from continual_datasets.stream import Task, TestSet
from experiment import build, network, precision
from helpers import reference_run
from helpers.engine_doubles import Loader, make_run, on
from training.state import TrainState

GOLDEN = Path(__file__).parents[1] / "golden"

#: Settings of runs of `reference_run`, beside those of the file `default`.
RECORDED = {
    "everything_trains": {"freeze": [], "opt": "sgd", "lr_scaled": 0.1, "weight_decay": 0.01},
    "norm_and_positions_train": {"freeze": ["blocks", "patch_embed", "cls_token"]},
    "no_prompts_blocks_train": {
        "prompt_pool": False, "head_type": "token", "freeze": ["patch_embed"], "opt": "sgd",
    },
    "no_pull_term": {"pull_constraint": False, "weight_decay": 0.1},
    "pull_term_of_weight_0": {"pull_constraint_coeff": 0.0, "weight_decay": 0.1},
}  # fmt: skip


@functools.cache
def read(name):
    """The arrays of a golden file, or of a run of the reference."""
    if name not in RECORDED:
        return dict(np.load(GOLDEN / f"{name}.npz"))
    return reference_run.record(read("default"), epochs=2, **RECORDED[name])


class GoldenRun:
    """One golden file, and the run that it describes, on a device."""

    def __init__(self, name, device="cpu", compiled=False):
        arrays = read(name)
        self.name, self.config = name, (config := json.loads(str(arrays["config"])))
        self.arrays = {k: torch.from_numpy(v) for k, v in arrays.items() if k != "config"}
        values = {name: value for name, value in config.items() if name in FLAGS}
        values["diversify"] = "mask" if config["use_prompt_mask"] else "none"
        values |= {"global_pool": "token", "vote_ties": "topk", "print_freq": 1000}
        self.settings = Settings().replace(**values)
        shape = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        vit = VisionTransformer(num_classes=0, **{name: config[name] for name in shape})
        vit.load_state_dict(self.under("backbone."))
        self.model = network.build_model(self.settings, vit, config["num_classes"])
        first = self.as_original(dict(self.model.public_parameters())) | self.under("init.")
        self.model.load_original_state(first, name)
        self.model.to(device)
        precision.apply(PrecisionSettings(compile=compiled), self.model, batch_sizes={8})
        classes = [tuple(ids) for ids in config["class_mask"]]
        sets = tuple(TestSet(i, f"task {i + 1}", None, ids) for i, ids in enumerate(classes))
        self.tasks = [Task(t.index, t.name, None, t.classes, sets[: t.index + 1]) for t in sets]
        optimizer = self.settings.optimizer, self.model, config["lr_scaled"]
        self.run = make_run(
            self.model,
            settings=self.settings,
            tasks=self.tasks,
            classes=tuple(range(config["num_classes"])),
            processes=on(device),
            train_loader=self.loader,
            test_loader=partial(self.loader, split="test"),
            make_optimizer=partial(build.make_optimizer, *optimizer),
        )

    def __getitem__(self, name):
        return self.arrays[name]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def as_original(self, tensors):
        """Tensors by public name, with all positions in one as the original has them."""
        rest = dict(tensors)
        if (prompts := rest.pop("pos_embed_prompt", None)) is not None:
            first, patches = rest["pos_embed"].tensor_split([1], dim=1)
            rest["pos_embed"] = torch.cat([first, prompts, patches], dim=1)
        return rest

    def loader(self, task, split="train"):
        images, targets = self[f"{split}_x"][task.index], self[f"{split}_y"][task.index].long()
        return Loader(images.to(self.run.device), targets.to(self.run.device), 8)

    def train(self):
        """The whole stream; returns the results of each task."""
        self.run.monitor.at_task_end = self.run.reports.append
        engine.train_and_evaluate(self.run, self.tasks, TrainState())
        return self.run.reports
