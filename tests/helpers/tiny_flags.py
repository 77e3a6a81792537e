"""Flags of runs on a tiny random ViT."""

#: Two tasks of two epochs; the test adds the data set.
TINY = [
    "--model", "vit_tiny_patch16_224", "--model-kwargs", "patch_size=8", "embed_dim=16", "depth=2",
    "num_heads=2", "--pretrained", "false", "--input-size", "16", "--num_tasks", "2",
    "--size", "4", "--length", "2", "--top_k", "2", "--batch-size", "4", "--epochs", "2",
    "--num_workers", "0", "--device", "cpu", "--lr", "0.5", "--no-plots",
]  # fmt: skip

#: Two tasks of the embedded digits, one epoch each.
TINY_DIGITS = [
    "--dataset", "digits", "--num_tasks", "2", "--classes_per_task", "2", "--epochs", "1",
    "--model", "vit_tiny_patch16_224", "--pretrained", "false", "--input-size", "32",
    "--model-kwargs", "patch_size=8", "embed_dim=16", "depth=2", "num_heads=2", "weight_init=jax",
    "--batch-size", "16", "--vote_group_size", "8", "--num_workers", "0", "--device", "cpu",
    "--lr", "0.05", "--lr_scale", "none", "--length", "2", "--top_k", "2", "--print_freq", "1000",
    "--no-plots",
]  # fmt: skip

#: One epoch on any data set; `--model-kwargs` with `TINY_VIT` completes it.
TINY_ANY = [
    "--model", "vit_tiny_patch16_224", "--pretrained", "false", "--input-size", "16",
    "--batch-size", "8", "--epochs", "1", "--num_workers", "0", "--device", "cpu", "--no-plots",
]  # fmt: skip

#: Keeps what a configuration says of `model_kwargs` beside these.
TINY_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "weight_init": "jax"}

#: What makes a head of sixteen features learn in a few steps, where no configuration says how.
SWIFT = ["--lr", "0.05", "--lr_scale", "none", "--length", "2", "--top_k", "2"]
