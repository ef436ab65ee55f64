"""GPUs that cannot run the kernels are told before Inductor compiles one."""

import pytest
import torch

from fusion_pass import graph_pass, hardware, inductor
from fusion_pass.fake_device import relabelled

import spelled

BF16 = torch.bfloat16


def report_on(fn):
    """The report on fn of a (8, 256) tensor, were it on a GPU."""
    reports = []

    def compiler(gm, _):
        reports.append(graph_pass.run(relabelled(gm, torch.device("cuda", 0)).graph, ("cuda",)))
        return gm.forward

    backend = lambda gm, inputs: inductor.compile_without_joint_passes(gm, inputs, compiler)  # noqa: E731
    torch.compile(fn, backend=backend)(torch.ones(8, 256, dtype=BF16))
    return reports[0]


def to_int8(x):
    scale = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5) / 127.0
    return torch.round(x.float() / scale).clamp(-127, 127).to(torch.int8), scale


@pytest.mark.parametrize(
    ("capability", "fn", "reason"),
    [
        ((8, 0), to_int8, "codes of int8 need compute capability 8.6, the GPU has 8.0"),
        ((8, 6), to_int8, None),
        ((8, 6), spelled.per_token, "codes of e4m3fn need compute capability 8.9, the GPU has 8.6"),
        ((8, 9), spelled.per_token, None),
        ((10, 0), spelled.per_token, None),
    ],
)
def test_older_gpus(capability, fn, reason, monkeypatch):
    monkeypatch.setattr(hardware, "_capability", lambda device: capability)
    report = report_on(fn)
    assert bool(report.fused) == (reason is None)
    assert [(miss.kind, miss.reason) for miss in report.missed] == ([] if reason is None else [("device", reason)])


def test_amd_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    (miss,) = report_on(spelled.per_token).missed
    assert miss.kind == "device"
    assert "NVIDIA" in miss.reason
