"""Specs travel through graphs as text and refuse what no kernel can honour."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusion_pass.specs import (
    Activation,
    FusedSpec,
    GatedActivation,
    Mean,
    NoPrologue,
    PowerOfTwo,
    Quantizer,
    QuotientRule,
    RMSNorm,
    ScaleLayout,
    ScaleRule,
    SpecError,
    Weight,
    decode,
)

roundings = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
positive = st.floats(min_value=1e-12, max_value=1e4, allow_nan=False)
prologues = st.one_of(
    st.just(NoPrologue()),
    st.builds(
        RMSNorm,
        eps=positive,
        weight=st.sampled_from(Weight),
        mean=st.sampled_from(Mean),
        normalized=roundings,
        product=roundings,
        residual_sum=st.none() | roundings,
    ),
    st.builds(RMSNorm, eps=positive, weight=st.just(Weight.ONE_PLUS), product=roundings, shifted=roundings),
    st.builds(
        GatedActivation,
        activation=st.sampled_from([Activation.SILU, Activation.GELU, Activation.GELU_TANH]),
        activated=roundings,
        product=roundings,
        inner=roundings,
        limit=st.none() | positive,
        offset=positive,
    ),
)
quantizers = st.builds(
    Quantizer.dynamic,
    code=st.sampled_from([torch.float8_e4m3fn, torch.float8_e5m2]),
    divisor=positive,
    group=st.sampled_from([32, 64, 128]),
    amax_floor=st.none() | positive,
    amax_ceiling=st.none() | positive,
    zero_scale=st.none() | positive,
    scale_floor=st.none() | positive,
    power_of_two=st.sampled_from(PowerOfTwo),
    scale_rule=st.sampled_from([ScaleRule.DIVIDE, ScaleRule.RECIPROCAL]),
    scale_dtype=roundings,
    quotient_rule=st.sampled_from([QuotientRule.DIVIDE, QuotientRule.RECIPROCAL]),
    clamp=st.none() | positive,
)


@settings(deadline=None, suppress_health_check=list(HealthCheck))
@given(st.builds(FusedSpec, prologues, quantizers, st.sampled_from([s for s in ScaleLayout if s.value != "packed"])))
def test_text_round_trip(spec):
    assert decode(spec.encode()) == spec


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("group", 0),
        ("divisor", -1.0),
        ("divisor", float("inf")),
        ("clamp", 0.0),
        ("code", torch.int16),
        ("scale_dtype", torch.float64),
    ],
)
def test_a_bad_field_is_named(field, value):
    with pytest.raises(SpecError, match=field):
        Quantizer.dynamic(**{field: value})


def test_a_weight_is_rounded_only_after_one_is_added_to_it():
    RMSNorm(1e-6, Weight.ONE_PLUS, shifted=torch.bfloat16)
    with pytest.raises(SpecError, match="shifted"):
        RMSNorm(1e-6, Weight.PLAIN, shifted=torch.bfloat16)


def test_per_token_scales_have_no_column_layout():
    with pytest.raises(SpecError, match="layout"):
        FusedSpec(NoPrologue(), Quantizer.dynamic(), ScaleLayout.COLUMN)


@pytest.mark.parametrize("text", ["", "Quantizer()", "FusedSpec(prologue=open('x'))", "1 +"])
def test_other_text_is_refused(text):
    with pytest.raises(SpecError, match="spec"):
        decode(text)


@pytest.mark.parametrize("bounds", [{}, {"clamp": 127.0, "clamp_low": -200.0}, {"clamp": 128.0}])
def test_int8_codes_are_bounded_by_what_they_hold(bounds):
    with pytest.raises(SpecError, match="within -128 and 127"):
        Quantizer.static(torch.int8, **bounds)


@pytest.mark.parametrize("text", ["FusedSpec(prologue=1+2)", "f()()", "FusedSpec(layout=nowhere)"])
def test_what_is_no_spec_is_refused_as_one(text):
    with pytest.raises(SpecError, match="allowed"):
        decode(text)
