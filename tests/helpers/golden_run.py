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
from helpers.tiny_model import make_pool, make_prompted
from reports import metrics
from reports.metrics import SELECTIONS
from training.state import EngineOptions, Run, TrainState

GOLDEN = Path(__file__).parents[1] / "golden"


class Batches:
    """Batches in the fixed order of the file, as a training and as a test loader."""

    def __init__(self, images, targets, batch_size):
        self.batches = list(zip(images.split(batch_size), targets.split(batch_size), strict=True))
        self.batch_sampler = self

    def __iter__(self):
        return iter(self.batches)

    def __len__(self):
        return len(self.batches)

    def set_epoch(self, epoch, first_step=0):
        pass

    def global_batch_size(self, step):
        return len(self.batches[step][0])


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
        self.tasks = self._tasks()
        self.options = self._options()
        self.matrices = {s: metrics.empty_matrix(2, 2) for s in SELECTIONS}

    def __getitem__(self, name):
        return self.arrays[name]

    def under(self, prefix):
        return {k.removeprefix(prefix): v for k, v in self.arrays.items() if k.startswith(prefix)}

    def backbone(self):
        c = self.config
        names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads")
        vit = VisionTransformer(num_classes=0, **{name: c[name] for name in names})
        vit.load_state_dict(self.under("backbone."))
        return vit

    def train_loader(self, task):
        return self._batches("train", task.index)

    def test_loader(self, test_set):
        return self._batches("test", test_set.index)

    def _batches(self, split, index):
        images, targets = self[f"{split}_x"][index], self[f"{split}_y"][index].long()
        return Batches(images.to(self.device), targets.to(self.device), 8)

    def make_optimizer(self):
        c = self.config
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        return create_optimizer_v2(parameters, opt=c["opt"], lr=c["lr_scaled"], momentum=0.9)

    def run(self):
        """What the loop needs beside the model and the tasks."""
        return Run(
            self.options,
            self.train_loader,
            self.test_loader,
            self.make_optimizer,
            lambda optimizer: None,
            self.matrices,
        )

    def train(self, on_epoch=lambda stats: None, on_task_end=lambda report: None):
        train_one_epoch = engine.train_one_epoch
        run = self.run()
        run.monitor.at_task_end = on_task_end

        def watched(*args):
            stats = train_one_epoch(*args)
            on_epoch(stats)
            return stats

        engine.train_one_epoch = watched
        try:
            engine.train_and_evaluate(self.model, self.tasks, TrainState(), run)
        finally:
            engine.train_one_epoch = train_one_epoch

    def _model(self):
        c = self.config
        pool = None
        if c["prompt_pool"]:
            pool = make_pool(
                c["embed_dim"],
                size=c["size"],
                length=c["length"],
                top_k=c["top_k"],
                prompt_key=c["prompt_key"],
                batchwise_prompt=c["batchwise_prompt"],
                diversify="mask" if c["use_prompt_mask"] else "none",
                vote_ties="topk",
            )
        model = make_prompted(
            self.backbone(),
            c["num_classes"],
            pool,
            c["embedding_key"],
            head_type=c["head_type"],
            global_pool=c["global_pool"],
            freeze=tuple(c["freeze"]),
        )
        model.load_trained_state(self.under("init."), self.name)
        return model

    def _tasks(self):
        test_sets = [
            TestSet(i, f"task {i + 1}", None, tuple(classes))
            for i, classes in enumerate(self.config["class_mask"])
        ]
        return [
            Task(i, t.name, None, t.classes, tuple(test_sets[: i + 1]))
            for i, t in enumerate(test_sets)
        ]

    def _options(self):
        c = self.config
        return EngineOptions(
            device=torch.device(self.device),
            epochs=c["epochs"],
            vote_group_size=c["batch_size"],
            all_classes=tuple(range(c["num_classes"])),
            train_mask=c["train_mask"],
            task_inc=c["task_inc"],
            pull_coeff=c["pull_constraint_coeff"] if c["pull_constraint"] else 0.0,
            clip_grad=c["clip_grad"],
            reinit_optimizer=c["reinit_optimizer"],
            shared_prompt_pool=c.get("shared_prompt_pool", False),
            shared_prompt_key=c.get("shared_prompt_key", False),
            print_freq=1000,
        )
