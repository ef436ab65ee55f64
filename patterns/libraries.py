"""What the fused ops of public libraries compute. They fuse where the library is installed.

Each entry states the contract of the op, as its library documents and tests it. The library's kernels may depart from it
by a unit in the last place: they divide by approximate reciprocals, or sum in another order.

Not in the table: static scales (``_C::static_scaled_fp8_quant``,
``_C::rms_norm_static_fp8_quant``, ``_C::fused_add_rms_norm_static_fp8_quant``, ``_C::silu_and_mul_quant``,
``sgl_kernel::sgl_per_tensor_quant_fp8``), one dynamic scale per tensor (``_C::dynamic_scaled_fp8_quant``), scales packed
four to an int32 (``_C::per_token_group_fp8_quant_packed``), torchao's blockwise quantizers
(``torchao::triton_fp8_blockwise_act_quant_lhs``) and aiter's, which multiply by an approximate reciprocal on AMD GPUs. Ops that already quantize (``_C::rms_norm_dynamic_per_token_quant``) need no fusion.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fusion_pass.specs import (
    Activation,
    GatedActivation,
    Mean,
    PowerOfTwo,
    Quantizer,
    QuotientRule,
    RMSNorm,
    ScaleRule,
    Weight,
)
from fusion_pass.terms import AMAX, Term

from .op_table import register_op

_E4M3_MAX = 448.0


def register() -> None:
    """Put the ops of public libraries into the table."""
    _register_vllm()
    _register_vllm_ir()
    _register_sgl_kernel()


def _mixed(*tensors: torch.Tensor) -> str | None:
    """A sentence if the tensors' dtypes differ or are not those of the libraries' kernels."""
    kinds = {t.dtype for t in tensors}
    if len(kinds) > 1 or not kinds <= {torch.bfloat16, torch.float16, torch.float32}:
        return f"its tensors are {' and '.join(sorted(map(str, kinds)))}, not of one float dtype"
    return None


def _norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    *,
    rule: Weight = Weight.PLAIN,
    twice: bool = False,
    residual_sum: torch.dtype | None = None,
) -> RMSNorm | str:
    """A norm over the sum of squares divided by N: ``twice`` if x * rstd is rounded before the weight as well."""
    return _mixed(*(t for t in (x, weight) if t is not None)) or RMSNorm(
        eps,
        weight=Weight.NONE if weight is None else rule,
        mean=Mean.DIVIDE,
        normalized=x.dtype if twice else torch.float32,
        product=x.dtype,
        residual_sum=residual_sum,
    )


def _register_vllm() -> None:
    """vLLM's ``_C``: csrc/libtorch_stable/layernorm_kernels.cu, csrc/activation_kernels.cu, csrc/quantization/w8a8/fp8.

    Where the schema requires a weight, x * rstd is rounded before the weight, as vLLM's reference says; releases 0.20 to
    0.22 did not (vllm-project/vllm#42325). Where the weight is optional, the kernels round once.
    """
    for kind, twice in (("Tensor", True), ("Tensor?", False)):
        register_op(
            f"_C::rms_norm(Tensor! result, Tensor input, {kind} weight, float epsilon) -> ()",
            lambda input, weight, epsilon, twice=twice: _norm(input, weight, epsilon, twice=twice),
            x="input",
            weight="weight",
            value="result",
        )
        register_op(
            f"_C::fused_add_rms_norm(Tensor! input, Tensor! residual, {kind} weight, float epsilon) -> ()",
            # The sum is rounded before the norm reads it.
            lambda input, residual, weight, epsilon, twice=twice: _norm(
                input, weight, epsilon, twice=twice, residual_sum=input.dtype
            ),
            x="input",
            residual="residual",
            weight="weight",
            value="input",
            sum="residual",
        )
    for name, part, activation in (
        ("silu_and_mul", "gate_up", Activation.SILU),
        ("mul_and_silu", "up_gate", Activation.SILU),
        ("gelu_and_mul", "gate_up", Activation.GELU),
        ("gelu_tanh_and_mul", "gate_up", Activation.GELU_TANH),
    ):
        # Releases differ in the name of the result.
        for result in ("result", "out"):
            register_op(
                f"_C::{name}(Tensor! {result}, Tensor input) -> ()",
                lambda input, activation=activation: GatedActivation(activation, input.dtype, input.dtype),
                value=result,
                **{part: "input"},
            )
    for result in ("result", "out"):
        register_op(
            f"_C::dynamic_per_token_scaled_fp8_quant(Tensor! {result}, Tensor input, Tensor! scale, "
            "Tensor? scale_ub) -> ()",
            _vllm_per_token,
            x="input",
            codes=result,
            scale="scale",
        )
    for flags in ("", ", bool dummy_is_scale_transposed, bool dummy_is_tma_aligned"):
        register_op(
            "_C::per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, int group_size, float eps, "
            f"float fp8_min, float fp8_max, bool scale_ue8m0{flags}) -> ()",
            _vllm_per_group,
            x="input",
            codes="output_q",
            scale="output_s",
        )


def _vllm_per_token(input: torch.Tensor, scale_ub: torch.Tensor | None) -> Quantizer | str:
    if scale_ub is not None:
        return "scale_ub bounds its scales"
    return Quantizer.dynamic(scale_floor=1 / (_E4M3_MAX * 512), scale_rule=ScaleRule.DIVIDE)


def _vllm_per_group(
    input: torch.Tensor, group_size: int, eps: float, fp8_min: float, fp8_max: float, scale_ue8m0: bool, **_: bool
) -> Quantizer | str:
    # The two further flags repeat what the strides of output_s say.
    if (fp8_min, fp8_max) != (-_E4M3_MAX, _E4M3_MAX):
        return f"it clamps to [{fp8_min:g}, {fp8_max:g}], not to what float8_e4m3fn holds"
    # Before it is rounded up to a power of two, a scale is at least 1e-10.
    floor = max(eps, 1e-10 * fp8_max) if scale_ue8m0 else eps
    return Quantizer.dynamic(
        group=group_size,
        amax_floor=floor or None,
        scale_rule=ScaleRule.DIVIDE,
        power_of_two=PowerOfTwo.CEIL if scale_ue8m0 else PowerOfTwo.NO,
    )


def _register_vllm_ir() -> None:
    """vLLM's ``vllm_ir``: norms in the graph until vLLM lowers them, after other passes of its manager.

    Their contract is their native implementation, vllm/ir/ops/layernorm.py, which the kernels that vLLM may choose
    approximate: PyTorch code that reads the unrounded residual sum.
    """
    register_op(
        "vllm_ir::rms_norm(Tensor x, Tensor? weight, float epsilon, SymInt? variance_size=None) -> Tensor",
        _vllm_ir_norm,
        x="x",
        weight="weight",
        value=0,
    )
    register_op(
        "vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, "
        "SymInt? variance_size=None) -> (Tensor, Tensor)",
        lambda x, x_residual, weight, epsilon, variance_size: _vllm_ir_norm(
            x, weight, epsilon, variance_size, residual_sum=torch.float32
        ),
        x="x",
        residual="x_residual",
        weight="weight",
        value=0,
        sum=1,
    )


def _vllm_ir_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None,
    residual_sum: torch.dtype | None = None,
) -> RMSNorm | str:
    if variance_size is not None:
        return f"its mean is that of the first {variance_size} values of a row"
    norm = _norm(x, weight, epsilon, twice=weight is not None, residual_sum=residual_sum)
    if isinstance(norm, str) or x.device.type == "cpu":
        return norm
    return replace(norm, mean=Mean.RECIPROCAL)


def _register_sgl_kernel() -> None:
    """sglang's ``sgl_kernel``: csrc/common_extension.cc; its norms and activations are flashinfer's.

    Norms round once, after the weight, and read the unrounded residual sum; activations round once, after the product.
    """
    for prefix, rule in (("", Weight.PLAIN), ("gemma_", Weight.ONE_PLUS)):
        register_op(
            f"sgl_kernel::{prefix}rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()",
            lambda input, weight, eps, enable_pdl, rule=rule: _norm(input, weight, eps, rule=rule),
            x="input",
            weight="weight",
            value="output",
        )
        register_op(
            f"sgl_kernel::{prefix}fused_add_rmsnorm(Tensor! input, Tensor! residual, Tensor weight, float eps, "
            "bool enable_pdl) -> ()",
            lambda input, residual, weight, eps, enable_pdl, rule=rule: _norm(
                input, weight, eps, rule=rule, residual_sum=torch.float32
            ),
            x="input",
            residual="residual",
            weight="weight",
            value="input",
            sum="residual",
        )
    for name, activation in (
        ("silu_and_mul", Activation.SILU),
        ("gelu_and_mul", Activation.GELU),
        ("gelu_tanh_and_mul", Activation.GELU_TANH),
    ):
        register_op(
            f"sgl_kernel::{name}(Tensor! out, Tensor input) -> ()",
            lambda input, activation=activation: GatedActivation(activation, product=input.dtype),
            gate_up="input",
            value="out",
        )
    register_op(
        "sgl_kernel::sgl_per_token_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s) -> ()",
        # Rows of zeros have codes of zero, whatever their scale: its two kernels store zeros or NaN for them.
        lambda input: Quantizer.dynamic(
            scale_floor=2.0**-126, scale_rule=ScaleRule.DIVIDE, quotient_rule=QuotientRule.RECIPROCAL
        ),
        x="input",
        codes="output_q",
        scale="output_s",
    )
    for name in ("fp8", "8bit"):
        register_op(
            f"sgl_kernel::sgl_per_token_group_quant_{name}(Tensor input, Tensor! output_q, Tensor! output_s, "
            "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0) -> ()",
            _sgl_per_group,
            x="input",
            codes="output_q",
            scale="output_s",
        )


def _sgl_per_group(
    input: torch.Tensor, group_size: int, eps: float, fp8_min: float, fp8_max: float, scale_ue8m0: bool
) -> Quantizer | str:
    if scale_ue8m0:
        return "its scales are packed four to an int32"
    if (fp8_min, fp8_max) != (-_E4M3_MAX, _E4M3_MAX):
        return f"it clamps to [{fp8_min:g}, {fp8_max:g}], not to what float8_e4m3fn holds"
    # It stores amax times 1 / MAX, and multiplies by MAX / amax.
    quantizer = Quantizer.dynamic(group=group_size, amax_floor=eps or None, quotient_rule=QuotientRule.RECIPROCAL)
    peak = Term("max", (AMAX, eps)) if eps else AMAX
    return replace(quantizer, factor=Term("div", (fp8_max, peak)))
