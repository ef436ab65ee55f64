"""Ops with the schemas of public libraries, run in plain PyTorch as the libraries' contracts say."""

import torch
import torch.nn.functional as F  # noqa: N812

E4M3 = torch.float8_e4m3fn
MAX = 448.0

_libraries = {}


def define(schema, implementation, fake=None):
    """An op for every device, unless the library itself is installed and has it."""
    namespace, rest = schema.split("::")
    library = _libraries.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    library.define(rest)
    library.impl(rest.split("(")[0], implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{namespace}::{rest.split('(')[0]}", fake or (lambda *_, **__: None), lib=library)


def normalized(x, weight, eps, *, twice, offset=0):
    h = x.float()
    # Small integers have exact sums of squares, and the tests' rows are powers of two long.
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return h.to(weight.dtype) * weight if twice else (h * (weight.float() + offset)).to(weight.dtype)


def vllm_rms_norm(result, input, weight, epsilon):
    result.copy_(normalized(input, weight, epsilon, twice=True))


def vllm_fused_add_rms_norm(input, residual, weight, epsilon):
    residual.add_(input)
    input.copy_(normalized(residual, weight, epsilon, twice=True))


def vllm_silu_and_mul(result, input):
    gate, up = input.chunk(2, -1)
    result.copy_(F.silu(gate) * up)


def vllm_mul_and_silu(out, input):
    up, gate = input.chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def true_quotient(a, b):
    """a / b rounded correctly also where b is a Python number and the device a GPU."""
    return a / torch.full_like(a, b)


def vllm_per_token(result, input, scale, scale_ub=None):
    x = input.float()
    s = true_quotient(x.abs().amax(-1, keepdim=True), MAX).clamp(min=1 / (MAX * 512))
    scale.copy_(s.view(scale.shape))
    result.copy_((x / s).clamp(-MAX, MAX).to(E4M3))


def vllm_per_group(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0, *_):
    x = input.float().unflatten(-1, (-1, group_size))
    s = true_quotient(x.abs().amax(-1, keepdim=True).clamp(min=eps), MAX)
    if scale_ue8m0:
        s = s.clamp(min=1e-10).log2().ceil().exp2()
    output_s.copy_(s.squeeze(-1))
    output_q.copy_((x / s).clamp(fp8_min, fp8_max).flatten(-2).to(E4M3))


def sgl_rmsnorm(output, input, weight, eps, enable_pdl):
    output.copy_(normalized(input, weight, eps, twice=False))


def sgl_gemma_rmsnorm(output, input, weight, eps, enable_pdl):
    output.copy_(normalized(input, weight, eps, twice=False, offset=1))


def sgl_fused_add_rmsnorm(input, residual, weight, eps, enable_pdl):
    total = input.float() + residual.float()
    residual.copy_(total)
    h = total * torch.rsqrt(total.pow(2).mean(-1, keepdim=True) + eps)
    input.copy_(h * weight.float())


def sgl_silu_and_mul(out, input):
    gate, up = input.float().chunk(2, -1)
    out.copy_(F.silu(gate) * up)


def vllm_gelu_tanh_and_mul(result, input):
    gate, up = input.chunk(2, -1)
    result.copy_(F.gelu(gate.contiguous(), approximate="tanh") * up)


def sgl_per_token(input, output_q, output_s):
    x = input.float()
    s = true_quotient(x.abs().amax(-1, keepdim=True), MAX).clamp(min=2.0**-126)
    output_s.copy_(s)
    output_q.copy_((x * s.reciprocal()).clamp(-MAX, MAX).to(E4M3))


def sgl_per_group(input, output_q, output_s, group_size, eps, fp8_min, fp8_max, scale_ue8m0):
    x = input.float().unflatten(-1, (-1, group_size))
    peak = x.abs().amax(-1, keepdim=True).clamp(min=eps)
    output_s.copy_((peak * torch.tensor(1 / MAX, dtype=torch.float32, device=x.device)).squeeze(-1))
    multiplier = torch.full_like(peak, fp8_max) / peak
    output_q.copy_((x * multiplier).clamp(fp8_min, fp8_max).flatten(-2).to(E4M3))


_GROUP = "int group_size, float eps, float fp8_min, float fp8_max, bool scale_ue8m0"
_SCHEMAS = {
    "_C::rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()": vllm_rms_norm,
    "_C::fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()": (
        vllm_fused_add_rms_norm
    ),
    "_C::silu_and_mul(Tensor! result, Tensor input) -> ()": vllm_silu_and_mul,
    "_C::gelu_tanh_and_mul(Tensor! out, Tensor input) -> ()": vllm_gelu_tanh_and_mul,
    "_C::mul_and_silu(Tensor! out, Tensor input) -> ()": vllm_mul_and_silu,
    "_C::dynamic_per_token_scaled_fp8_quant(Tensor! result, Tensor input, Tensor! scale, Tensor? scale_ub) -> ()": (
        vllm_per_token
    ),
    f"_C::per_token_group_fp8_quant(Tensor input, Tensor! output_q, Tensor! output_s, {_GROUP}, "
    "bool dummy_is_scale_transposed, bool dummy_is_tma_aligned) -> ()": vllm_per_group,
    "sgl_kernel::rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()": sgl_rmsnorm,
    "sgl_kernel::gemma_rmsnorm(Tensor! output, Tensor input, Tensor weight, float eps, bool enable_pdl) -> ()": (
        sgl_gemma_rmsnorm
    ),
    "sgl_kernel::fused_add_rmsnorm(Tensor! input, Tensor! residual, Tensor weight, float eps, bool enable_pdl) -> ()": (
        sgl_fused_add_rmsnorm
    ),
    "sgl_kernel::silu_and_mul(Tensor! out, Tensor input) -> ()": sgl_silu_and_mul,
    "sgl_kernel::sgl_per_token_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s) -> ()": sgl_per_token,
    f"sgl_kernel::sgl_per_token_group_quant_fp8(Tensor input, Tensor! output_q, Tensor! output_s, {_GROUP}) -> ()": (
        sgl_per_group
    ),
    # Not the schema the table has: a library of another time.
    f"sgl_kernel::sgl_per_token_group_quant_8bit(Tensor input, Tensor! output_q, Tensor! output_s, {_GROUP}, "
    "bool more) -> ()": lambda *args: sgl_per_group(*args[:-1]),
}

for _schema, _implementation in _SCHEMAS.items():
    define(_schema, _implementation)


def vllm_ir_rms_norm(x, weight, epsilon, variance_size=None):
    """vllm/ir/ops/layernorm.py, as its other norm."""
    return vllm_ir_fused_add_rms_norm(x, None, weight, epsilon, variance_size)[0]


def vllm_ir_fused_add_rms_norm(x, x_residual, weight, epsilon, variance_size=None):
    total = x.float() if x_residual is None else x.float() + x_residual.float()
    h = total * torch.rsqrt(total[..., :variance_size].pow(2).mean(-1, keepdim=True) + epsilon)
    return (h if weight is None else h.to(weight.dtype) * weight).to(x.dtype), total.to(x.dtype)


_IR = "Tensor? weight, float epsilon, SymInt? variance_size=None"
define(f"vllm_ir::rms_norm(Tensor x, {_IR}) -> Tensor", vllm_ir_rms_norm, vllm_ir_rms_norm)
define(
    f"vllm_ir::fused_add_rms_norm(Tensor x, Tensor x_residual, {_IR}) -> (Tensor, Tensor)",
    vllm_ir_fused_add_rms_norm,
    vllm_ir_fused_add_rms_norm,
)


# The calls as the libraries' Python wrappers make them.


def rms_norm(x, weight, eps=1e-6):
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, eps)
    return out


def add_rms_norm(x, residual, weight, eps=1e-6):
    """In place, as vLLM: on copies, so that a test may run it twice on the same tensors."""
    x, residual = x.clone(), residual.clone()
    torch.ops._C.fused_add_rms_norm(x, residual, weight, eps)
    return x, residual


def silu_and_mul(x):
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    torch.ops._C.silu_and_mul(out, x)
    return out


def gelu_tanh_and_mul(x):
    out = x.new_empty(*x.shape[:-1], x.shape[-1] // 2)
    torch.ops._C.gelu_tanh_and_mul(out, x)
    return out


def per_token(x, scale_ub=None):
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
    torch.ops._C.dynamic_per_token_scaled_fp8_quant(codes, x, scale, scale_ub)
    return codes, scale


def group_scales(x, group, layout):
    """The buffers that vLLM and sglang allocate: rows; columns by a view; columns by strides; columns of 4k rows."""
    *batch, rows, width = (*x.shape[:-1], x.shape[-1] // group)
    options = {"dtype": torch.float32, "device": x.device}
    if layout == "row":
        return torch.empty((*batch, rows, width), **options)
    if layout == "column":
        return torch.empty((*batch, width, rows), **options).permute(*range(len(batch)), -1, -2)
    padded = (rows + 3) // 4 * 4
    if layout == "strided":
        return torch.empty_strided((rows, width), (1, padded), **options)
    assert layout == "sliced"
    return torch.empty((width, padded), **options).permute(-1, -2)[:rows]


def per_group(x, group=128, layout="row", *, eps=1e-10, ue8m0=False, bound=MAX):
    codes = torch.empty(x.shape, dtype=E4M3, device=x.device)
    scale = group_scales(x, group, layout)
    flags = (False, False)
    torch.ops._C.per_token_group_fp8_quant(x, codes, scale, group, eps, -bound, bound, ue8m0, *flags)
    return codes, scale


def sgl_norm(x, weight, gemma=False):
    out = torch.empty_like(x)
    op = torch.ops.sgl_kernel.gemma_rmsnorm if gemma else torch.ops.sgl_kernel.rmsnorm
    op(out, x, weight, 1e-6, False)
    return out


def sgl_add_norm(x, residual, weight):
    x, residual = x.clone(), residual.clone()
    torch.ops.sgl_kernel.fused_add_rmsnorm(x, residual, weight, 1e-6, False)
    return x, residual


def sgl_silu_mul(x):
    out = torch.empty((*x.shape[:-1], x.shape[-1] // 2), dtype=x.dtype, device=x.device)
    torch.ops.sgl_kernel.silu_and_mul(out, x)
    return out


def sgl_token(x):
    codes, scale = torch.empty_like(x, dtype=E4M3), x.new_empty((x.shape[0], 1), dtype=torch.float32)
    torch.ops.sgl_kernel.sgl_per_token_quant_fp8(x, codes, scale)
    return codes, scale


def sgl_group(x, group=128, layout="row"):
    codes, scale = torch.empty_like(x, dtype=E4M3), group_scales(x, group, layout)
    torch.ops.sgl_kernel.sgl_per_token_group_quant_fp8(x, codes, scale, group, 1e-10, -MAX, MAX, False)
    return codes, scale
