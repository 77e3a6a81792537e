"""What a finished run of two tasks leaves in its folder."""

import json

from experiment import checkpoints


class Run:
    """A finished run."""

    def __init__(self, folder):
        self.folder = folder
        self.results = json.loads((folder / "results.json").read_text())
        self.model = checkpoints.load(checkpoints.task_path(folder, 2)).model

    @property
    def stats(self):
        """The lines of its log_stats.txt."""
        return [json.loads(line) for line in (self.folder / "log_stats.txt").open()]
