"""A run of the original, replayed through the real model and engine."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer

import engine
from cli.settings import FLAGS, Settings
from continual_datasets.stream import Task, TestSet
from experiment import build
from helpers.engine_doubles import Loader, make_run, on
from training.state import TrainState

GOLDEN = Path(__file__).parents[1] / "golden"


class GoldenRun:
    """One golden file, and the run that it describes, on a device."""

    def __init__(self, name, device="cpu"):
        arrays = np.load(GOLDEN / f"{name}.npz")
        self.name, config = name, json.loads(str(arrays["config"]))
        self.arrays = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "config"}
        values = {name: value for name, value in config.items() if name in FLAGS}
        values["diversify"] = "mask" if config["use_prompt_mask"] else "none"
        self.settings = Settings().replace(**values, vote_ties="topk", print_freq=1000)
        shape = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        vit = VisionTransformer(num_classes=0, **{name: config[name] for name in shape})
        vit.load_state_dict(self.under("backbone."))
        self.model = build.build_model(self.settings, vit, config["num_classes"])
        self.model.load_trained_state(self.under("init."), name)
        self.model.to(device)
        classes = [tuple(ids) for ids in config["class_mask"]]
        sets = tuple(TestSet(i, f"task {i + 1}", None, ids) for i, ids in enumerate(classes))
        self.tasks = [Task(t.index, t.name, None, t.classes, sets[: t.index + 1]) for t in sets]
        optimizer = self.settings.optimizer, self.model, config["lr_scaled"]
        self.run = make_run(
            self.model,
            tasks=self.tasks,
            classes=tuple(range(config["num_classes"])),
            processes=on(device),
            train_loader=self.loader,
            test_loader=partial(self.loader, split="test"),
            make_optimizer=partial(build.make_optimizer, *optimizer),
        )
        self.run.settings = self.settings

    def __getitem__(self, name):
        return self.arrays[name]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def loader(self, task, split="train"):
        images, targets = self[f"{split}_x"][task.index], self[f"{split}_y"][task.index].long()
        return Loader(images.to(self.run.device), targets.to(self.run.device), 8)

    def train(self):
        """The whole stream; returns the results of each task."""
        self.run.monitor.at_task_end = self.run.reports.append
        engine.train_and_evaluate(self.run, self.tasks, TrainState())
        return self.run.reports
