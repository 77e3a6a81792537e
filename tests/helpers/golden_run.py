"""A run of the original, replayed through the real model and engine."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from timm.optim import create_optimizer_v2

import engine
from continual_datasets.stream import Task, TestSet
from helpers.engine_doubles import Loader
from helpers.tiny_model import make_pool, make_prompted
from reports import metrics
from reports.metrics import SELECTIONS
from training.state import EngineOptions, Run, TrainState

GOLDEN = Path(__file__).parents[1] / "golden"


@dataclass
class GoldenRun:
    """One golden file with the model, tasks and options that it describes, on a device."""

    name: str
    device: str = "cpu"

    def __post_init__(self):
        arrays = np.load(GOLDEN / f"{self.name}.npz")
        self.config = json.loads(str(arrays["config"]))
        self.arrays = {k: torch.from_numpy(arrays[k]) for k in arrays.files if k != "config"}
        self.model = self._model().to(self.device)
        classes = [tuple(ids) for ids in self.config["class_mask"]]
        sets = tuple(TestSet(i, f"task {i + 1}", None, ids) for i, ids in enumerate(classes))
        self.tasks = [Task(t.index, t.name, None, t.classes, sets[: t.index + 1]) for t in sets]
        self.options = self._options()
        self.matrices = {s: metrics.empty_matrix(2, 2) for s in SELECTIONS}

    def __getitem__(self, name):
        return self.arrays[name]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def train_loader(self, task, split="train"):
        images, targets = self[f"{split}_x"][task.index], self[f"{split}_y"][task.index].long()
        return Loader(images.to(self.device), targets.to(self.device), 8)

    def make_optimizer(self):
        c = self.config
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return create_optimizer_v2(parameters, opt=c["opt"], lr=c["lr_scaled"], momentum=0.9)

    def run(self):
        """What the loop needs beside the model and the tasks."""
        return Run(
            self.options,
            self.train_loader,
            lambda test_set: self.train_loader(test_set, "test"),
            self.make_optimizer,
            lambda optimizer: None,
            self.matrices,
        )

    def train(self):
        """The whole stream; returns the report of each task."""
        run, reports = self.run(), []
        run.monitor.at_task_end = reports.append
        engine.train_and_evaluate(self.model, self.tasks, TrainState(), run)
        return reports

    def _model(self):
        c = self.config
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        vit = VisionTransformer(num_classes=0, **{name: c[name] for name in names})
        vit.load_state_dict(self.under("backbone."))
        pool = None
        if c["prompt_pool"]:
            names = ("size", "length", "top_k", "prompt_key", "batchwise_prompt")
            settings = {name: c[name] for name in names}
            settings["diversify"] = "mask" if c["use_prompt_mask"] else "none"
            pool = make_pool(c["embed_dim"], vote_ties="topk", **settings)
        settings = {name: c[name] for name in ("embedding_key", "head_type", "global_pool")}
        model = make_prompted(vit, c["num_classes"], pool, freeze=tuple(c["freeze"]), **settings)
        model.load_trained_state(self.under("init."), self.name)
        return model

    def _options(self):
        c = self.config
        names = ("epochs", "train_mask", "task_inc", "clip_grad", "reinit_optimizer")
        return EngineOptions(
            device=torch.device(self.device),
            vote_group_size=c["batch_size"],
            all_classes=tuple(range(c["num_classes"])),
            pull_coeff=c["pull_constraint_coeff"] if c["pull_constraint"] else 0.0,
            shared_prompt_pool=c.get("shared_prompt_pool", False),
            shared_prompt_key=c.get("shared_prompt_key", False),
            print_freq=1000,
            **{name: c[name] for name in names},
        )
