"""The model of a run, built from its settings: a timm ViT, the prompt pool, the head.

Alone in its module, so that a program which only predicts imports nothing that trains.
"""

import dataclasses

from cli.settings import Settings
from model import backbone
from model.families import Backbone
from prompt import find_selection_rule
from vision_transformer import PromptedVisionTransformer


def build_model(settings: Settings, vit: Backbone, num_classes: int) -> PromptedVisionTransformer:
    """Puts the prompt pool and the head around a backbone.

    Raises:
        ValueError: If head, pool and frozen names contradict.
    """
    pool, model = None, settings.model
    if settings.prompts.prompt_pool:
        rule = find_selection_rule(settings.prompts.diversify)
        pool = rule(settings.prompts, vit.embed_dim)
        if settings.prompts.prompt_key and not settings.prompts.pull_constraint:
            # Nothing else gives the keys a gradient.
            model = dataclasses.replace(model, freeze=(*model.freeze, "prompt.prompt_key"))
    key = settings.prompts.embedding_key
    return PromptedVisionTransformer(vit, num_classes, pool, model, key)


def outline(settings: Settings, num_classes: int = 2) -> PromptedVisionTransformer:
    """The model that the settings describe, without memory for its weights."""
    with backbone.without_memory():
        vit = backbone.build_backbone(settings.model, settings.transforms.input_size)
        return build_model(settings, vit, num_classes)
