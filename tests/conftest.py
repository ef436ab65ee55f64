"""Tests run on a GPU where there is one; elsewhere the same files run the real kernels in Triton's interpreter."""

import os

import pytest
import torch

# Tests compute what they quantize in whatever way is short: what fusing it would cost is no matter, but to tests of that.
os.environ["FUSION_PASS_ALWAYS"] = "1"

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton is imported


def pytest_configure():
    """Have Triton's interpreter patch its language once per launch for each module, not for each call of a device function.

    That takes half of the time that kernels take in it.
    """
    import triton

    if not triton.knobs.runtime.interpret:
        return
    from triton.runtime import interpreter

    patch, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = set()

    def launch(self, *args, **kwargs):
        patched.clear()
        return run(self, *args, **kwargs)

    def patch_once(fn):
        module = id(fn.__globals__)
        if module not in patched:
            patched.add(module)
            return patch(fn)
        return None

    interpreter._patch_lang, interpreter.GridExecutor.__call__ = patch_once, launch


@pytest.fixture(scope="session")
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    torch.manual_seed(0)
    with torch.no_grad():
        yield
