"""Exported programs, and packages compiled ahead of time that run in processes without our code."""

import os
import subprocess
import sys

import pytest
import torch

import fusion_pass
from fusion_pass import inductor
from fusion_pass.testing import compare

import spelled

WIDTH = 64

# Runs a package on given inputs in a process that does not import fusion_pass, unless it is told to.
LOADER = """
import sys
import torch

package, data, *modules = sys.argv[1:]
for module in modules:
    __import__(module)
given, expected = torch.load(data)
loaded = torch._inductor.aoti_load_package(package)
for x, results in zip(given, expected):
    for actual, wanted in zip(loaded(x), results, strict=True):
        assert torch.equal(actual.contiguous().view(torch.uint8), wanted.contiguous().view(torch.uint8)), x.shape
assert modules or "fusion_pass" not in sys.modules
"""


class Norm(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x):
        return spelled.per_token(spelled.rms_norm(x, self.weight))


@pytest.fixture
def module(device):
    return Norm().to(device)


def exported(module, device):
    x = spelled.exact_rows(5, WIDTH, device=device)
    return torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2)},))


def test_an_exported_program_fuses_when_compiled(module, device, backend, fused):
    program = exported(module, device).module()
    compiled = torch.compile(program, backend=backend)
    x = spelled.exact_rows(7, WIDTH, device=device)
    assert compare(compiled(x), module(x)).equal
    assert fused() == {"rms_norm_per_token": 1}


def packaged(module, device, folder):
    """A package compiled with the pass, and a file of inputs and eager's results."""
    with fusion_pass.enabled((device,), strict=True):
        package = torch._inductor.aoti_compile_and_package(
            exported(module, device), package_path=str(folder / "model.pt2")
        )
    given = [spelled.exact_rows(rows, WIDTH, device=device) for rows in (2, 5, 33)]
    torch.save((given, [tuple(module(x)) for x in given]), folder / "data.pt")
    return package


def load(package, folder, *modules):
    command = [sys.executable, "-c", LOADER, package, str(folder / "data.pt"), *modules]
    # Not from the root of the repository, whose folders are named like the package.
    return subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True, check=False)


def crashes_unfused(module, folder):
    """Whether a process that loads a package compiled without the pass dies of a signal."""
    path = str(folder / "unfused.pt2")
    return (
        load(torch._inductor.aoti_compile_and_package(exported(module, "cuda"), package_path=path), folder).returncode
        < 0
    )


def test_a_package_runs_without_our_code(module, device, fused, tmp_path):
    """On a GPU the kernels are in the package. A CPU graph keeps the op as a call, which the process must import."""
    package = packaged(module, device, tmp_path)
    assert fused() == {"rms_norm_per_token": 1}
    alone = load(package, tmp_path)
    if device == "cuda":
        if alone.returncode < 0 and crashes_unfused(module, tmp_path):
            pytest.skip("this installation of torch crashes when it loads a package, fused or not")
        assert alone.returncode == 0, alone.stderr
        return
    assert "Could not find schema for fusion_pass::rms_norm_quant" in alone.stderr
    importing = load(package, tmp_path, "fusion_pass.ops")
    assert importing.returncode == 0, importing.stderr


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the C++ wrapper launches kernels on a GPU only")
def test_the_cpp_wrapper_launches_the_kernels(module, fused):
    x = spelled.exact_rows(7, WIDTH, device="cuda")
    with torch._inductor.config.patch(cpp_wrapper=True), fusion_pass.enabled(strict=True):
        compiled = torch.compile(module)
        for _ in range(2):
            assert compare(compiled(x), module(x)).equal
    assert fused() == {"rms_norm_per_token": 1}


class Halving(torch.nn.Module):
    """Writes to one of its buffers, which is no constant, then."""

    def __init__(self):
        super().__init__()
        self.register_buffer("largest", torch.tensor(448.0))
        self.register_buffer("step", torch.tensor(0.5))

    def forward(self, x):
        scale = x.abs().amax(-1, keepdim=True) / self.largest
        self.largest.mul_(self.step)
        return scale


def test_a_buffer_that_is_written_is_no_number():
    graph = torch.export.export(Halving(), (torch.randn(4, WIDTH),)).run_decompositions().module().graph
    stored = {node.target: inductor.stored_number(node) for node in graph.find_nodes(op="get_attr")}
    assert stored == {"largest": None, "step": 0.5}
