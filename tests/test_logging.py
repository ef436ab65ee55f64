"""What a process says with torch's own switches: TORCH_LOGS and TORCH_TRACE."""

import json
import os
import subprocess
import sys

PROGRAM = """
import torch
import fusion_pass
import spelled
torch.compile(spelled.per_token, backend="fusion_pass_eager")(torch.randn(4, 64).bfloat16())
"""


def artifacts(path):
    """The structured trace's artifacts by name: a line of JSON, then the payload, indented by a tab."""
    found, name = {}, None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("\t"):
            if name is not None:
                found[name] += line[1:] + "\n"
            continue
        entry = json.loads(line[line.index("{") :])
        name = entry.get("artifact", {}).get("name") if entry.get("has_payload") else None
        if name is not None:
            found[name] = ""
    return found


def test_torchs_switches_show_the_pass(tmp_path):
    here = os.path.dirname(__file__)
    environment = {**os.environ, "TORCH_LOGS": "+fusion_pass", "TORCH_TRACE": str(tmp_path), "PYTHONPATH": here}
    run = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, timeout=300, check=True)
    assert "] 1 fused ops serve 1 of 1 quantizing casts" in done.stderr
    assert "fused  quant_per_token [4x64] -> e4m3fn" in done.stderr
    (path,) = tmp_path.glob("*.log")
    found = artifacts(path)
    assert "torch.ops.aten.amax.default" in found["fusion_pass_before"]
    assert "torch.ops.fusion_pass.quant.default" in found["fusion_pass_after"]
    assert "torch.ops.fusion_pass" not in found["fusion_pass_before"]
