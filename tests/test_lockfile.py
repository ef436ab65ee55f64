"""A file of a model's expected sites: it is stable, and a lost site is a readable failure."""

import json

import pytest
import torch

import fusion_pass

import spelled

BF16 = torch.bfloat16


def layers(x, w):
    for _ in range(2):
        codes, scale = spelled.per_token(spelled.rms_norm(x, w))
        x = x + (codes.float() * scale).to(BF16)
    return x, *spelled.per_group(spelled.silu_mul(x, x))


def without_a_norm(x, w):
    codes, scale = spelled.per_token(spelled.rms_norm(x, w))
    x = x + (codes.float() * scale).to(BF16)
    # A cubic mean is no norm, and a scale per column no quantizer.
    codes = (x.float() / (x.abs().amax(-2, keepdim=True).float() / 448)).to(spelled.E4M3)
    return codes, *spelled.per_group(spelled.silu_mul(x, x))


@pytest.fixture
def args():
    return torch.randn(4, 256).to(BF16), torch.ones(256).to(BF16)


def test_a_lock_is_stable_and_readable(tmp_path, args):
    locked = [fusion_pass.lock(layers, *args, path=tmp_path / name, device="cuda") for name in ("a", "b")]
    assert locked[0] == locked[1]
    text = (tmp_path / "a").read_text()
    assert text == (tmp_path / "b").read_text()
    content = json.loads(text)
    assert (content["version"], content["device"]) == (1, "cuda")
    assert list(content["sites"]) == sorted(content["sites"])
    assert any(site.startswith("silu_mul_per_group_128 [4x256] -> e4m3fn") for site in content["sites"])
    assert locked[0].total == 3
    assert str(tmp_path) not in text
    assert not any(f":{line}" in text for line in range(10, 40))


def test_what_is_locked_is_found_again(tmp_path, args):
    fusion_pass.lock(layers, *args, path=tmp_path / "lock", device="cuda")
    assert fusion_pass.check(layers, *args, path=tmp_path / "lock") == f"3 sites, as in {tmp_path / 'lock'}"


def test_a_lost_site_is_shown_with_the_near_misses(tmp_path, args):
    fusion_pass.lock(layers, *args, path=tmp_path / "lock", device="cuda")
    with pytest.raises(fusion_pass.LostSiteError) as raised:
        fusion_pass.check(without_a_norm, *args, path=tmp_path / "lock")
    lines = str(raised.value).splitlines()
    assert any(line.startswith("- 1 x ") and "rms_norm_per_token" in line for line in lines)
    assert any("near misses now" in line for line in lines)
    assert any("quantizer:" in line and "test_lockfile.py" in line for line in lines)


def test_a_new_site_is_told_and_no_failure(tmp_path, args):
    fusion_pass.lock(lambda x, w: spelled.per_token(x), *args, path=tmp_path / "lock")
    found = fusion_pass.check(lambda x, w: (spelled.per_token(x), spelled.per_group(x)), *args, path=tmp_path / "lock")
    assert "new ones among them" in found
    assert "+ 1 x quant_per_group_128" in found


def test_a_missing_or_foreign_file_is_named(tmp_path, args):
    with pytest.raises(FileNotFoundError, match=r"write it with fusion_pass\.lock"):
        fusion_pass.check(layers, *args, path=tmp_path / "lock")
    for text, found in (('{"version": 2}', "version is 2"), ("[]", "version is None"), ("{", "is no JSON")):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(ValueError, match=found):
            fusion_pass.check(layers, *args, path=tmp_path / "lock")
