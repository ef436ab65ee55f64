"""Reports on functions: any number of them in one process, for devices that the pass knows."""

import os
import subprocess
import sys

import pytest
import torch

import fusion_pass

import spelled


@pytest.mark.parametrize("device", [None, "cuda"])
def test_any_number_of_functions_in_one_process(device):
    """Dynamo gives up on code that it compiled eight times, as all functions are called by one."""
    x = torch.randn(4, 256)
    for floor in range(1, 13):
        report = fusion_pass.explain(lambda x, floor=floor: spelled.per_token(x * floor), x, device=device)
        assert len(report.fused) == 1, floor


@pytest.mark.parametrize("device", ["mps", "meta", "foo"])
def test_other_devices_are_refused(device):
    with pytest.raises(ValueError, match=f"device is {device}; allowed: None, or"):
        fusion_pass.explain(spelled.per_token, torch.randn(4, 256), device=device)


def test_modules_are_found_where_the_package_is_imported():
    for name in ("layouts", "ops", "presets", "specs", "testing"):
        assert name in dir(fusion_pass)
        assert getattr(fusion_pass, name).__name__ == f"fusion_pass.{name}"


def test_numpy_is_not_needed():
    script = "import sys; sys.modules['numpy'] = None; import fusion_pass; fusion_pass.register(devices=('cpu',))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ, "TRITON_INTERPRET": "0"}
    )
    assert done.returncode == 0, done.stderr
