"""Megatron-Core asks for a CUDA device even on its CPU paths; the stand-in plays it here."""

import pytest
import torch

pytest.register_assert_rewrite("support")

if not torch.cuda.is_available():
    from step35_patch import cpu

    cpu.install()


@pytest.fixture(autouse=True)
def _one_seed():
    torch.manual_seed(1234)
