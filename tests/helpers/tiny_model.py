"""A tiny prompted model in which every weight counts, and images that it classifies differently."""

import copy

import torch
from timm.models.vision_transformer import VisionTransformer

from cli.settings import ModelSettings, PromptSettings
from prompt import find_selection_rule
from vision_transformer import PromptedVisionTransformer

#: Classes, width, pool size and prompts selected.
C, D, M, K = 6, 8, 6, 2


def randomize(module):
    """Makes every parameter count: norms and biases start as ones and zeros."""
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return module


def make_pool(embed_dim, **settings):
    """A prompt pool with the selection rule that its settings name."""
    prompts = PromptSettings(**settings)
    return find_selection_rule(prompts.diversify)(prompts, embed_dim)


def make_prompted(vit, num_classes, prompt, embedding_key="cls", **settings):
    """A prompted model with these model settings."""
    model = ModelSettings(**settings)
    return PromptedVisionTransformer(vit, num_classes, prompt, model, embedding_key)


def pictures(size, generator=None, side=8):
    """Images of different colours, so that their queries differ."""
    colour = torch.rand(size, 3, 1, 1, generator=generator)
    return 4 * colour * torch.rand(size, 3, side, side, generator=generator)


def keys_that_divide(queries):
    """A key for each query, for the way in which it differs, so that images select differently."""
    middle = queries.mean(dim=0)
    apart = queries - middle
    return apart - torch.outer(apart @ middle, middle) / middle.square().sum()


def make_model(pool=None, vit=None, seed=0, **changes):
    """A tiny prompted model in which every weight counts; `pool` None: no pool."""
    torch.manual_seed(seed)
    settings = {"img_size": 8, "patch_size": 4, "embed_dim": D, "depth": 2, "num_heads": 2}
    backbone = VisionTransformer(num_classes=0, **settings, **(vit or {}))
    prompt = None
    if pool is not None:
        prompt = make_pool(D, **{"size": M, "length": 2, "top_k": K, **pool})
    model = make_prompted(backbone, C, prompt, **{"head_type": "gap", **changes})
    for parameter in (*backbone.parameters(), model.head.weight, model.head.bias):
        torch.nn.init.normal_(parameter, std=0.5)
    if prompt is not None:
        model.pos_embed_prompt.data.copy_(backbone.pos_embed.data[:, :1])
        if prompt.prompt_key is not None:
            prompt.prompt_key.data.copy_(keys_that_divide(model.query(pictures(M))))
    return model


def snapshot(module):
    """A copy of all tensors of a module, by name."""
    return copy.deepcopy(module.state_dict())


def differing(found, wanted):
    """Names of the tensors that are not equal to the last bit, or in one of the two alone."""
    found, wanted = (x.state_dict() if hasattr(x, "state_dict") else x for x in (found, wanted))
    names = found.keys() | wanted.keys()
    both = found.keys() & wanted.keys()
    return {
        name for name in names if name not in both or not torch.equal(found[name], wanted[name])
    }


def close_by_name(found, wanted, **tolerance):
    """Asserts that tensors of the same names are equal within a tolerance."""
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(
            found[name], value, **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
