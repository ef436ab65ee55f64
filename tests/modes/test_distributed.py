"""Two processes: sites between collectives fuse on every rank, and the results are one process's.

With two GPUs the ranks use NCCL and Inductor, else gloo and the eager executor.
"""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812
from torch import nn
from torch._dynamo.utils import counters

import fusion_pass.backends  # noqa: F401
from fusion_pass.testing import compare

import layers
import spelled

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this build of torch has no torch.distributed")

RANKS = 2
WIDTH = 64
GROUP = 32


def selecting(inputs, outputs):
    """A linear layer, each output of which is one of the inputs: its sums are exact, however ranks divide them."""
    layer = nn.Linear(inputs, outputs, bias=False, dtype=torch.bfloat16)
    layer.weight.data.copy_(F.one_hot(torch.randint(inputs, (outputs,)), inputs))
    return layer


def round_trip(x):
    codes, scale = spelled.per_group(x, GROUP)
    return (codes.float().unflatten(-1, (-1, GROUP)) * scale.unsqueeze(-1)).flatten(-2).to(x.dtype)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.randn(WIDTH, dtype=torch.bfloat16))
        self.gate, self.up = selecting(WIDTH, 2 * WIDTH), selecting(WIDTH, 2 * WIDTH)
        self.down = selecting(2 * WIDTH, WIDTH)

    def forward(self, x):
        h = round_trip(spelled.rms_norm(x, self.norm))
        return x + self.down(round_trip(spelled.silu_mul(self.gate(h), self.up(h))))


def tensor_parallel(device, backend, mesh):
    """One graph with an all-reduce after each block, around which sites must not reach."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    model = nn.Sequential(Block(), Block()).to(device)
    x = spelled.exact_rows(6, WIDTH, device=device)
    with torch.no_grad():
        expected = model(x)
        for block in model:
            plan = {"gate": ColwiseParallel(), "up": ColwiseParallel(), "down": RowwiseParallel()}
            parallelize_module(block, mesh, plan)
        result = compare(torch.compile(model, backend=backend, fullgraph=True)(x), expected)
    assert result.equal, result
    return {"rms_norm_per_group_32": 1, "add_rms_norm_per_group_32": 1, "silu_mul_per_group_32": 2}


def fully_sharded(device, backend, mesh):
    """Layers compiled one by one, their parameters gathered and their gradients scattered between the graphs."""
    from torch.distributed.fsdp import fully_shard

    model, alone = layers.model(2, device=device), layers.model(2, device=device)
    alone.load_state_dict(model.state_dict())
    for layer in model:
        fully_shard(layer, mesh=mesh)
        layer.compile(backend=backend, fullgraph=True)
    fully_shard(model, mesh=mesh)
    x = spelled.exact_rows(6, layers.WIDTH, device=device)
    outputs = [model(x), alone(x)]
    for output in outputs:
        output.float().sum().backward()
    sharded = [parameter.grad.full_tensor() for parameter in model.parameters()]
    whole = [parameter.grad for parameter in alone.parameters()]
    layers.assert_same([outputs[0].detach(), *sharded], [outputs[1].detach(), *whole])
    return {"rms_norm_per_token": 1, "silu_mul_per_token": 1, "quant_per_token": 2}


def rank(index, rendezvous):
    torch.set_num_threads(1)
    on_gpus = torch.cuda.device_count() >= RANKS
    device, backend = ("cuda", "fusion_pass") if on_gpus else ("cpu", "fusion_pass_eager")
    if on_gpus:
        torch.cuda.set_device(index)
    dist.init_process_group("nccl" if on_gpus else "gloo", init_method=rendezvous, rank=index, world_size=RANKS)
    mesh = dist.device_mesh.init_device_mesh(device, (RANKS,))
    try:
        for parallel in (tensor_parallel, fully_sharded):
            torch._dynamo.reset()
            counters.clear()
            torch.manual_seed(0)
            with torch._inductor.config.patch(force_disable_caches=True):
                expected = parallel(device, backend, mesh)
            fused = counters["fusion_pass"]
            # Layers may be compiled anew for parameters that Dynamo tells apart.
            assert all(fused[name] >= count for name, count in expected.items()), (parallel.__name__, fused)
    finally:
        dist.destroy_process_group()


def test_every_rank_fuses_and_equals_one_process(tmp_path):
    torch.multiprocessing.spawn(rank, (f"file://{tmp_path / 'rendezvous'}",), RANKS)
