"""Inductor's caches across processes: what was compiled is found again, and only by the same options and sources."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fusion_pass

ROOT = Path(__file__).parents[2]
SCRIPT = """
import json, sys
import torch
from torch._dynamo.utils import counters
import fusion_pass, spelled
from fusion_pass.testing import compare

device, strict = sys.argv[1], sys.argv[2] == "strict"
fusion_pass.register((device,), strict)
torch.manual_seed(0)
x, w = spelled.exact_rows(5, 64, device=device), torch.randn(64, device=device).to(torch.bfloat16)

def norm(x, w):
    return spelled.per_token(spelled.rms_norm(x, w))

with torch.no_grad():
    equal = compare(torch.compile(norm)(x, w), norm(x, w)).equal
MORE
print(json.dumps({
    "equal": equal,
    "fused": counters["fusion_pass"]["fused"],
    "graph cache hits": counters["inductor"]["fxgraph_cache_hit"],
    "autograd cache hits": counters["aot_autograd"]["autograd_cache_hit"],
}))
"""

# A module whose eps is an attribute, which dynamic=True makes an input, with two values of it.
ATTRIBUTE = """
class Norm(torch.nn.Module):
    def forward(self, x):
        return spelled.per_token(spelled.rms_norm(x, self.weight, self.eps))

module = Norm()
module.weight = torch.nn.Parameter(w)
compiled = torch.compile(module, dynamic=True)
with torch.no_grad():
    for module.eps in (1e-6, 1e2):
        equal = equal and compare(compiled(x), module(x)).equal
"""


@pytest.fixture
def sources(tmp_path):
    """The package as it is installed, in a folder where its sources can be changed."""
    package = tmp_path / "installed" / "fusion_pass"
    shutil.copytree(Path(fusion_pass.__file__).parent, package)
    for folder in ("patterns", "kernels"):
        shutil.copytree(
            Path(__import__(f"fusion_pass.{folder}", fromlist="_").__file__).parent,
            package / folder,
            dirs_exist_ok=True,
        )
    return package


def run(sources, device, *, strict=False, autograd_cache=True, more=""):
    """What a fresh process that compiles a site, and more, counts."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(sources.parent), str(ROOT / "tests")]),
        "TORCHINDUCTOR_CACHE_DIR": str(sources.parents[1] / "cache"),
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "0",
        "TORCHINDUCTOR_AUTOGRAD_CACHE": str(int(autograd_cache)),
    }
    arguments = [device, "strict" if strict else "lenient"]
    command = [sys.executable, "-c", SCRIPT.replace("MORE", more), *arguments]
    # Not from the root of the repository, whose folders are named like the package.
    done = subprocess.run(command, cwd=sources.parent, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    counted = json.loads(done.stdout.splitlines()[-1])
    assert counted.pop("equal")
    return counted


def test_caches_across_processes(sources, device):
    first = run(sources, device)
    assert first == {"fused": 1, "graph cache hits": 0, "autograd cache hits": 0}
    # A warm start runs neither the pass nor Inductor.
    warm = run(sources, device)
    assert (warm["fused"], warm["autograd cache hits"]) == (0, 1)
    assert run(sources, device, autograd_cache=False) == {"fused": 0, "graph cache hits": 1, "autograd cache hits": 0}
    assert run(sources, device, strict=True) == first
    with (sources / "kernels" / "arithmetic.py").open("a") as source:
        source.write("# another version\n")
    assert run(sources, device) == first


def test_a_float_that_becomes_a_constant_is_part_of_the_key(sources, device):
    """Graphs in which it still is an input are never stored, so that Dynamo's guards compare it in warm starts too."""
    first = run(sources, device, more=ATTRIBUTE)
    assert first == {"fused": 3, "graph cache hits": 0, "autograd cache hits": 0}
    warm = run(sources, device, more=ATTRIBUTE)
    assert (warm["fused"], warm["autograd cache hits"]) == (0, 3)
