"""Tests run on a GPU where there is one; elsewhere the same files run the real kernels in Triton's interpreter."""

import os

import pytest
import torch

# Tests compute what they quantize in whatever way is short: what fusing it would cost is no matter, but to tests of that.
os.environ["FUSION_PASS_ALWAYS"] = "1"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
