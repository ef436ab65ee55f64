"""Graphs as Inductor gets them for a GPU, on any machine: their tensors pretend to be on one."""

import torch
from torch import fx
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

from fusion_pass import graph_pass, inductor
from fusion_pass.fake_device import relabelled

LAUNCH = torch.ops.higher_order.triton_kernel_wrapper_functional


def lowered(fn, *shapes, dynamic=(), mark=torch._dynamo.mark_dynamic):
    """The report on fn over tensors that pretend to be on a GPU, and its lowered graph; ``dynamic`` are dims of the first."""
    results = []

    def compiler(gm, _):
        on_gpu = relabelled(gm, torch.device("cuda", 0))
        results.append((graph_pass.run(on_gpu.graph, ("cuda",), to_kernels=True), on_gpu.graph))
        return gm.forward

    torch._dynamo.reset()
    tensors = [torch.empty(shape, dtype=torch.bfloat16) for shape in shapes]
    for dim in dynamic:
        mark(tensors[0], dim)
    torch.compile(fn, backend=lambda gm, i: inductor.compile_without_joint_passes(gm, i, compiler))(*tensors)
    return results[0]


def launches(graph):
    return [node for node in graph.nodes if node.target is LAUNCH]


class Launched(fx.Interpreter):
    """Runs a lowered graph on tensors that are no pretence, launches included: on a CPU in Triton's interpreter."""

    def __init__(self, graph, device):
        super().__init__(fx.GraphModule({}, graph))
        self.device = device

    def run_node(self, node):
        if node.target is LAUNCH:
            return self.launch(node)
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device(self.device)}
        return super().run_node(node)

    def launch(self, node):
        (grid,), arguments = self.map_nodes_to_values((node.kwargs["grid"], dict(node.kwargs["kwargs"])), node)
        written = {name: arguments[name].clone() for name in node.kwargs["tensors_to_clone"]}
        constants = kernel_side_table.get_constant_args(node.kwargs["constant_args_idx"])
        kernel_side_table.get_kernel(node.kwargs["kernel_idx"])[tuple(grid)](**{**constants, **arguments, **written})
        return written
