"""What all tests share: one thread, explicit attention, small models and data."""

import pytest
import torch
from timm.layers import set_fused_attn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def explicit_attention():
    """The original's arithmetic; fused attention differs in the last digits."""
    set_fused_attn(False)
    yield
    set_fused_attn(True)
