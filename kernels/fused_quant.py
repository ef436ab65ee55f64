"""The kernel: prologue, quantizer and scale layout in one read of the input and one write of the codes."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import (
    amax,
    amax_of_pairs,
    cast,
    codes,
    divide,
    gelu,
    gelu_tanh,
    in_pairs,
    named,
    packed_sum,
    reciprocal_root,
    root,
    round_to,
    rounded,
    rounded_product,
    rounds_to,
    sigmoid,
    silu,
    sum_of_squares,
    times,
    whole_amax,
    widened,
    widened_after,
)
from .e2m1_pairs import e2m1_word
from .scale_program import evaluate
from .tiles import inside_row, load_tile, vector_of, vectors_of_segments, within


@triton.jit
def mean_of_squares(squares, M, N: tl.constexpr, MEAN: tl.constexpr, INLINE: tl.constexpr):
    """The mean of N squares as MEAN says. INLINE, that of ATen's kernels takes no call, which quotients of uncommon operands take else."""
    if INLINE and N & (N - 1) == 0:
        # Each way is this product then, even where M * N is rounded.
        mean = times(squares, tl.full(squares.shape, 1.0 / N, tl.float32))
    elif MEAN == "divide":
        mean = tl.math.div_rn(squares, tl.full(squares.shape, N, tl.float32))
    elif MEAN == "scalar":
        mean = times(
            squares, tl.math.div_rn(tl.full(squares.shape, 1.0, tl.float32), tl.full(squares.shape, N, tl.float32))
        )
    else:
        # ATen's mean on CUDA multiplies by float(outputs) / float(elements).
        outputs = tl.full(squares.shape, M, tl.int64)
        elements = (outputs * N).to(tl.float32)
        if INLINE:
            mean = times(squares, divide(outputs.to(tl.float32), elements, True))
        else:
            mean = times(squares, tl.math.div_rn(outputs.to(tl.float32), elements))
    return mean


@triton.jit
def root_factor(variance, PROLOGUE: tl.constexpr):
    """What x is multiplied with, or with ROOT ``divide_sqrt`` divided by."""
    ROOT: tl.constexpr = named(PROLOGUE, "root")
    if ROOT == "rsqrt":
        factor = round_to(reciprocal_root(variance, named(PROLOGUE, "eps") >= 1e-37), named(PROLOGUE, "root_rounding"))
    elif ROOT == "reciprocal_sqrt":
        factor = tl.math.div_rn(tl.full(variance.shape, 1.0, tl.float32), root(variance))
    else:
        factor = root(variance)
    return factor


@triton.jit
def normalized(x, factor, weight, PROLOGUE: tl.constexpr):
    """x over its root mean square, times weight, rounded where the spec says; of the product's 16 bits or in float32."""
    INNER_ROUNDING: tl.constexpr = named(PROLOGUE, "inner_rounding")
    PRODUCT_ROUNDING: tl.constexpr = named(PROLOGUE, "product_rounding")
    if named(PROLOGUE, "root") == "divide_sqrt":
        x = tl.math.div_rn(x, tl.broadcast_to(factor, x.shape))
    else:
        x *= factor
    if weight is not None:
        if named(PROLOGUE, "one_plus"):
            weight = rounded(cast(weight, tl.float32) + 1.0, named(PROLOGUE, "weight_rounding"))
        x = rounded_product(x, weight, INNER_ROUNDING, PRODUCT_ROUNDING)
    else:
        x = rounded(round_to(x, INNER_ROUNDING), PRODUCT_ROUNDING)
    return x


@triton.jit
def gated_activation(gate, up, OF: tl.constexpr, PROLOGUE: tl.constexpr):
    """activation(gate) * up, bounded, shifted and rounded where the spec says; of the product's 16 bits or in float32.

    gate is in float32, with values of the dtype OF.
    """
    ACTIVATION: tl.constexpr = named(PROLOGUE, "activation")
    LIMIT: tl.constexpr = named(PROLOGUE, "limit")
    OFFSET: tl.constexpr = named(PROLOGUE, "offset")
    SIGMOID_ROUNDING: tl.constexpr = named(PROLOGUE, "sigmoid_rounding")
    INNER_ROUNDING: tl.constexpr = named(PROLOGUE, "inner_rounding")
    PRODUCT_ROUNDING: tl.constexpr = named(PROLOGUE, "product_rounding")
    if LIMIT is not None:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
    NEXT_ROUNDING: tl.constexpr = PRODUCT_ROUNDING if up is None else INNER_ROUNDING
    TO: tl.constexpr = NEXT_ROUNDING if rounds_to(NEXT_ROUNDING, OF) else None
    if ACTIVATION == "silu":
        active = silu(gate, TO)
    elif ACTIVATION == "sigmoid_product":
        scaled = gate
        if named(PROLOGUE, "alpha") != 1.0:
            scaled = round_to(gate * named(PROLOGUE, "alpha"), SIGMOID_ROUNDING)
        TO_SIGMOID: tl.constexpr = SIGMOID_ROUNDING if rounds_to(SIGMOID_ROUNDING, OF) else None
        active = gate * round_to(sigmoid(scaled, TO_SIGMOID), SIGMOID_ROUNDING)
    elif ACTIVATION == "sigmoid":
        active = sigmoid(gate, TO)
    elif ACTIVATION == "gelu":
        active = gelu(gate, TO)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        active = gelu_tanh(gate, TO)
    if up is not None:
        if LIMIT is not None or OFFSET != 0.0:
            up = cast(up, tl.float32)
        if LIMIT is not None:
            up = tl.clamp(up, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
        if OFFSET != 0.0:
            up = round_to(up + OFFSET, SIGMOID_ROUNDING)
        active = rounded_product(active, up, INNER_ROUNDING, PRODUCT_ROUNDING)
    else:
        active = rounded(active, PRODUCT_ROUNDING)
    return active


@triton.jit
def scale_address(rows, groups, scale_rows, GROUPS, LAYOUT: tl.constexpr, ONE_MATRIX: tl.constexpr):
    """Where scales lie, as fusion_pass.addresses has it, in consecutive matrices of ``scale_rows`` rows, or ONE_MATRIX of them."""
    # A division takes twenty instructions, and of 64 bits a hundred; 2^31 rows of scales fit no GPU.
    row = rows.to(tl.int32)
    matrix = (row * 0 if ONE_MATRIX else row // scale_rows).to(tl.int64)
    m = row - matrix * scale_rows
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
def has_room(rows, groups, M, GROUPS: tl.constexpr, PAD_ROWS: tl.constexpr, PAD_GROUPS: tl.constexpr):
    """Where scales are stored, padding included: a multiple of so many rows and groups."""
    in_rows = rows < (M + PAD_ROWS - 1) // PAD_ROWS * PAD_ROWS
    return in_rows & (groups < (GROUPS + PAD_GROUPS - 1) // PAD_GROUPS * PAD_GROUPS)


@triton.jit
def store_padding(
    scale_ptr,
    M,
    GROUPS: tl.constexpr,
    LAYOUT: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_GROUPS: tl.constexpr,
    PAD_TILE: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
):
    """Zeros for the scales of a program that lies outside the matrix: beside a tile, or of PAD_TILE >= TILE_ROWS rows below all."""
    tiles = (M + TILE_ROWS - 1) // TILE_ROWS
    below = tl.program_id(0) - tiles
    first = tl.where(below < 0, tl.program_id(0) * TILE_ROWS, tiles * TILE_ROWS + below * PAD_TILE)
    index = tl.arange(0, PAD_TILE)[:, None, None]
    rows = first.to(tl.int64) + index
    groups = (tl.program_id(1) * TILE_GROUPS + tl.arange(0, TILE_GROUPS))[None, :, None]
    at = scale_address(rows, groups, M, GROUPS, LAYOUT, True)
    own = index < tl.where(below < 0, TILE_ROWS, PAD_TILE)
    zeros = tl.zeros(at.shape, scale_ptr.dtype.element_ty)
    tl.store(scale_ptr + at, zeros, own & has_room(rows, groups, M, GROUPS, PAD_ROWS, PAD_GROUPS))


@triton.jit
def residual_sum(x, other, sum_ptr, out_at, mask, ROUNDING: tl.constexpr):
    """The tile x + other, rounded, in 16 bits or in float32; unless there is no ``sum_ptr`` it is stored before it is rounded."""
    if (
        x.dtype == other.dtype
        and rounds_to(ROUNDING, x.dtype)
        and (sum_ptr is None or sum_ptr.dtype.element_ty == x.dtype)
    ):
        stored = packed_sum(x, other)
        total = stored
    else:
        stored = widened(x) + widened(other)
        total = round_to(stored, ROUNDING)
    if sum_ptr is not None:
        tl.store(sum_ptr + out_at, cast(stored, sum_ptr.dtype.element_ty), mask)
    return total


@triton.constexpr_function
def adds_residual(prologue, other):
    """Whether ``other`` is a norm's residual: not its gate, nor an activation's up half."""
    return named(prologue, "kind") == "norm" and named(prologue, "gate") is None and other is not None


@triton.jit
def summed(x, other, sum_ptr, out_at, mask, PROLOGUE: tl.constexpr):
    """x with its residual, whose sum is stored unless there is no ``sum_ptr``; x itself where none is added."""
    if adds_residual(PROLOGUE, other):
        x = residual_sum(x, other, sum_ptr, out_at, mask, named(PROLOGUE, "sum_rounding"))
    return x


@triton.jit
def pin_loads(code_ptr, positive):
    """What is loaded before this is asked for before what is loaded after it.

    Assemblers move a load down to the first use of its values, which saves registers, and a row that is there already waits again.
    No load moves past a store that may be to its address: one to ``code_ptr`` that never happens, as a number is positive,
    which the compiler does not know. The loads after it keep it where it is.
    """
    tl.store(code_ptr.to(tl.pointer_type(tl.uint8), bitcast=True), 0, positive < 0)


@triton.jit
def norm_factor(
    x,
    M,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    WARPS: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    INLINE_MEAN: tl.constexpr,
    PROLOGUE: tl.constexpr,
):
    """What a norm multiplies each row of a tile of whole rows with, see :func:`root_factor`."""
    squares = sum_of_squares(widened(x), GROUP, N, WARPS, VECTOR, SEGMENT)
    mean = mean_of_squares(squares, M, N, named(PROLOGUE, "mean"), INLINE_MEAN)
    return root_factor(mean + named(PROLOGUE, "eps"), PROLOGUE)


@triton.jit
def value_of(x, factor, weight, other, OF: tl.constexpr, PROLOGUE: tl.constexpr):
    """What is quantized, in 16 bits if it was rounded to them last, else in float32.

    x is what was read, for a norm with its residual, in 16 bits or in float32; ``factor`` is the norm's.
    """
    KIND: tl.constexpr = named(PROLOGUE, "kind")
    if KIND == "norm":
        GATE: tl.constexpr = named(PROLOGUE, "gate")
        x = normalized(widened(x), factor, weight, PROLOGUE)
        if GATE is not None:
            gate = widened(other)
            if GATE == "silu":
                gate = silu(gate, None)
            else:
                gate = sigmoid(gate, None)
            x = rounded(widened(x) * gate, named(PROLOGUE, "gated_rounding"))
    if KIND == "gated":
        x = gated_activation(widened(x), other, OF, PROLOGUE)
    return x


@triton.jit
def quantized(x, peak, given, present, PROGRAM: tl.constexpr, CODES: tl.constexpr, dtype: tl.constexpr):
    """The codes and the scales of a f32 tile of (rows, groups, lanes), from amaxes and a given scalar of one shape."""
    factor, scale = evaluate(peak, given, PROGRAM)
    if present is not None:
        # The lanes of absent rows and groups must not send the tile's quotients the slow way.
        factor = tl.where(present, factor, 1.0)
    return codes(x, factor, CODES, dtype), scale


@triton.jit
def store_from_group(ptr, at, values, lanes, present, VECTOR: tl.constexpr):
    """Store a value of each group by the thread that holds its first lanes.

    Stored as it is, a value goes through shared memory to another thread, for which warps wait. Told that the bytes of a value are the
    first of VECTOR neighbours, one for each lane, Triton leaves them to the threads that hold these lanes.
    """
    BYTES: tl.constexpr = values.dtype.primitive_bitwidth // 8
    BITS: tl.constexpr = tl.uint8 if BYTES == 1 else tl.uint32
    byte = (values.to(BITS, bitcast=True) >> (lanes % BYTES * 8).to(BITS)).to(tl.uint8)
    bytes_at = tl.max_contiguous(at * BYTES + lanes % VECTOR, (1, 1, VECTOR))
    to = tl.multiple_of(ptr.to(tl.pointer_type(tl.uint8), bitcast=True) + bytes_at, (1, 1, VECTOR))
    tl.store(to, byte, present & (lanes < BYTES))


@triton.jit
def store_quantized(
    x,
    peak,
    given,
    amax_ptr,
    code_ptr,
    scale_ptr,
    rows,
    groups,
    lanes,
    mask,
    M,
    scale_rows,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    WARPS: tl.constexpr,
    VECTOR: tl.constexpr,
    SEGMENT: tl.constexpr,
    PEAK: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ONE_MATRIX: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
    OWN_SCALES: tl.constexpr,
):
    """Quantize a tile of (rows, groups, lanes), and store its codes and scales; ``peak`` is the amax where PEAK is ``row``."""
    PAIRS: tl.constexpr = named(CODES, "pairs")
    if PEAK == "group":
        if x.shape[1] == 1:
            peak = whole_amax(x, WARPS, VECTOR)
        elif PAIRS:
            peak = amax_of_pairs(in_pairs(x), x.dtype == tl.float16)
        else:
            peak = amax(widened(x), 2)
    elif PEAK != "row":
        peak = tl.full([1, 1, 1], 0.0, tl.float32)
    if PEAK == "load":
        peak += tl.load(amax_ptr).to(tl.float32, bitcast=True)
    # Broadcast, as adding it to zeros would turn -0 to 0.
    given = tl.full(peak.shape, 0.0, tl.float32) if given is None else tl.broadcast_to(given, peak.shape)
    present = (rows < M) & (groups < N // GROUP)
    if PAIRS:
        factor, scale = evaluate(peak, given, PROGRAM)
        first, second = tl.split(tl.reshape(in_pairs(x), (x.shape[0], x.shape[1], x.shape[2] // 4, 2)))
        code = e2m1_word(first, second, factor, x.dtype == tl.float16, CODES)
        quads = tl.arange(0, lanes.shape[2] // 4)[None, None, :]
        # Told that no more are neighbours, Triton leaves the words of a thread's values to it.
        OWN: tl.constexpr = (8 if SEGMENT is None else SEGMENT) // 4
        at = rows * (N // 4) + groups * (GROUP // 4) + quads // OWN * OWN + quads % OWN
        words = code_ptr.to(tl.pointer_type(tl.int16), bitcast=True)
        tl.store(words + at, code, present & (quads < GROUP // 4))
    else:
        code, scale = quantized(
            widened(x), peak, given, present if PEAK == "group" else None, PROGRAM, CODES, code_ptr.dtype.element_ty
        )
        if named(CODES, "ties") is None:
            # Told that no more are neighbours, Triton leaves the values to the threads that hold them for the other outputs.
            at = lanes if VECTOR == 16 else lanes // VECTOR * VECTOR + lanes % VECTOR
            tl.store(code_ptr + rows * N + groups * GROUP + at, code, mask)
        else:
            pairs = tl.arange(0, lanes.shape[2] // 2)[None, None, :]
            at = rows * (N // 2) + groups * (GROUP // 2) + pairs
            tl.store(code_ptr + at, code, present & (pairs < GROUP // 2))
    if scale_ptr is not None:
        if PEAK == "row":
            at = rows
            present = rows < tl.where(tl.program_id(1) == 0, M, 0)
        elif PEAK != "group":
            at = tl.full([1, 1, 1], 0, tl.int32)
            present = at == tl.program_id(0) + tl.program_id(1)
        elif LAYOUT == "row":
            at = rows * (N // GROUP) + groups
        else:
            at = scale_address(rows, groups, scale_rows, N // GROUP, LAYOUT, ONE_MATRIX)
            if PAD_ROWS is not None:
                scale = tl.where(present, scale, tl.zeros_like(scale))
                present = has_room(rows, groups, M, N // GROUP, PAD_ROWS, PAD_GROUPS)
        if OWN_SCALES and PEAK == "group" and GROUP >= 4 and x.shape[1] > 1:
            store_from_group(scale_ptr, at, cast(scale, scale_ptr.dtype.element_ty), lanes, present, VECTOR)
        else:
            tl.store(scale_ptr + at, cast(scale, scale_ptr.dtype.element_ty), present)


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
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    LATE_WEIGHT: tl.constexpr,
    FIRST_WEIGHT: tl.constexpr,
    INLINE_MEAN: tl.constexpr,
    OWN_SCALES: tl.constexpr,
    NARROW: tl.constexpr,
    SEGMENT: tl.constexpr,
    WARPS: tl.constexpr,
    ESTIMATES: tl.constexpr,
    PEAK: tl.constexpr,
    PROLOGUE: tl.constexpr,
    PROGRAM: tl.constexpr,
    CODES: tl.constexpr,
    LAYOUT: tl.constexpr,
    ONE_MATRIX: tl.constexpr,
    PAD_TILE: tl.constexpr,
    PAD_ROWS: tl.constexpr,
    PAD_GROUPS: tl.constexpr,
):
    """One program: a tile of ROWS rows x GROUPS groups x LANES >= GROUP values.

    A norm, and an amax per row, need tiles of whole rows.

    x and other: (M, N), rows at ``x_stride`` and ``other_stride``, where these are None at N; other is a norm's residual or an activation's up half.
    weight: (N,). given: a scalar. code, sum, value: (M, N) contiguous, FP4 codes in pairs: (M, N // 2). scale:
    (M, N // GROUP), or consecutive matrices in LAYOUT, each for ``scale_rows`` rows; one value if a tensor shares it. Absent
    tensors and what goes with them are None.

    With LATE_WEIGHT a norm reads its weight when it has added up the row, until when it takes no registers; with FIRST_WEIGHT
    before the row; else when the assembler likes to. With INLINE_MEAN the mean takes no call, see :func:`mean_of_squares`. With
    NARROW values wait for that sum in the 16 bits that they were read in. With SEGMENT, each thread reads and quantizes so many
    neighbours of a program's one row, a part of a group or all: values of which FP4 codes are formed from pairs.
    WARPS is the number of warps where a tile is one row, whose values :func:`in_warps` knows how to find in them; else None.
    PEAK says where the amax comes from: each ``group`` of the tile; ``none`` is needed; or one that the whole tensor shares,
    in two launches: the first adds its tiles to it (``store``) and writes no codes, the second reads it (``load``).
    PROLOGUE and CODES are named constants, see :func:`named`; PROGRAM is what lies between amax and scale. With ESTIMATES,
    activations of 16-bit values may be computed from those. With OWN_SCALES threads that hold a group store its scale.
    ONE_MATRIX promises that ``scale_rows`` is M. With PAD_ROWS and PAD_GROUPS, of which the stored scales' rows and groups are
    multiples, padding gets zeros from the programs beside it and, below the last tile, from programs for PAD_TILE rows each;
    None leaves it as it is.
    """
    if PAD_ROWS is not None:  # noqa: SIM102  # Triton decides the one while it compiles.
        if (tl.program_id(0) * ROWS >= M) | (tl.program_id(1) * GROUPS >= N // GROUP):
            store_padding(scale_ptr, M, N // GROUP, LAYOUT, ROWS, GROUPS, PAD_TILE, PAD_ROWS, PAD_GROUPS)
            return
    rows = (tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS))[:, None, None]
    # Told that there is one, the compiler knows which lanes are inside.
    tile = 0 if GROUPS * GROUP >= N else tl.program_id(1)
    groups = (tile * GROUPS + tl.arange(0, GROUPS))[None, :, None]
    lanes = tl.arange(0, LANES)[None, None, :]
    columns = groups * GROUP + lanes
    VECTOR: tl.constexpr = vector_of(sum_ptr, value_ptr)
    inside = inside_row(columns, lanes, N, GROUP, GROUPS)
    mask = within(rows, M, inside, ROWS)
    if SEGMENT is not None:
        read = vectors_of_segments(tile * GROUPS * GROUP, GROUP * GROUPS, SEGMENT)
        read_inside = None if inside is None else read < N
    else:
        read = columns
        read_inside = inside
    read_mask = within(rows, M, read_inside, ROWS)
    x_at = rows * (N if x_stride is None else x_stride) + read
    if not FIRST_WEIGHT:
        x = load_tile(x_ptr, x_at, read_mask, ROWS, GROUPS, LANES)
    # Loads do not move before the barriers of a sum: what is not read now is waited for then.
    given = None
    if given_ptr is not None and not LATE_WEIGHT:
        given = tl.load(given_ptr).to(tl.float32)
    weight = load_tile(None if LATE_WEIGHT else weight_ptr, read, read_inside, 1, GROUPS, LANES)
    if FIRST_WEIGHT:
        pin_loads(code_ptr, M if x_stride is None else x_stride)
        x = load_tile(x_ptr, x_at, read_mask, ROWS, GROUPS, LANES)
    OF: tl.constexpr = x.dtype if ESTIMATES else tl.float32
    ADDS: tl.constexpr = adds_residual(PROLOGUE, other_ptr)
    other_at = rows * (N if other_stride is None else other_stride) + read if other_ptr is not None else read
    residual = load_tile(other_ptr if ADDS else None, other_at, read_mask, ROWS, GROUPS, LANES)
    x = summed(x, residual, sum_ptr, rows * N + columns, mask, PROLOGUE)
    factor = None
    if named(PROLOGUE, "kind") == "norm":
        factor = norm_factor(x, M, N, GROUP, WARPS, VECTOR, SEGMENT, INLINE_MEAN, PROLOGUE)
        if NARROW:
            x = widened_after(x, factor)
        if LATE_WEIGHT:
            weight = load_tile(weight_ptr, read, read_inside, 1, GROUPS, LANES)
    other = load_tile(None if ADDS else other_ptr, other_at, read_mask, ROWS, GROUPS, LANES)
    x = value_of(x, factor, weight, other, OF, PROLOGUE)
    if PEAK == "store":
        x = widened(x)
        if mask is not None:
            x = tl.where(mask, x, 0.0)
        bits = tl.max(amax(x, 2).to(tl.int32, bitcast=True), 1)
        tl.atomic_max(amax_ptr, tl.max(tl.max(bits, 1), 0))
    else:
        if given is None and given_ptr is not None:
            given = tl.load(given_ptr).to(tl.float32)
        if value_ptr is not None:
            tl.store(value_ptr + rows * N + columns, cast(x, value_ptr.dtype.element_ty), mask)
        store_quantized(
            x,
            None,
            given,
            amax_ptr,
            code_ptr,
            scale_ptr,
            rows,
            groups,
            lanes,
            mask,
            M,
            scale_rows,
            N,
            GROUP,
            WARPS,
            VECTOR,
            SEGMENT,
            PEAK,
            PROGRAM,
            CODES,
            LAYOUT,
            ONE_MATRIX,
            PAD_ROWS,
            PAD_GROUPS,
            OWN_SCALES,
        )
