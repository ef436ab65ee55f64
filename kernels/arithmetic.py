"""Device functions shared by every kernel family: casts, rounding points, amax, exact quotients, activations.

Each reproduces the bits of the eager PyTorch operation it is named after. Where Triton's interpreter does not (its casts
to bf16 and fp8 do not round to nearest even, its fma rounds twice, it has no libdevice), the interpreted version calls
PyTorch's CPU operation on the tile instead.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# Triton's language has no types for what device functions take and return.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

# Whether ATen was compiled with CUDA 13's math library.
NEWER_ERF: tl.constexpr = tl.constexpr(int((torch.version.cuda or "13").split(".")[0]) >= 13)

INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

_TORCH_DTYPES = {
    tl.float32: torch.float32,
    tl.bfloat16: torch.bfloat16,
    tl.float16: torch.float16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
    tl.int8: torch.int8,
    tl.int32: torch.int32,
    tl.uint8: torch.uint8,
}
# The types numpy lacks travel through the interpreter as their bits.
_BITS = {tl.bfloat16: torch.uint16, tl.float8e4nv: torch.uint8, tl.float8e5: torch.uint8}


def _to_torch(x: tl.tensor) -> torch.Tensor:
    import numpy as np  # which the interpreter needs, and nothing else

    data = torch.from_numpy(np.ascontiguousarray(x.handle.data))
    dtype = x.dtype.scalar
    return data.view(_TORCH_DTYPES[dtype]) if dtype in _BITS else data


def _from_torch(x: torch.Tensor, dtype: tl.dtype) -> tl.tensor:
    from triton.runtime.interpreter import TensorHandle

    data = (x.view(_BITS[dtype]) if dtype in _BITS else x).numpy()
    return tl.tensor(TensorHandle(data, dtype), tl.block_type(dtype, list(x.shape)))


if INTERPRETED:

    def cast(x, dtype):
        dtype = tl.core._unwrap_if_constexpr(dtype)
        return x if x.dtype.scalar == dtype else _from_torch(_to_torch(x).to(_TORCH_DTYPES[dtype]), dtype)

    def _by_torch(operation):
        return lambda x: _from_torch(operation(_to_torch(x)), x.dtype.scalar)

    def _activation(operation):
        def interpreted(x, TO):
            # In the 16 bits that it is rounded to, as eager code: GELU of a CPU with AVX2 gives zeros another sign in float32.
            computed = {"bf16": torch.bfloat16, "f16": torch.float16}.get(
                tl.core._unwrap_if_constexpr(TO), torch.float32
            )
            return _from_torch(operation(_to_torch(x).to(computed)).float(), tl.float32)

        return interpreted

    silu, sigmoid, gelu = map(_activation, (torch.nn.functional.silu, torch.sigmoid, torch.nn.functional.gelu))
    gelu_tanh = _activation(lambda x: torch.nn.functional.gelu(x, approximate="tanh"))

    def divide(y, s, ORDINARY):
        return tl.math.div_rn(y, s)

    def times(x, y):
        return x * y

    def reciprocal_root(x, NORMAL):
        return tl.math.rsqrt(x)

    def root(x):
        return _from_torch(_to_torch(x).sqrt(), tl.float32)

    nearest_even, ceiling, floor, logarithm2, exponential2 = map(
        _by_torch, (torch.round, torch.ceil, torch.floor, torch.log2, torch.exp2)
    )

    nearest_away = _by_torch(lambda t: torch.where((t - t.trunc()).abs() >= 0.5, t.trunc() + t.sign(), t.trunc()))

    def int8_nearest_even(q, LOW, HIGH):
        return cast(tl.clamp(nearest_even(q), LOW, HIGH, propagate_nan=tl.PropagateNan.ALL), tl.int8)

    @triton.jit
    def unbounded_int8(q, kept):
        return tl.where(kept, int8_nearest_even(q, -128, 127), 0).to(tl.int8)

    def power_of_two(x):
        return _from_torch(torch.pow(2.0, _to_torch(x)), x.dtype.scalar)

    def integer(x):
        return _from_torch(_to_torch(x).to(torch.int32), tl.int32)

    def widened(x):
        return cast(x, tl.float32)

    def widened_after(x, y):
        return cast(x, tl.float32)

    def rounded_to_bf16(x):
        return cast(cast(x, tl.bfloat16), tl.float32)

    def packed_product(x, y):
        return _from_torch(_to_torch(x) * _to_torch(y), x.dtype.scalar)

    def packed_sum(x, y):
        return _from_torch(_to_torch(x) + _to_torch(y), x.dtype.scalar)

    @triton.jit
    def half_f16(pair, HALF: tl.constexpr):
        if HALF == "high":
            pair = pair >> 16
        return (pair & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)

    @triton.jit
    def amax(x, AXIS: tl.constexpr):
        # Without their sign, f32 bit patterns order as integers, with NaN above infinity; numpy's max would warn of NaN.
        bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, AXIS, keep_dims=True)
        return bits.to(tl.float32, bitcast=True)

    def whole_amax(x, WARPS, VECTOR):
        return amax(widened(x), 2)

    def sum_of_squares(x, GROUP, N, WARPS, VECTOR, SEGMENT):
        rows = _to_torch(x)[:, :, : int(GROUP)].flatten(1)[:, : int(N)]
        return _from_torch(rows.square().sum(1)[:, None, None], tl.float32)

    @triton.jit
    def pair_of(first, second):
        first, second = first.to(tl.uint16, bitcast=True), second.to(tl.uint16, bitcast=True)
        return (first.to(tl.int32) | (second.to(tl.int32) << 16)).to(tl.int32)

    @triton.jit
    def amax_of_pairs(pairs, F16: tl.constexpr):
        return amax(greater(tl.abs(low(pairs, F16)), tl.abs(high(pairs, F16))), 2)

else:

    @triton.jit
    def cast(x, dtype: tl.constexpr):
        """x in ``dtype``, rounded to nearest even; fp8 codes saturate and keep NaN."""
        return x.to(dtype)

    @triton.jit
    def widened(x):
        """x in float32. Both halves of a register are unpacked by one instruction each, where Triton's cast takes three."""
        if x.dtype == tl.bfloat16:
            wide = tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=f,=f,r", [x], tl.float32, is_pure=True, pack=2
            )
        else:
            wide = cast(x, tl.float32)
        return wide

    @triton.jit
    def widened_after(x, y):
        """As :func:`widened`, but no sooner than the f32 y >= 0, which broadcasts against x, is there; anything beside a NaN.

        What is widened once is kept in registers of 32 bits until its last use. So a use that waits for a sum widens anew, by
        instructions in which the sign of y, zero, takes part: the compiler neither knows nor finds that out.
        """
        sign = y.to(tl.uint32, bitcast=True) >> 31
        if x.dtype == tl.bfloat16:
            wide = tl.inline_asm_elementwise(
                "{ .reg .b32 s; prmt.b32 $0, $2, 0, $3; add.u32 s, $3, 0x2200; prmt.b32 $1, $2, 0, s; }",
                "=f,=f,r,r,r",
                [x, tl.broadcast_to(sign + 0x1044, x.shape)],
                tl.float32,
                is_pure=True,
                pack=2,
            )
        elif x.dtype == tl.float16:
            wide = tl.inline_asm_elementwise(
                "{ .reg .b32 t; .reg .b16 low, high; mul.rn.f16x2 t, $2, $3; mov.b32 {low, high}, t; "
                "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }",
                "=f,=f,r,r,r",
                [x, tl.broadcast_to(sign + 0x3C003C00, x.shape)],
                tl.float32,
                is_pure=True,
                pack=2,
            )
        else:
            wide = cast(x, tl.float32)
        return wide

    @triton.jit
    def rounded_to_bf16(x):
        """The f32 tile x rounded to bf16, in float32: two values by three instructions."""
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=f,=f,f,f",
            [x],
            tl.float32,
            is_pure=True,
            pack=2,
        )

    @triton.jit
    def packed_product(x, y):
        """The rounded products of two bf16 or two f16 tiles, which their exact products in f32 round to as well."""
        # A product is a sum with -0: bf16 has had that instruction for longer than one of its own for products.
        if x.dtype == tl.bfloat16:
            product = tl.inline_asm_elementwise(
                "{ .reg .b32 c; mov.b32 c, 0x80008000; fma.rn.bf16x2 $0, $1, $2, c; }",
                "=r,r,r",
                [x, y],
                tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:
            product = tl.inline_asm_elementwise(
                "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.float16, is_pure=True, pack=2
            )
        return product

    @triton.jit
    def packed_sum(x, y):
        """The rounded sums of two bf16 or two f16 tiles; rounding them to f32 first would change nothing."""
        if x.dtype == tl.bfloat16:
            total = tl.inline_asm_elementwise(
                "{ .reg .b32 c; mov.b32 c, 0x3f803f80; fma.rn.bf16x2 $0, $1, c, $2; }",
                "=r,r,r",
                [x, y],
                tl.bfloat16,
                is_pure=True,
                pack=2,
            )
        else:
            total = tl.inline_asm_elementwise(
                "add.rn.f16x2 $0, $1, $2;", "=r,r,r", [x, y], tl.float16, is_pure=True, pack=2
            )
        return total

    # Activations: TO is the 16-bit type, by name, whose values x holds and to which the result is rounded. Where few and
    # approximate instructions give the same result for each of its 65536 values, they are taken; the tests compare them on
    # the device at hand. With None the result is in f32 that of ATen's kernels, which are compiled without fast math.

    @triton.jit
    def power_estimate(x):
        """2^x to some 22 bits, subnormal results flushed."""
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def reciprocal_estimate(x):
        """1 / x to one ulp, subnormal arguments and results flushed."""
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def over_one_plus_exp(y, x):
        """The correctly rounded y / (1 + exp(-x))."""
        divisor = 1.0 + libdevice.exp(-x)
        shift = tl.where(divisor > 1.2676506002282294e30, 5.421010862427522e-20, 1.0)
        divisor *= shift
        return corrected_product(y * shift, reciprocal_estimate(divisor), divisor, True)

    @triton.jit
    def silu(x, TO: tl.constexpr):
        """x / (1 + exp(-x)) of a f32 tile: ATen's silu_kernel on CUDA."""
        if TO == "bf16":
            active = x * sigmoid(x, TO)
        elif TO == "f16":
            # Constants found by search: with those of the formula, two values differ.
            power = power_estimate(fma_by(x, tl.full(x.shape, -1.4426950216293335, tl.float32), 3.9977785490918905e-06))
            active = x * reciprocal_estimate(fma_by(power, tl.full(x.shape, 0.9999972581863403, tl.float32), 1.0))
        else:
            active = over_one_plus_exp(x, x)
        return active

    @triton.jit
    def sigmoid(x, TO: tl.constexpr):
        """1 / (1 + exp(-x)) of a f32 tile: ATen's sigmoid_kernel on CUDA."""
        one = tl.full(x.shape, 1.0, tl.float32)
        if TO == "bf16":
            # Scaled, as instructions flush the subnormal reciprocals of large divisors.
            scale = tl.full(x.shape, 0.00390625, tl.float32)
            divisor = tl.fma(power_estimate(x * -1.4426950408889634), scale, scale)
            result = reciprocal_estimate(divisor) * 0.00390625
        elif TO == "f16":
            divisor = power_estimate(x * -1.4426950408889634) + 1.0
            result = corrected_product(one, reciprocal_estimate(divisor), divisor, True)
        else:
            result = over_one_plus_exp(one, x)
        return result

    @triton.jit
    def erf(x):
        """erff of CUDA 13's math library; Triton's libdevice is an older one, with other coefficients beyond 1."""
        magnitude = tl.abs(x)
        large = magnitude >= 1.002959966659546
        t = tl.where(large, magnitude, x * x)
        r = tl.where(large, 0.00011219871521461755, 8.483494457323104e-05)
        r = tl.fma(r, t, tl.where(large, -0.0013275252422317863, -0.0008213091641664505))
        r = tl.fma(r, t, tl.where(large, 0.00839653518050909, 0.005213488824665546))
        r = tl.fma(r, t, tl.where(large, -0.04024658352136612, -0.026868773624300957))
        r = tl.fma(r, t, tl.where(large, 0.15950430929660797, 0.11284004896879196))
        r = tl.fma(r, t, tl.where(large, 0.9129176735877991, -0.37612664699554443))
        r = tl.fma(r, t, tl.where(large, 0.6290600299835205, 0.12837915122509003))
        signed = tl.where(large, magnitude * -1.0, x)
        r = tl.fma(r, signed, signed)
        tail = 1.0 - power_estimate(r)
        return tl.where(large, tl.where(x < 0, tail * -1.0, tail), r)

    @triton.jit
    def fma_by(x, y, addend: tl.constexpr):
        return tl.fma(x, y, tl.full(x.shape, addend, tl.float32))

    @triton.jit
    def with_sign_of(x, y):
        """y with the sign of x."""
        return tl.inline_asm_elementwise("copysign.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def times_upper(x, a, tail):
        """x * (1 + f) / 2 of an odd function f, from a = |x| and (1 - |f|) / 2, with the rounding error of f.

        Its negative is what is summed: for x below zero whose f is -1, the sum vanishes, which makes +0, and x * 0 is -0.
        """
        return tl.fma(a, (0.5 - tail) * -1.0, x * -0.5) * -1.0

    @triton.jit
    def gelu(x, TO: tl.constexpr):
        """x / 2 * (1 + erf(x / sqrt(2))) of a f32 tile: ATen's GeluCUDAKernelImpl."""
        if TO is not None and NEWER_ERF:
            a = magnitude(x)
            active = times_upper(x, a, power_estimate(logarithm_of_tail(a, TO)))
        else:
            scaled = x * 0.7071067811865476
            if NEWER_ERF:
                error = erf(scaled)
            else:
                error = libdevice.erf(scaled)
            active = x * 0.5 * (1.0 + error)
        return active

    @triton.jit
    def logarithm_of_tail(a, TO: tl.constexpr):
        """log2((1 - erf(a / sqrt(2))) / 2) by weighted least squares, from 1.42 on as CUDA's erff has it, whose error shows
        in the difference.
        """
        if TO == "bf16":
            r = tl.full(a.shape, -4.5546977389676613e-07, tl.float32)
            r = fma_by(r, a, 5.323241225596576e-07)
            r = fma_by(r, a, 6.69337241561152e-05)
            r = fma_by(r, a, -0.0009846100583672523)
            r = fma_by(r, a, 0.008619166910648346)
            r = fma_by(r, a, -0.05402742698788643)
            r = fma_by(r, a, -0.45848628878593445)
            r = fma_by(r, a, -1.1512229442596436)
            r = fma_by(r, a, -1.0)
        else:
            r = tl.full(a.shape, -3.504343837335e-08, tl.float32)
            r = fma_by(r, a, 1.1483080015750602e-06)
            r = fma_by(r, a, -1.585711470397655e-05)
            r = fma_by(r, a, 0.00011210993397980928)
            r = fma_by(r, a, -0.0004131635942030698)
            r = fma_by(r, a, 0.00027730269357562065)
            r = fma_by(r, a, 0.006622667424380779)
            r = fma_by(r, a, -0.052236467599868774)
            r = fma_by(r, a, -0.4592825472354889)
            r = fma_by(r, a, -1.1510977745056152)
            r = fma_by(r, a, -0.9999999403953552)
        return r

    @triton.jit
    def tanh(x):
        """tanhf of CUDA's math library, without its branch: a tile's values take both ways."""
        square = x * x
        r = fma_by(tl.full(x.shape, 0.01573968306183815, tl.float32), square, -0.05230396240949631)
        r = fma_by(fma_by(r, square, 0.13315297663211823), square, -0.33332768082618713)
        near_zero = tl.fma(r * square, x, x)
        tail = reciprocal_estimate(1.0 + power_estimate(magnitude(x) * 2.885390043258667))
        return tl.where(tl.abs(x) < 0.6000000238418579, near_zero, with_sign_of(x, 1.0 - 2.0 * tail))

    @triton.jit
    def gelu_tanh(x, TO: tl.constexpr):
        """x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 x^3))) of a f32 tile: ATen's GeluCUDAKernelImpl.

        The compiler of that kernel contracts the sum and the product with 0.044715 to one fma.
        """
        if TO == "bf16":
            # (1 - tanh(a)) / 2 = 1 / (1 + exp(2a)), with exp as a power of two.
            doubled = fma_by(x * x, tl.full(x.shape, 0.1029432395800235, tl.float32), 2.302208198144325) * x
            active = times_upper(x, magnitude(x), reciprocal_estimate(1.0 + power_estimate(magnitude(doubled))))
        elif TO == "f16":
            # The same by constants found by search: with those of the formula, three values differ.
            a = magnitude(x)
            doubled = fma_by(a * a, tl.full(x.shape, 0.10294322669506073, tl.float32), 2.302208185195923)
            power = power_estimate(fma_by(doubled, a, 1.3790781849820632e-05))
            tail = reciprocal_estimate(fma_by(power, tl.full(x.shape, 0.9999904632568359, tl.float32), 1.0))
            active = times_upper(x, a, tail)
        else:
            inner = tl.fma(x * x * x, tl.full(x.shape, 0.044715, tl.float32), x) * 0.7978845608028654
            active = x * 0.5 * (1.0 + tanh(inner))
        return active

    @triton.jit
    def times(x, y):
        """The rounded product, which no later addition is contracted with."""
        # libdevice.mul_rn would flush subnormals.
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def reciprocal_root(x, NORMAL: tl.constexpr):
        """CUDA's rsqrtf, which is the instruction that does not flush subnormals; where NORMAL says none come, the short one.

        tl.math.rsqrt and libdevice's flush them.
        """
        if NORMAL:
            r = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        else:
            r = tl.inline_asm_elementwise("rsqrt.approx.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
        return r

    @triton.jit
    def root(x):
        """The correctly rounded square root."""
        return tl.math.sqrt_rn(x)

    @triton.jit
    def nearest_even(x):
        """torch.round: the nearest integer, halves to even."""
        return libdevice.rint(x)

    @triton.jit
    def nearest_away(x):
        """The nearest integer, halves away from zero."""
        return libdevice.round(x)

    @triton.jit
    def ceiling(x):
        return libdevice.ceil(x)

    @triton.jit
    def floor(x):
        return libdevice.floor(x)

    @triton.jit
    def logarithm2(x):
        """torch.log2; ATen's kernels call the same function of the CUDA math library."""
        return libdevice.log2(x)

    @triton.jit
    def exponential2(x):
        """torch.exp2. libdevice's flushes subnormal results, CUDA's squares the root of those."""
        least = x < -126.0
        result = libdevice.exp2(tl.where(least, x * 0.5, x))
        return tl.where(least, result * result, result)

    @triton.jit
    def power_of_two(x):
        """torch.pow(2.0, x) of whole x, which is exact, other than exp2 of those below -126."""
        n = tl.clamp(x, -150.0, 128.0).to(tl.int32)
        subnormal = tl.where(n >= -149, 1 << tl.maximum(n + 149, 0) % 32, 0)
        power = tl.where(n >= -126, (n + 127) << 23, subnormal).to(tl.float32, bitcast=True)
        return tl.where(x == x, power, x)

    @triton.jit
    def integer(x):
        """x truncated to int32; NaN is zero."""
        return x.to(tl.int32)

    @triton.jit
    def add_squares(total, x):
        """``total``, if there is one, and the squares along the last axis of x, each added to those before it by one fma."""
        if x.shape[-1] == 1:
            x = tl.reshape(x, x.shape[:-1])
            total = x * x if total is None else tl.fma(x, x, total)
        else:
            even, odd = tl.split(tl.reshape(x, x.shape[:-1] + [x.shape[-1] // 2, 2]))  # noqa: RUF005  # Triton unpacks nothing.
            total = add_squares(add_squares(total, even), odd)
        return total

    @triton.jit
    def sum_of_squares(
        x,
        GROUP: tl.constexpr,
        N: tl.constexpr,
        WARPS: tl.constexpr,
        VECTOR: tl.constexpr,
        SEGMENT: tl.constexpr,
    ):
        """The sum of squares of each row of a (rows, groups, lanes) tile whose lanes beyond the row are zero.

        Where it is known which values a thread has, it adds them one after the other. Triton from 3.8 on would add them in a tree:
        more instructions, and loads that are of no use to it, of the weight, wait until it is through.
        """
        if WARPS is not None:
            by_warp = tl.sum(tl.sum(add_squares(None, in_warps(x, WARPS, VECTOR)), 0), 1)
            total = tl.full([1, 1, 1], 0.0, tl.float32) + over_warps(by_warp, WARPS, False)
        elif SEGMENT is not None:
            segments = tl.reshape(x, (1, x.shape[1] * x.shape[2] // SEGMENT, SEGMENT))
            total = tl.sum(add_squares(None, segments), 1)[:, None, None]
        else:
            total = tl.sum(tl.sum(x * x, 2, keep_dims=True), 1, keep_dims=True)
        return total

    @triton.jit
    def divide(y, s, ORDINARY: tl.constexpr):
        """The correctly rounded y / s, in the precision that codes need; s >= 0 broadcasts against y, |y| <= 2^20 s.

        With r the correctly rounded 1/s, ``q = y*r`` followed by one residual correction is the correctly rounded quotient
        (Markstein, IBM J. Res. Dev. 34(1), 1990) unless r or the residual leaves the normal range. The residual of a
        quotient from 2^-17 on, half the least code, is a multiple of 2^-40 ulp(s), so it is exact for s from 2^-80 on;
        lesser quotients give a zero code however they are rounded. The residual is formed as q*s - y and multiplied by
        -r so that a zero quotient keeps the sign of y.

        ORDINARY promises that s is from 2^-80 to 2^126, infinite or NaN. Other scales are brought nearer to 1 together
        with y: where that loses bits of y, the code is zero. With s zero y / s is y times infinity.
        """
        if not ORDINARY:
            up = tl.where(s < 8.673617379884035e-19, 1.2379400392853803e27, 1.0)
            shift = tl.where(s > 1.2676506002282294e30, 5.421010862427522e-20, up)
            s = s * shift
            y = y * shift
        # An infinite scale has r = 0: with 0 for s as well, the correction is a zero of the quotient's sign.
        finite = tl.where(s == float("inf"), 0.0, s)
        r = tl.broadcast_to(reciprocal(s, finite), y.shape)
        factor = tl.broadcast_to(finite, y.shape)
        corrected = corrected_product(y, r, factor, False)
        return corrected if ORDINARY else tl.where(s == 0.0, y * float("inf"), corrected)

    @triton.jit
    def reciprocal(s, finite):
        """The correctly rounded 1 / s, for s from 2^-80 to 2^126, infinite or NaN; ``finite`` is s, or 0 for an infinite one.

        One Newton step from the instruction's approximation, as CUDA's own __frcp_rn takes where no exponent is extreme.
        """
        r = reciprocal_estimate(s)
        return tl.fma(tl.fma(finite * -1.0, r, tl.full(s.shape, 1.0, tl.float32)), r, r)

    @triton.jit
    def corrected_product(y, r, s, INFINITE: tl.constexpr):
        """q = y*r with one correction by its residual as a quotient of y and s.

        INFINITE says that y or s may be: the residual is then NaN, and a large number instead of it changes nothing.
        In PTX, as negations are free in it: Triton's are differences from 0, which do not flip the sign of zero.
        """
        BOUNDED: tl.constexpr = "min.f32 e, e, 0f7149f2ca;" if INFINITE else ""
        return tl.inline_asm_elementwise(
            """
            {
                .reg .f32 q, e, t;
                mul.rn.f32 q, $1, $2;
                neg.f32 t, $1;
                fma.rn.f32 e, q, $3, t;
            """
            + BOUNDED
            + """
                neg.f32 t, $2;
                fma.rn.f32 $0, e, t, q;
            }
            """,
            "=f,f,f,f",
            [y, r, s],
            tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def int8_nearest_even(q, LOW: tl.constexpr, HIGH: tl.constexpr):
        """The f32 tile q rounded to integers, halves to even, from LOW <= 0 to HIGH >= 0, as int8; NaN gives 0.

        A sum with 1.5 * 2^23 has the rounded integer in its low bits; instructions that round or convert issue at an eighth
        of the rate. Of NaN, a saturating product makes 0.
        """
        share = tl.inline_asm_elementwise(
            "{ .reg .f32 a; abs.f32 a, $1; mul.rn.sat.f32 $0, a, 0f3c000000; }",
            "=f,f",
            [q],
            tl.float32,
            is_pure=True,
            pack=1,
        )
        if LOW == -HIGH:
            share = with_sign_of(q, tl.minimum(share, HIGH / 128))
        else:
            share = tl.clamp(with_sign_of(q, share), LOW / 128, HIGH / 128)
        whole = fma_by(share, tl.full(q.shape, 128.0, tl.float32), 12582912.0)
        return whole.to(tl.int32, bitcast=True).to(tl.int8)

    @triton.jit
    def unbounded_int8(q, kept):
        """As :func:`int8_nearest_even` for |q| < 128 where kept, which broadcasts against q, and zero elsewhere."""
        mask = tl.broadcast_to(tl.where(kept, -1, 0), q.shape)
        return tl.inline_asm_elementwise(
            "{ .reg .f32 a, b, c, d; .reg .b32 low, high; "
            "add.rn.f32 a, $1, 0f4B400000; add.rn.f32 b, $2, 0f4B400000; "
            "add.rn.f32 c, $3, 0f4B400000; add.rn.f32 d, $4, 0f4B400000; "
            "prmt.b32 low, a, b, 0x0040; prmt.b32 high, c, d, 0x0040; "
            "prmt.b32 low, low, high, 0x5410; and.b32 $0, low, $5; }",
            "=r,f,f,f,f,r,r,r,r",
            [q, mask],
            tl.int8,
            is_pure=True,
            pack=4,
        )

    @triton.jit
    def magnitude(x):
        """|x|, which tl.abs leaves to an instruction of its own where x is what inline assembly returned."""
        return tl.inline_asm_elementwise("abs.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)

    @triton.jit
    def half_f16(pair, HALF: tl.constexpr):
        """The f16 in the ``low`` or the ``high`` half, in float32."""
        return tl.inline_asm_elementwise(
            "{ .reg .b16 low, high; mov.b32 {low, high}, $1; cvt.f32.f16 $0, " + HALF + "; }",
            "=f,r",
            [pair],
            tl.float32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def greater_magnitudes_bf16(a, b):
        """Of two pairs of bf16 the greater magnitudes, with signs that mean nothing; NaN if either is."""
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.bf16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def greater_magnitudes_f16(a, b):
        """As :func:`greater_magnitudes_bf16`."""
        return tl.inline_asm_elementwise(
            "max.NaN.xorsign.abs.f16x2 $0, $1, $2;", "=r,r,r", [a, b], tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def pair_of(first, second):
        """Two tiles of 16-bit values as one of int32, the first in the low half."""
        return tl.inline_asm_elementwise(
            "mov.b32 $0, {$1, $2};", "=r,h,h", [first, second], tl.int32, is_pure=True, pack=1
        )

    @triton.jit
    def greatest_magnitudes(pairs, AXIS: tl.constexpr, F16: tl.constexpr):
        """The greatest magnitudes of pairs along AXIS, as pairs with signs that mean nothing; NaN if any is."""
        if F16:
            found = tl.reduce(pairs, AXIS, greater_magnitudes_f16)
        else:
            found = tl.reduce(pairs, AXIS, greater_magnitudes_bf16)
        return found

    @triton.jit
    def amax_of_pairs(pairs, F16: tl.constexpr):
        """The amax, in float32, of each group of a (rows, groups, pairs) tile: of four pairs, which a thread has, then of all."""
        fours = tl.reshape(pairs, (pairs.shape[0], pairs.shape[1], pairs.shape[2] // 4, 4))
        found = greatest_magnitudes(fours, 3, F16)
        larger = greater(magnitude(low(found, F16)), magnitude(high(found, F16)))
        return tl.max(larger.to(tl.int32, bitcast=True), 2, keep_dims=True).to(tl.float32, bitcast=True)

    @triton.jit
    def amax_by_thread(pairs, F16: tl.constexpr):
        """The amax, in float32, that each thread has of pairs by pieces, warps, threads and vectors."""
        found = greatest_magnitudes(greatest_magnitudes(pairs, 0, F16), 2, F16)
        return greater(magnitude(low(found, F16)), magnitude(high(found, F16)))

    @triton.jit
    def amax(x, AXIS: tl.constexpr):
        """max(|x|) of a f32 tile along AXIS, kept as an axis of one. NaN if any value is, as torch.amax."""
        return tl.reduce(magnitude(x), AXIS, greater, keep_dims=True)

    @triton.jit
    def in_warps(x, WARPS: tl.constexpr, MOST: tl.constexpr):
        """A tile of one row as (pieces, warps, threads, vectors of MOST), the way a load of it distributes its values."""
        VALUES: tl.constexpr = x.shape[1] * x.shape[2]
        VECTOR: tl.constexpr = min(VALUES // (32 * WARPS), MOST)
        return tl.reshape(x, (VALUES // (32 * WARPS * VECTOR), WARPS, 32, VECTOR))

    @triton.jit
    def over_warps(by_warp, WARPS: tl.constexpr, LARGEST: tl.constexpr):
        """The sum or the LARGEST of one value per warp: each thread reads all, one exchange where tl.reduce takes two."""
        if WARPS == 1:
            value = tl.sum(by_warp, 0)
        else:
            even, odd = tl.split(tl.reshape(by_warp, (WARPS // 2, 2)))
            if LARGEST:
                value = over_warps(greater(even, odd), WARPS // 2, LARGEST)
            else:
                value = over_warps(even + odd, WARPS // 2, LARGEST)
        return value

    @triton.jit
    def whole_amax(x, WARPS: tl.constexpr, VECTOR: tl.constexpr):
        """max(|x|), in float32, of each row of a (rows, 1, lanes) tile."""
        if WARPS is None:
            peak = amax(widened(x), 2)
        else:
            if in_16_bits(x.dtype):
                by_thread = amax_by_thread(in_warps(in_pairs(x), WARPS, VECTOR // 2), x.dtype == tl.float16)
            else:
                by_thread = tl.reduce(tl.reduce(in_warps(magnitude(x), WARPS, VECTOR), 0, greater), 2, greater)
            # Magnitudes order as their bits, NaN above infinity; across a warp, integers take one instruction.
            by_warp = tl.max(by_thread.to(tl.int32, bitcast=True), 1).to(tl.float32, bitcast=True)
            peak = tl.full([1, 1, 1], 0.0, tl.float32) + over_warps(by_warp, WARPS, True)
        return peak


@triton.jit
def in_pairs(x):
    """A (rows, groups, lanes) tile of 16-bit values as int32, neighbours along the last axis in pairs."""
    first, second = tl.split(tl.reshape(x, (x.shape[0], x.shape[1], x.shape[2] // 2, 2)))
    return pair_of(first, second)


@triton.jit
def low(pair, F16: tl.constexpr):
    """The first of each pair, in float32."""
    if F16:
        value = half_f16(pair, "low")
    else:
        value = (pair << 16).to(tl.float32, bitcast=True)
    return value


@triton.jit
def high(pair, F16: tl.constexpr):
    """The second of each pair, in float32."""
    if F16:
        value = half_f16(pair, "high")
    else:
        value = (pair & -65536).to(tl.float32, bitcast=True)
    return value


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.constexpr_function
def in_16_bits(dtype):
    return dtype in (tl.bfloat16, tl.float16)


@triton.jit
def round_to(x, ROUNDING: tl.constexpr):
    """The f32 tile x rounded as a store to the given type and a load back would: f32, bf16 or f16 by name."""
    if ROUNDING == "bf16" and x.shape[2] > 1:
        x = rounded_to_bf16(x)
    else:
        # One value per row is no pair.
        x = cast(rounded(x, ROUNDING), tl.float32)
    return x


@triton.jit
def rounded(x, ROUNDING: tl.constexpr):
    """As :func:`round_to`, but left in 16 bits where x is rounded to those."""
    if ROUNDING == "bf16":
        x = cast(x, tl.bfloat16)
    elif ROUNDING == "f16":
        x = cast(x, tl.float16)
    return x


@triton.constexpr_function
def rounds_to(rounding, dtype):
    """Whether a rounding is to that dtype of 16 bits."""
    return dtype == {"bf16": tl.bfloat16, "f16": tl.float16}.get(rounding)


@triton.jit
def rounded_product(x, y, X_ROUNDING: tl.constexpr, ROUNDING: tl.constexpr):
    """The f32 tile x, rounded, times y of any dtype, rounded; two at a time, and left in 16 bits, where both are rounded to y's."""
    if X_ROUNDING == ROUNDING and rounds_to(ROUNDING, y.dtype):
        product = packed_product(cast(x, y.dtype), tl.broadcast_to(y, x.shape))
    else:
        product = rounded(round_to(x, X_ROUNDING) * cast(y, tl.float32), ROUNDING)
    return product


@triton.jit
def cast_overflowing(q, LARGEST: tl.constexpr, OVERFLOW: tl.constexpr, dtype: tl.constexpr):
    """The f32 tile q in an fp8 dtype, magnitudes above LARGEST becoming the code OVERFLOW with the sign of q."""
    bits = cast(q, dtype).to(tl.uint8, bitcast=True)
    sign = ((q.to(tl.int32, bitcast=True) >> 24) & 0x80).to(tl.uint8)
    return tl.where(tl.abs(q) > LARGEST, sign | OVERFLOW, bits).to(tl.uint8).to(dtype, bitcast=True)


@triton.jit
def cast_fnuz(q, OVERFLOW: tl.constexpr):
    """The codes of q in e4m3fnuz, which not every Triton backend knows, as bytes.

    They are e4m3fn codes of 2q, but for magnitudes that only e4m3fnuz has, its only zero, and its only NaN, 0x80.
    """
    doubled = q * 2.0
    magnitude = tl.abs(doubled)
    bits = cast(tl.minimum(magnitude, 448.0), tl.float8e4nv).to(tl.uint8, bitcast=True).to(tl.int32)
    # 480 = 2 * 240 lies beyond e4m3fn's largest code; the tie between them goes to the even one below.
    bits = tl.where(magnitude > 464.0, 0x7F, bits)
    if OVERFLOW is not None:
        bits = tl.where(magnitude >= 496.0, OVERFLOW, bits)
    sign = (q.to(tl.int32, bitcast=True) >> 24) & 0x80
    signed = tl.where(bits == 0, 0, sign | bits)
    return tl.where((q != q) | (bits == 0x80), 0x80, signed).to(tl.uint8)


@triton.jit
def e2m1_code(v, TIES: tl.constexpr, SIGN: tl.constexpr, NAN_CODE: tl.constexpr):
    """The four bits, as int32, of the E2M1 value next to the f32 ``v``; magnitudes above 6 give 6.

    From 1 on, rounding is an addition to the bits that carries into what is kept: two exponent bits, one mantissa bit.
    Below 1 the values 0, 0.5 and 1 are one step apart, so that the two midpoints are compared with.
    """
    bits = v.to(tl.int32, bitcast=True)
    unsigned = bits & 0x7FFFFFFF
    magnitude = tl.minimum(unsigned, 0x40C00000)
    if TIES == "away":
        half = 0x200000
    elif TIES == "even":
        half = 0x1FFFFF + ((magnitude >> 22) & 1)
    else:
        half = 0x1FFFFF
    normal = ((magnitude + half) >> 22) - 252
    # Midpoints .25, between codes 0 and 1, and .75, between 1 and 2; one bit more where the tie goes down.
    quarter: tl.constexpr = 0x3E800000 if TIES == "away" else 0x3E800001
    three_quarters: tl.constexpr = 0x3F400001 if TIES == "toward_zero" else 0x3F400000
    small = (magnitude >= quarter).to(tl.int32) + (magnitude >= three_quarters).to(tl.int32)
    code = tl.where(magnitude < 0x3F800000, small, normal)
    if SIGN == "kept":
        code |= (bits >> 28) & 8
    elif SIGN == "negative":
        code |= tl.where(v < 0, 8, 0)
    else:
        code |= tl.where((v < 0) & (code != 0), 8, 0)
    return tl.where(unsigned > 0x7F800000, NAN_CODE, code)


@triton.constexpr_function
def named(constants, name):
    """The value of ``name`` in a text of JSON.

    In lower case: Triton's attributes are texts of capital letters, which Inductor's analysis of kernels looks for in every text.
    """
    import json

    return json.loads(constants)[name]


@triton.jit
def pack_nibbles(low, high):
    """Codes of four bits as bytes, ``low`` in the low nibble."""
    return (low | (high << 4)).to(tl.uint8)


if INTERPRETED:

    @triton.jit
    def e2m1_nearest_even(low, high, NAN_CODE: tl.constexpr):
        return pack_nibbles(e2m1_code(low, "even", "kept", NAN_CODE), e2m1_code(high, "even", "kept", NAN_CODE))

else:

    @triton.jit
    def e2m1_magnitude(v, NAN_CODE: tl.constexpr):
        """The code next to |v|, halves to even, in the low bits of an int32.

        A code is the integer next to the least of 2v, v + 2 and v / 2 + 4, at most 7: these lines meet where the step between
        E2M1 values doubles. A float32 sum of 2^23 or more is rounded to an integer, and orders as its bits: NaN above all,
        unless a maximum with what the third line is at least takes its place.
        """
        tl.static_assert(NAN_CODE == 7 or NAN_CODE == 4)
        KEEP: tl.constexpr = "" if NAN_CODE == 7 else "max.f32 c, c, 0f4B000004;"
        return tl.inline_asm_elementwise(
            """
            {
                .reg .f32 v;
                .reg .b32 a, b, c;
                abs.f32 v, $1;
                fma.rn.f32 a, v, 0f40000000, 0f4B000000;
                add.rn.f32 b, v, 0f4B000002;
                fma.rn.f32 c, v, 0f3F000000, 0f4B000004;
            """
            + KEEP
            + """
                min.s32 a, a, b;
                min.s32 a, a, c;
                min.s32 $0, a, 0x4B000007;
            }
            """,
            "=r,f",
            [v],
            tl.int32,
            is_pure=True,
            pack=1,
        )

    @triton.jit
    def e2m1_nearest_even(low, high, NAN_CODE: tl.constexpr):
        """Bytes of the E2M1 values next to two f32 tiles, halves to even, signs kept; NAN_CODE for a positive NaN."""
        pair = e2m1_magnitude(high, NAN_CODE) * 16 + e2m1_magnitude(low, NAN_CODE)
        low_sign = (low.to(tl.uint32, bitcast=True) >> 28) & 8
        high_sign = (high.to(tl.uint32, bitcast=True) >> 24) & 0x80
        return (pair | low_sign.to(tl.int32) | high_sign.to(tl.int32)).to(tl.uint8)


@triton.jit
def e2m1_bytes(v, CODES: tl.constexpr):
    """(ROWS, GROUPS, LANES) f32 values as (ROWS, GROUPS, LANES // 2) bytes, the even element in the low nibble."""
    TIES: tl.constexpr = named(CODES, "ties")
    SIGN: tl.constexpr = named(CODES, "sign")
    NAN_CODE: tl.constexpr = named(CODES, "nan_code")
    low, high = tl.split(tl.reshape(v, (v.shape[0], v.shape[1], v.shape[2] // 2, 2)))
    if TIES == "even" and SIGN == "kept" and (NAN_CODE == 7 or NAN_CODE == 4):
        code = e2m1_nearest_even(low, high, NAN_CODE)
    else:
        code = pack_nibbles(e2m1_code(low, TIES, SIGN, NAN_CODE), e2m1_code(high, TIES, SIGN, NAN_CODE))
    return code


@triton.jit
def codes(y, factor, CODES: tl.constexpr, dtype: tl.constexpr):
    """cast(clamp(round(y / factor))), or unless CODES divide cast(clamp(round(y * factor))); factor broadcasts against y.

    FP4 codes come in pairs, as bytes. In CODES, OVERFLOW None says that the cast saturates, or that the clamp leaves it
    nothing to saturate, and TIES None that the codes are not FP4.
    """
    if named(CODES, "divides"):
        q = divide(y, factor, named(CODES, "ordinary"))
    else:
        q = y * factor
    q = round_to(q, named(CODES, "quotient_rounding"))
    WHOLE: tl.constexpr = named(CODES, "whole")
    if WHOLE == "unbounded_int8":
        code = unbounded_int8(q, (factor > 0) & (factor < float("inf")))
    elif WHOLE == "int8":
        code = int8_nearest_even(q, named(CODES, "clamp_low"), named(CODES, "clamp"))
    else:
        code = rounded_code(q, WHOLE, CODES, dtype)
    return code


@triton.jit
def rounded_code(q, WHOLE: tl.constexpr, CODES: tl.constexpr, dtype: tl.constexpr):
    """The quotients q rounded to whole numbers where WHOLE says so, bounded, and cast."""
    if WHOLE == "nearest_even":
        q = nearest_even(q)
    elif WHOLE == "half_away":
        q = nearest_away(q)
    if named(CODES, "adds_zero"):
        q = tl.where(q == 0.0, 0.0, q)
    if named(CODES, "clamp") is not None:
        q = tl.clamp(q, named(CODES, "clamp_low"), named(CODES, "clamp"), propagate_nan=tl.PropagateNan.ALL)
    OVERFLOW: tl.constexpr = named(CODES, "overflow")
    TIES: tl.constexpr = named(CODES, "ties")
    if TIES is not None:
        code = e2m1_bytes(q, CODES)
    elif dtype == tl.uint8:
        code = cast_fnuz(q, OVERFLOW)
    elif OVERFLOW is not None:
        code = cast_overflowing(q, named(CODES, "largest"), OVERFLOW, dtype)
    else:
        code = cast(q, dtype)
    return code
