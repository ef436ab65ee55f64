"""The kernel: prologue, quantizer and scale layout in one read of the input and one write of the codes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    amax,
    cast,
    codes,
    gelu,
    gelu_tanh,
    greater_amax,
    is_hopper,
    pack_nibbles,
    reciprocal_root,
    root,
    round_to,
    rounded_product,
    sigmoid,
    silu,
    silu_of_bf16,
    sum_of_squares,
    times,
)
from .scale_program import evaluate


@triton.jit
def load(ptr, offsets, mask):
    return cast(tl.load(ptr + offsets, mask, other=0.0), tl.float32)


@triton.constexpr_function
def piece_count(pieces):
    return pieces.count(";") + 1


@triton.constexpr_function
def piece_number(pieces, piece, index):
    return int(pieces.split(";")[piece].split(",")[index])


@triton.jit
def places(PIECES: tl.constexpr, PIECE: tl.constexpr, N: tl.constexpr, GROUP: tl.constexpr):
    """The groups and columns of a piece of the program's tile, (1, groups, lanes), and which columns there are."""
    first: tl.constexpr = piece_number(PIECES, PIECE, 0)
    count: tl.constexpr = piece_number(PIECES, PIECE, 1)
    groups = (tl.program_id(1) * count + first + tl.arange(0, count))[None, :, None]
    lanes = (piece_number(PIECES, PIECE, 2) + tl.arange(0, piece_number(PIECES, PIECE, 3)))[None, None, :]
    columns = groups * GROUP + lanes
    return groups, columns, (lanes < GROUP) & (columns < N)


@triton.jit
def mean_of_squares(squares, M, N: tl.constexpr, MEAN: tl.constexpr):
    if MEAN == "divide":
        mean = tl.math.div_rn(squares, tl.full(squares.shape, N, tl.float32))
    elif MEAN == "scalar":
        mean = times(
            squares, tl.math.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.full(squares.shape, N, tl.float32))
        )
    else:
        # ATen's mean on CUDA multiplies by float(outputs) / float(elements).
        outputs = tl.full(squares.shape, M, tl.int64)
        mean = times(squares, tl.math.div_rn(outputs.to(tl.float32), (outputs * N).to(tl.float32)))
    return mean


@triton.jit
def root_factor(variance, ROOT: tl.constexpr, ROOT_ROUNDING: tl.constexpr):
    """What x is multiplied with, or with ROOT ``divide_sqrt`` divided by."""
    if ROOT == "rsqrt":
        factor = round_to(reciprocal_root(variance), ROOT_ROUNDING)
    elif ROOT == "reciprocal_sqrt":
        factor = tl.math.div_rn(tl.full(variance.shape, 1.0, tl.float32), root(variance))
    else:
        factor = root(variance)
    return factor


@triton.jit
def normalized(
    x,
    factor,
    weight_ptr,
    columns,
    inside,
    ROOT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    INNER_ROUNDING: tl.constexpr,
    PRODUCT_ROUNDING: tl.constexpr,
):
    """x over its root mean square, times weight, rounded where the spec says."""
    if ROOT == "divide_sqrt":
        x = tl.math.div_rn(x, tl.broadcast_to(factor, x.shape))
    else:
        x *= factor
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + columns, inside, other=0.0)
        if ONE_PLUS:
            weight = cast(weight, tl.float32) + 1.0
        x = rounded_product(x, weight, INNER_ROUNDING, PRODUCT_ROUNDING)
    else:
        x = round_to(round_to(x, INNER_ROUNDING), PRODUCT_ROUNDING)
    return x


@triton.jit
def gated_activation(
    gate,
    up,
    OF_BF16: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    SIGMOID_ROUNDING: tl.constexpr,
    INNER_ROUNDING: tl.constexpr,
    PRODUCT_ROUNDING: tl.constexpr,
):
    """activation(gate) * up, bounded, shifted and rounded where the spec says; gate is f32, and OF_BF16 if it was bf16."""
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    if ACTIVATION == "silu" and OF_BF16 and INNER_ROUNDING == "bf16":
        active = silu_of_bf16(gate)
    elif ACTIVATION == "silu":
        active = silu(gate)
    elif ACTIVATION == "sigmoid_product":
        scaled = gate
        if ALPHA != 1.0:
            scaled = round_to(gate * ALPHA, SIGMOID_ROUNDING)
        active = gate * round_to(sigmoid(scaled), SIGMOID_ROUNDING)
    elif ACTIVATION == "sigmoid":
        active = sigmoid(gate)
    elif ACTIVATION == "gelu":
        active = gelu(gate)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        active = gelu_tanh(gate)
    if up is not None:
        if LIMIT is not None or OFFSET != 0.0:
            up = cast(up, tl.float32)
        if LIMIT is not None:
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if OFFSET != 0.0:
            up = round_to(up + OFFSET, SIGMOID_ROUNDING)
        active = rounded_product(active, up, INNER_ROUNDING, PRODUCT_ROUNDING)
    else:
        active = round_to(active, PRODUCT_ROUNDING)
    return active


@triton.jit
def scale_address(rows, groups, scale_rows, GROUPS, LAYOUT: tl.constexpr):
    """Where scales lie, as fusion_pass.addresses has it, in consecutive matrices of ``scale_rows`` rows."""
    matrix = rows // scale_rows
    m = rows - matrix * scale_rows
    if LAYOUT == "column":
        at = (matrix * GROUPS + groups) * scale_rows + m
    elif LAYOUT == "tma":
        at = (matrix * GROUPS + groups) * ((scale_rows + 3) // 4 * 4) + m
    elif LAYOUT == "packed":
        words = (GROUPS + 3) // 4
        at = ((matrix * words + groups // 4) * ((scale_rows + 3) // 4 * 4) + m) * 4 + groups % 4
    elif LAYOUT == "blocked":
        tiles = (GROUPS + 3) // 4
        tile = (matrix * ((scale_rows + 127) // 128) + m // 128) * tiles + groups // 4
        at = tile * 512 + m % 32 * 16 + m % 128 // 32 * 4 + groups % 4
    else:
        tl.static_assert(LAYOUT == "shuffled")
        columns = (GROUPS + 7) // 8 * 8
        strip = (matrix * ((scale_rows + 31) // 32) + m // 32) * 32 * columns
        at = strip + groups // 8 * 256 + groups % 4 * 64 + m % 16 * 4 + groups % 8 // 4 * 2 + m % 32 // 16
    return at


@triton.jit
def fused_quant_kernel(
    x_ptr,
    other_ptr,
    weight_ptr,
    given_ptr,
    amax_ptr,
    code_ptr,
    scale_ptr,
    sum_ptr,
    value_ptr,
    M,
    scale_rows,
    x_stride,
    other_stride,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    PIECES: tl.constexpr,
    PROLOGUE: tl.constexpr,
    EPS: tl.constexpr,
    MEAN: tl.constexpr,
    ROOT: tl.constexpr,
    ONE_PLUS: tl.constexpr,
    ROOT_ROUNDING: tl.constexpr,
    GATE: tl.constexpr,
    GATED_ROUNDING: tl.constexpr,
    SUM_ROUNDING: tl.constexpr,
    INNER_ROUNDING: tl.constexpr,
    PRODUCT_ROUNDING: tl.constexpr,
    ACTIVATION: tl.constexpr,
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    OFFSET: tl.constexpr,
    SIGMOID_ROUNDING: tl.constexpr,
    PEAK: tl.constexpr,
    PROGRAM: tl.constexpr,
    DIVIDES: tl.constexpr,
    ORDINARY: tl.constexpr,
    QUOTIENT_ROUNDING: tl.constexpr,
    WHOLE: tl.constexpr,
    ADDS_ZERO: tl.constexpr,
    CLAMP_LOW: tl.constexpr,
    CLAMP: tl.constexpr,
    LARGEST: tl.constexpr,
    OVERFLOW: tl.constexpr,
    TIES: tl.constexpr,
    SIGN: tl.constexpr,
    NAN_CODE: tl.constexpr,
    LAYOUT: tl.constexpr,
):
    """One program: a tile of ROWS rows, in pieces of groups x lanes; a norm or an amax per row needs whole rows.

    x and other: (M, N), rows at ``x_stride`` and ``other_stride``; other is a norm's residual or an activation's up half.
    weight: (N,). given: a scalar. code, sum, value: (M, N) contiguous, FP4 codes in pairs: (M, N // 2). scale:
    (M, N // GROUP), or consecutive matrices in LAYOUT, each for ``scale_rows`` rows; one value if a tensor shares it. Absent
    tensors and what goes with them are None.

    PIECES: ``first group, groups, first lane, lanes`` of each, powers of two for the counts: a row that is none itself
    wastes few lanes in pieces.

    PEAK says where the amax comes from: each ``group`` of the tile; each ``row``; ``none`` is needed; or one that the whole
    tensor shares, in two launches: the first adds its tiles to it (``store``) and writes no codes, the second reads it
    (``load``).
    """
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    there = rows < M
    COUNT: tl.constexpr = piece_count(PIECES)
    # Where the approximate instructions were tested.
    OF_BF16: tl.constexpr = x_ptr.dtype.element_ty == tl.bfloat16 and is_hopper()

    xs = ()
    for piece in tl.static_range(COUNT):
        _, columns, inside = places(PIECES, piece, N, GROUP)
        x = load(x_ptr, rows * x_stride + columns, there & inside)
        if PROLOGUE == "norm" and GATE is None and other_ptr is not None:
            x += load(other_ptr, rows * other_stride + columns, there & inside)
            if sum_ptr is not None:
                tl.store(sum_ptr + rows * N + columns, cast(x, sum_ptr.dtype.element_ty), there & inside)
            x = round_to(x, SUM_ROUNDING)
        xs = xs + (x,)  # noqa: RUF005

    if PROLOGUE == "norm":
        squares = sum_of_squares(xs[0], GROUP, N)
        for piece in tl.static_range(1, COUNT):
            squares += sum_of_squares(xs[piece], GROUP, N)
        norm_factor = root_factor(mean_of_squares(squares, M, N, MEAN) + EPS, ROOT, ROOT_ROUNDING)

    ys = ()
    for piece in tl.static_range(COUNT):
        _, columns, inside = places(PIECES, piece, N, GROUP)
        y = xs[piece]
        if PROLOGUE == "norm":
            y = normalized(
                y, norm_factor, weight_ptr, columns, inside, ROOT, ONE_PLUS, INNER_ROUNDING, PRODUCT_ROUNDING
            )
            if GATE is not None:
                gate = load(other_ptr, rows * other_stride + columns, there & inside)
                y = round_to(y * (silu(gate) if GATE == "silu" else sigmoid(gate)), GATED_ROUNDING)
        if PROLOGUE == "gated":
            up = None
            if other_ptr is not None:
                up = tl.load(other_ptr + rows * other_stride + columns, there & inside, other=0.0)
            y = gated_activation(
                y, up, OF_BF16, ACTIVATION, ALPHA, LIMIT, OFFSET, SIGMOID_ROUNDING, INNER_ROUNDING, PRODUCT_ROUNDING
            )
        if value_ptr is not None:
            tl.store(value_ptr + rows * N + columns, cast(y, value_ptr.dtype.element_ty), there & inside)
        ys = ys + (y,)  # noqa: RUF005

    shared = tl.full([1, 1, 1], 0.0, tl.float32)
    if PEAK == "row":
        shared = amax(ys[0], 2)
        for piece in tl.static_range(1, COUNT):
            shared = greater_amax(shared, amax(ys[piece], 2))
    elif PEAK == "load":
        shared += tl.load(amax_ptr).to(tl.float32, bitcast=True)
    given = tl.full([1, 1, 1], 0.0, tl.float32)
    if given_ptr is not None:
        given += tl.load(given_ptr).to(tl.float32)

    for piece in tl.static_range(COUNT):
        groups, columns, inside = places(PIECES, piece, N, GROUP)
        y = ys[piece]
        if PEAK == "store":
            bits = tl.max(amax(tl.where(there & inside, y, 0.0), 2).to(tl.int32, bitcast=True), 1)
            tl.atomic_max(amax_ptr, tl.max(tl.max(bits, 1), 0))
        else:
            peak = amax(y, 2) if PEAK == "group" else shared
            factor, scale = evaluate(peak, tl.broadcast_to(given, peak.shape), PROGRAM)
            present = there & (groups < N // GROUP)
            if PEAK == "group" or PEAK == "row":
                # The lanes of absent rows and groups must not send the tile's quotients the slow way.
                factor = tl.where(present, factor, 1.0)
            code = codes(
                y,
                factor,
                DIVIDES,
                ORDINARY,
                QUOTIENT_ROUNDING,
                WHOLE,
                ADDS_ZERO,
                CLAMP_LOW,
                CLAMP,
                LARGEST,
                OVERFLOW,
                TIES,
                SIGN,
                NAN_CODE,
                code_ptr.dtype.element_ty,
            )
            if TIES is None:
                tl.store(code_ptr + rows * N + columns, code, there & inside)
            else:
                pairs = tl.arange(0, piece_number(PIECES, piece, 3) // 2)[None, None, :]
                at = rows * (N // 2) + groups * (GROUP // 2) + pairs
                tl.store(code_ptr + at, pack_nibbles(code), present & (pairs < GROUP // 2))
            if scale_ptr is not None and (PEAK == "group" or piece == 0):
                if PEAK != "group" and PEAK != "row":
                    at = tl.full([1, 1, 1], 0, tl.int32)
                    present = at == tl.program_id(0) + tl.program_id(1)
                elif LAYOUT == "row":
                    at = rows * (N // GROUP) + groups
                else:
                    at = scale_address(rows, groups, scale_rows, N // GROUP, LAYOUT)
                tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), present)
