"""Graphs compiled by other threads than the one that registered."""

import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch._inductor import config

import fusion_pass
from fusion_pass import inductor
from fusion_pass.testing import compare

import layers
import spelled


@pytest.fixture(autouse=True)
def _unregistered():
    yield
    fusion_pass.unregister()
    assert in_a_thread(getattr, config, inductor.POST_GRAD) is None


def in_a_thread(fn, *args):
    """fn(*args), run by a thread that sees only the defaults of what other threads have assigned."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(torch.no_grad()(fn), *args).result()


def operands(device, width=layers.WIDTH):
    return spelled.exact_rows(5, width, device=device), torch.randn(width, device=device).to(torch.bfloat16)


def norm(x, w):
    return spelled.per_token(spelled.rms_norm(x, w))


def test_a_worker_thread_compiles(device, fused):
    fusion_pass.register((device,))
    tensors = operands(device)
    assert compare(in_a_thread(torch.compile(norm), *tensors), norm(*tensors)).equal
    assert fused() == {"rms_norm_per_token": 1}


def test_unregistering_reaches_every_thread():
    threads = [lambda: getattr(config, inductor.POST_GRAD), lambda: in_a_thread(getattr, config, inductor.POST_GRAD)]
    fusion_pass.register()
    assert all(passes() is not None for passes in threads)
    fusion_pass.unregister()
    assert all(passes() is None for passes in threads)


@pytest.mark.parametrize("registered", [True, False], ids=["registered", "backend"])
def test_a_backward_graph_is_compiled_by_another_thread(registered, device, fused):
    """As autograd's threads do for GPUs, when the graph first runs, outside of what surrounded the forward pass."""
    if registered:
        fusion_pass.register((device,))
    weight = torch.randn(8, layers.WIDTH, device=device).to(torch.bfloat16)
    with torch.enable_grad():
        x = operands(device)[0].requires_grad_()
        compiled = torch.compile(layers.QuantizedMatmul.apply, backend="inductor" if registered else "fusion_pass")
        y = compiled(x, weight)
        assert fused() == {"quant_per_token": 1}
        thread = threading.Thread(target=y.float().sum().backward)
        thread.start()
        thread.join()
    assert fused() == {"quant_per_token": 2}


def test_scopes_of_two_threads_overlap(device, fused):
    """The first to begin ends first, and the other still holds; the config is restored when both have ended."""
    tensors = operands(device)
    with ThreadPoolExecutor(1) as other:
        with fusion_pass.enabled((device,)):
            scope = fusion_pass.enabled((device,), strict=True)
            other.submit(scope.__enter__).result()
        assert getattr(config, inductor.POST_GRAD).strict
        assert compare(torch.compile(norm)(*tensors), norm(*tensors)).equal
        other.submit(scope.__exit__, None, None, None).result()
    assert fused() == {"rms_norm_per_token": 1}
    assert in_a_thread(getattr, config, inductor.POST_GRAD) is None


PROCESS = """
import fusion_pass
from torch._inductor.async_compile import AsyncCompile

fusion_pass.register()
asked = "__import__('torch._inductor.config')._inductor.config.static_launch_user_defined_triton_kernels"
print("static:", AsyncCompile.process_pool().submit(eval, asked).result())
"""


def test_processes_that_compile_choose_the_fast_launcher():
    """They decide how a kernel is launched, and do not see the configuration of the process that registered."""
    environment = {**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "2"}
    environment.pop(inductor._STATIC_LAUNCH_VARIABLE, None)
    ran = subprocess.run([sys.executable, "-c", PROCESS], env=environment, capture_output=True, text=True, check=False)
    assert "static: True" in ran.stdout, ran.stderr
