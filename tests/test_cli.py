"""The command line, in this process; its targets are files in a folder of their own."""

import sys
import textwrap

import pytest
import torch
from fusion_pass.kernels import reference

from fusion_pass import cli, ops, targets

SOURCE = """
import torch

def quantized(x):
    scale = x.abs().amax(-1, keepdim=True).float().clamp(min=1e-10) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale

def quantized_args():
    return (torch.randn(4, 64).bfloat16(),)

def one_tensor():
    return torch.randn(2, 64).bfloat16()

class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, x):
        return quantized(self.linear(x))

class Demanding(torch.nn.Module):
    def __init__(self, width):
        super().__init__()

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "cli_target.py").write_text(textwrap.dedent(SOURCE))
    monkeypatch.chdir(tmp_path)
    # Not that of another test's folder.
    monkeypatch.delitem(sys.modules, "cli_target", raising=False)
    with ops.plain_on_cpu():
        yield tmp_path


@pytest.mark.parametrize("target", ["cli_target.py:quantized", "cli_target:quantized"])
def test_explain_prints_the_report(folder, capsys, target):
    assert cli.main(["explain", target, "--device", "cuda"]) == 0
    assert "fused  quant_per_token [4x64] -> e4m3fn" in capsys.readouterr().out


def test_a_class_of_module_and_inline_inputs(folder, capsys):
    assert cli.main(["explain", "cli_target.py:Model", "--inputs", "bf16[3, 64]"]) == 0
    assert "quant_per_token [3x64]" in capsys.readouterr().out


def test_arguments_of_another_function(folder, capsys):
    assert cli.main(["explain", "cli_target.py:quantized", "--args", "cli_target.py:one_tensor"]) == 0
    assert "quant_per_token [2x64]" in capsys.readouterr().out


def test_fuzz_passes_on_equal_results(folder, capsys):
    assert cli.main(["fuzz", "cli_target.py:quantized", "--examples", "30"]) == 0
    out = capsys.readouterr().out
    assert "30 inputs, leading sizes 4, 1, 2, 5, 16, 33: fused and eager are equal" in out
    assert "sites: quant_per_token" in out


def test_fuzz_shows_the_input_and_both_graphs_of_a_difference(folder, capsys, monkeypatch):
    def wrong(spec, x, *rest):
        outputs = reference.reference(spec, x, *rest)
        outputs[1][x.isnan().any(-1, keepdim=True)] = 1.0
        return outputs

    monkeypatch.setattr(ops, "reference", wrong)
    monkeypatch.setattr(ops, "launch", wrong)
    assert cli.main(["fuzz", "cli_target.py:quantized"]) == 1
    out = capsys.readouterr().out
    assert "argument 0: bfloat16 (1, 64), zeros but for [0, " in out
    assert "= nan" in out
    assert "before the pass:" in out
    assert "after the pass:" in out
    assert "torch.ops.fusion_pass.quant" in out


def test_lock_and_check(folder, capsys):
    assert cli.main(["check", "cli_target.py:quantized"]) == 1
    assert cli.main(["lock", "cli_target.py:quantized", "--device", "cuda"]) == 0
    assert cli.main(["check", "cli_target.py:quantized"]) == 0
    assert "1 sites, as in fusion.lock.json" in capsys.readouterr().out
    assert cli.main(["check", "cli_target.py:quantized", "--inputs", "bf16[5, 64]"]) == 1
    assert "- 1 x quant_per_token [4x64]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cli_target.py"], "allowed: module:name"),
        (["nowhere.py:f"], "there is no file nowhere.py"),
        (["nowhere:f"], "there is no module 'nowhere'"),
        (["cli_target.py:absent"], "has no 'absent'"),
        (["cli_target.py:number"], "is int; allowed: a function"),
        (["cli_target.py:Model"], "allowed: a function cli_target.py:Model_args"),
        (["cli_target.py:Demanding"], "allowed: a class that takes no arguments"),
        (["cli_target.py:quantized", "--inputs", "fp4[3]"], "--inputs has 'fp4[3]'; allowed: tensors such as"),
        (["cli_target.py:quantized", "--inputs", "f32[3]", "--args", "a:b"], "are both given"),
    ],
)
def test_a_wrong_command_line_says_what_is_allowed(folder, capsys, arguments, message):
    assert cli.main(["explain", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "cli_target.py:quantized", "--device", "mps"], "'mps'; allowed: cuda or cpu"),
        (["fuzz", "cli_target.py:quantized", "--examples", "-3"], "'-3'; allowed: a positive number"),
    ],
)
def test_a_wrong_option_says_what_is_allowed(folder, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_file_that_is_no_lockfile(folder, capsys):
    (folder / "fusion.lock.json").write_text("[]")
    assert cli.main(["check", "cli_target.py:quantized"]) == 2
    assert "version is None in fusion.lock.json" in capsys.readouterr().err


def test_inline_tensors():
    x, i, scalar = targets.arguments("", None, "f16[2, 3], i64[4], f32[]")
    assert (x.dtype, tuple(x.shape)) == (torch.float16, (2, 3))
    assert (i.dtype, tuple(i.shape)) == (torch.int64, (4,))
    assert scalar.shape == ()
