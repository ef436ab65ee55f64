"""What kernels compile to is found without a GPU."""

import machine_code
import pytest


@pytest.mark.parametrize(
    ("site", "rows", "kernel"),
    [
        ("rms -> group", 512, "fused_quant_kernel"),
        ("rms -> group", 8, "fused_quant_split_kernel"),
        ("none -> mxfp8-both", 512, "packed_cast_transpose_kernel"),
    ],
)
def test_launches_of_a_site_compile(site, rows, kernel):
    (launch,) = machine_code.launches(site, rows, 4096, "bfloat16")
    assert launch.kernel.__name__ == kernel
    code = machine_code.compiled(launch)
    # Reads and writes of whole vectors, and no register in memory.
    assert code.names["LDG"] >= 1 and code.names["STG"] >= 1 and not code.names["LDL"] + code.names["STL"]
    assert 16 <= code.registers <= 255 and 1 <= code.programs <= 32
    assert code.instructions == sum(code.names.values()) > 100


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_values_that_wait_in_16_bits_take_fewer_registers(dtype):
    """The compiler has not found out that they are widened twice to the same."""
    wide, narrow = (
        machine_code.compiled(machine_code.launches("rms -> group", 8192, 8192, dtype, {"narrow": narrow})[0])
        for narrow in (False, True)
    )
    assert narrow.registers <= wide.registers - 16


def test_products_rounded_to_16_bits_are_held_in_them():
    """Three programs fit a processor then; of values that are widened to the last, two."""
    (launch,) = machine_code.launches("gemma -> token", 8192, 16384, "bfloat16")
    assert machine_code.compiled(launch).programs >= 3


@pytest.mark.parametrize("site", ["rms -> token", "rms -> group", "gemma -> mxfp8"])
def test_weights_read_first_are_asked_for_before_a_row_is_added_up(site):
    """Left to themselves, assemblers read them after it has come."""

    def waits_for_weights(first):
        fields = {"first_weight": first, "inline_mean": True}
        code = machine_code.compiled(machine_code.launches(site, 8192, 4096, "bfloat16", fields)[0])
        return code.text.rindex("LDG.E.128") > code.text.index("FFMA")

    assert waits_for_weights(False) and not waits_for_weights(True)


@pytest.mark.parametrize(
    ("site", "barriers"), [("none -> group-column", 0), ("silu*mul -> mxfp8", 0), ("rms -> group", 1)]
)
def test_scales_stored_from_their_groups_are_not_exchanged(site, barriers):
    """Each barrier is one of a norm's sum; left to Triton, there are one or two more."""

    def waits(own):
        (launch,) = machine_code.launches(site, 32, 4096, "bfloat16", {"own_scales": own})
        return machine_code.compiled(launch).names["BAR"]

    assert waits(True) == barriers < waits(False)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_fp4_codes_of_pairs_take_fewer_instructions(dtype):
    """Of single values they take 315 for 16; where four threads compute a scale, and not two, 197, and after a norm 1166 for 64."""
    for site, most in [("none -> mxfp4", 185), ("rms -> mxfp4", 1060)]:
        (launch,) = machine_code.launches(site, 8192, 4096, dtype)
        assert machine_code.compiled(launch).instructions < most, site


@pytest.mark.parametrize(
    ("site", "capability"),
    [
        ("rms -> int8", 86),
        ("none -> mxfp4", 86),
        ("silu*mul -> mxfp4", 86),
        ("none -> mxfp4-both", 86),
        ("rms -> token", 89),
    ],
)
def test_kernels_compile_for_the_oldest_gpu_that_sites_are_fused_for(site, capability):
    (launch,) = machine_code.launches(site, 512, 4096, "bfloat16")
    assert machine_code.compiled(launch, capability).instructions > 100


def test_fields_of_the_configuration_are_replaced(capsys, tmp_path):
    sass = tmp_path / "kernel.sass"
    site = ["--site", "rms -> token", "--rows", "8", "--row", "4096"]
    assert machine_code.main([*site, "--set", "warps=2", "lanes=4096", "parts=1", "--sass", str(sass)]) == 0
    shown = capsys.readouterr().out
    assert " 2 warps" in shown and "fused_quant_kernel" in shown
    assert "fused_quant_kernel" in sass.read_text()


def test_programs_fit_by_registers_and_by_warps():
    names = machine_code.collections.Counter(FFMA=1)
    assert machine_code.MachineCode(4, 128, 0, names, "").programs == 4
    assert machine_code.MachineCode(4, 129, 0, names, "").programs == 3
    assert machine_code.MachineCode(16, 32, 0, names, "").programs == 4
