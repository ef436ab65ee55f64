"""Where scales and shuffled data lie in memory: one ``pack_*`` and its exact inverse ``unpack_*`` per layout.

A scale is first a logical matrix s(m, j), row m and group j, and only then bytes at addresses: every function here takes
the one and gives the other, in plain PyTorch, on the device of its argument. Padding always has a defined content, so
that packed tensors can be compared byte by byte.

| layout | functions | address of s(m, j) | users |
|---|---|---|---|
| column-major | ``column_major`` | j*M + m | vLLM, aiter, torchao blockwise |
| TMA-aligned columns | ``tma_aligned`` | j*ceil4(M) + m | DeepGEMM on sm_90, sglang, vLLM, rtp-llm |
| masked batch | ``masked_batch`` | (e*G + j)*T + t | rtp-llm's masked MoE kernel |
| packed UE8M0 words | ``ue8m0_words`` | byte j%4 of word (j//4)*ceil4(M) + m | DeepGEMM on sm_100, vLLM, sglang |
| transposed view | ``transposed_view`` | j*M + m, presented as (M, G) contiguous | aiter, sglang bpreshuffle |
| 32x8 shuffle | ``mx_shuffled`` | see the function | aiter gemm_a4w4 (gfx950), TransformerEngine |
| 128x4 blocks | ``blocked`` | see the function | torch._scaled_mm, torchao, vLLM NVFP4 |
| (16, 16) data shuffle | ``mfma_shuffled`` | see the function | aiter, TransformerEngine weights |

Sizes rounded up to a multiple of n are written ceil<n>.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812

from .addresses import TMA_ROWS, ceil_to
from .checks import require, require_dims

_WORD_GROUPS = 4
_SCALE_BYTES = (torch.uint8, torch.float8_e8m0fnu)
_BLOCKED_BYTES = (*_SCALE_BYTES, torch.float8_e4m3fn)
# The bits of 2^-127, the one UE8M0 value that float32 holds as a subnormal, and of NaN.
_LEAST_SCALE, _NAN_SCALE = 0x00400000, 0x7FC00000
_NAN_BYTE = 255

MX_SHUFFLED_PADDING = 127
BLOCKED_PADDING = 0


def _require_dtype(name: str, tensor: torch.Tensor, allowed: Sequence[torch.dtype]) -> None:
    require(tensor.dtype in allowed, f"dtype of {name}", tensor.dtype, ", ".join(map(str, allowed)))


def _require_strides(name: str, tensor: torch.Tensor, strides: tuple[int, ...]) -> None:
    # A dimension of one has no meaningful stride, and a tensor without elements none at all.
    if tensor.numel() == 0:
        return
    same = all(
        size == 1 or actual == wanted
        for size, actual, wanted in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )
    require(same, f"strides of {name}", tensor.stride(), str(strides))


def _require_contiguous(name: str, tensor: torch.Tensor) -> None:
    require(tensor.is_contiguous(), f"strides of {name}", tensor.stride(), "those of a contiguous tensor")


def _require_trim(rows: int, columns: int, packed: torch.Tensor, row_unit: int, column_unit: int) -> None:
    shape = (ceil_to(rows, row_unit), ceil_to(columns, column_unit))
    allowed = f"{shape} for {rows} rows and {columns} columns"
    require(tuple(packed.shape) == shape, "shape of packed", tuple(packed.shape), allowed)


def _dense(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def _columns(values: torch.Tensor, rows: int) -> torch.Tensor:
    """(M, G) ``values`` column by column, each of ``rows`` >= M with zeros beyond the values."""
    count, groups = values.shape
    storage = torch.zeros(groups, rows, dtype=values.dtype, device=values.device)
    storage[:, :count] = values.t()
    return storage.as_strided((count, groups), (1, rows))


def pack_column_major(scale: torch.Tensor) -> torch.Tensor:
    """The scales with column-major strides: s(m, j) at j*M + m.

    Args:
        scale: (M, G), any dtype and strides.

    Returns:
        (M, G) with strides (1, M), the same values.

    Raises:
        ValueError: ``scale`` is not a matrix.

    Source: vLLM ``per_token_group_quant_fp8`` with column_major_scales, aiter ``transpose_scale`` as merged.
    """
    require_dims("scale", scale, "(M, G)")
    return _columns(scale, scale.shape[0])


def unpack_column_major(packed: torch.Tensor) -> torch.Tensor:
    """The contiguous (M, G) scales of :func:`pack_column_major`.

    Raises:
        ValueError: ``packed`` is not a matrix with strides (1, M).
    """
    require_dims("packed", packed, "(M, G)")
    _require_strides("packed", packed, (1, packed.shape[0]))
    return _dense(packed)


def pack_tma_aligned(scale: torch.Tensor) -> torch.Tensor:
    """The scales column-major, each column starting at a multiple of 16 bytes: s(m, j) at j*ceil4(M) + m.

    The rows from M to ceil4(M) are zero and belong to the allocation, not to the result: DeepGEMM reads whole boxes of
    rows, so what lies there must be finite.

    Args:
        scale: (M, G) float32, any strides.

    Returns:
        (M, G) float32 with strides (1, ceil4(M)), in storage of G * ceil4(M) values.

    Raises:
        ValueError: ``scale`` is not a float32 matrix.

    Source: DeepGEMM ``get_mn_major_tma_aligned_tensor``, sglang ``create_per_token_group_quant_fp8_output_scale``.
    """
    require_dims("scale", scale, "(M, G)")
    _require_dtype("scale", scale, [torch.float32])
    return _columns(scale, ceil_to(scale.shape[0], TMA_ROWS))


def unpack_tma_aligned(packed: torch.Tensor) -> torch.Tensor:
    """The contiguous (M, G) scales of :func:`pack_tma_aligned`.

    Raises:
        ValueError: ``packed`` is not a float32 matrix with strides (1, ceil4(M)).
    """
    require_dims("packed", packed, "(M, G)")
    _require_dtype("packed", packed, [torch.float32])
    _require_strides("packed", packed, (1, ceil_to(packed.shape[0], TMA_ROWS)))
    return _dense(packed)


def pack_masked_batch(scale: torch.Tensor) -> torch.Tensor:
    """One column-major matrix per expert: s(e, t, j) at e*T*G + j*T + t.

    Nothing is padded: a consumer that loads columns by TMA needs T to be a multiple of 4.

    Args:
        scale: (E, T, G) float32, any strides.

    Returns:
        (E, T, G) float32 with strides (T*G, 1, T).

    Raises:
        ValueError: ``scale`` is not a float32 tensor of three dimensions.

    Source: rtp-llm's masked silu-and-mul quantization.
    """
    require_dims("scale", scale, "(E, T, G)")
    _require_dtype("scale", scale, [torch.float32])
    return scale.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def unpack_masked_batch(packed: torch.Tensor) -> torch.Tensor:
    """The contiguous (E, T, G) scales of :func:`pack_masked_batch`.

    Raises:
        ValueError: ``packed`` is not a float32 tensor (E, T, G) with strides (T*G, 1, T).
    """
    require_dims("packed", packed, "(E, T, G)")
    _require_dtype("packed", packed, [torch.float32])
    _require_strides("packed", packed, (packed.shape[1] * packed.shape[2], 1, packed.shape[1]))
    return _dense(packed)


def ue8m0_bytes(scale: torch.Tensor) -> torch.Tensor:
    """The biased exponents of scales that are powers of two, 2^(byte - 127); NaN gives byte 255.

    Args:
        scale: float32, each value a power of two from 2^-127 on or NaN. The values are looked at, which waits for a GPU.

    Returns:
        uint8 of the same shape.

    Raises:
        ValueError: ``scale`` is not float32 or holds another value. A packer that cut the mantissa off instead would
            shrink that scale by up to half, silently.
    """
    _require_dtype("scale", scale, [torch.float32])
    bits = scale.view(torch.int32)
    power = (bits & 0x7FFFFF == 0) & (bits > 0) & scale.isfinite()
    valid = power | (bits == _LEAST_SCALE) | scale.isnan()
    if not bool(valid.all()):
        require(False, "scale", f"{scale[~valid][0].item()} in places", "powers of two from 2^-127 to 2^127, and NaN")
    return torch.where(scale.isnan(), _NAN_BYTE, bits >> 23).to(torch.uint8)


def ue8m0_values(byte: torch.Tensor) -> torch.Tensor:
    """The float32 scales 2^(byte - 127) of uint8 or float8_e8m0fnu bytes; byte 255 gives NaN.

    Raises:
        ValueError: ``byte`` has another dtype.
    """
    _require_dtype("byte", byte, _SCALE_BYTES)
    exponent = byte.view(torch.uint8).int()
    bits = torch.where(exponent == 0, _LEAST_SCALE, exponent << 23)
    return torch.where(exponent == _NAN_BYTE, _NAN_SCALE, bits).view(torch.float32)


def pack_ue8m0_words(scale: torch.Tensor) -> torch.Tensor:
    """Power-of-two scales as exponent bytes, four groups to an int32 word, words column-major and TMA-aligned.

    The byte of s(m, j) is byte j%4, counted from the lowest, of word (j//4)*ceil4(M) + m. The bytes of groups from G on
    and the words of rows from M to ceil4(M) are zero.

    Args:
        scale: (M, G) float32 powers of two, or their bytes as uint8 or float8_e8m0fnu; any strides.

    Returns:
        (M, ceil(G/4)) int32 with strides (1, ceil4(M)).

    Raises:
        ValueError: ``scale`` is not such a matrix, or as float32 holds a value that is no power of two.

    Source: DeepGEMM ``get_mn_major_tma_aligned_packed_ue8m0_tensor``, vLLM's packed_for_deepgemm quantization.
    """
    require_dims("scale", scale, "(M, G)")
    _require_dtype("scale", scale, (torch.float32, *_SCALE_BYTES))
    byte = ue8m0_bytes(scale) if scale.dtype is torch.float32 else scale.view(torch.uint8)
    rows, groups = byte.shape
    padded = F.pad(byte, (0, -groups % _WORD_GROUPS)).int().view(rows, -(-groups // _WORD_GROUPS), _WORD_GROUPS)
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=scale.device)
    # Each bit is set by one byte only: the sum in int64 carries nothing, and narrowing keeps the low 32 bits.
    words = (padded.long() << shifts).sum(-1).to(torch.int32)
    return _columns(words, ceil_to(rows, TMA_ROWS))


def unpack_ue8m0_words(packed: torch.Tensor, groups: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The contiguous (M, groups) scales of :func:`pack_ue8m0_words`.

    Args:
        packed: (M, ceil(groups/4)) int32 with strides (1, ceil4(M)).
        groups: the G of the packed scales, which the words alone do not tell.
        dtype: torch.float32 for the scales' values, torch.uint8 for their bytes.

    Raises:
        ValueError: ``packed`` has another dtype, shape or strides, or ``dtype`` is another.
    """
    require_dims("packed", packed, "(M, ceil(G/4))")
    _require_dtype("packed", packed, [torch.int32])
    allowed = f"{-(-groups // _WORD_GROUPS)} words per row for {groups} groups"
    require(packed.shape[1] == -(-groups // _WORD_GROUPS), "shape of packed", tuple(packed.shape), allowed)
    _require_strides("packed", packed, (1, ceil_to(packed.shape[0], TMA_ROWS)))
    require(dtype in (torch.float32, torch.uint8), "dtype", dtype, "torch.float32, torch.uint8")
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=packed.device)
    byte = (packed.unsqueeze(-1) >> shifts & 0xFF).to(torch.uint8)
    byte = byte.reshape(packed.shape[0], packed.shape[1] * _WORD_GROUPS)[:, :groups].contiguous()
    return byte if dtype is torch.uint8 else ue8m0_values(byte)


def pack_transposed_view(scale: torch.Tensor) -> torch.Tensor:
    """The bytes of the column-major layout under the shape and strides of the row-major one.

    Read as (M, G) the result is scrambled; a consumer takes its storage as (G, M). Packing twice is *not* the identity
    unless M = 1, G = 1 or M = G: only :func:`unpack_transposed_view` restores the scales.

    Args:
        scale: (M, G), any dtype and strides.

    Returns:
        (M, G) contiguous, s(m, j) at j*M + m.

    Raises:
        ValueError: ``scale`` is not a matrix.

    Source: aiter pull request 3041, sglang ``materialize_bpreshuffle_fp8_scale``.
    """
    require_dims("scale", scale, "(M, G)")
    return scale.t().clone(memory_format=torch.contiguous_format).view(scale.shape)


def unpack_transposed_view(packed: torch.Tensor) -> torch.Tensor:
    """The (M, G) scales of :func:`pack_transposed_view`, without a copy: a view of strides (1, M).

    Raises:
        ValueError: ``packed`` is not a contiguous matrix.
    """
    require_dims("packed", packed, "(M, G)")
    _require_contiguous("packed", packed)
    return packed.view(packed.shape[1], packed.shape[0]).t()


def _pad(tensor: torch.Tensor, row_unit: int, column_unit: int, value: int) -> torch.Tensor:
    """The bytes of a matrix, padded below and on the right."""
    rows, columns = tensor.shape
    return F.pad(tensor.view(torch.uint8), (0, -columns % column_unit, 0, -rows % row_unit), value=value)


def pack_mx_shuffled(scale: torch.Tensor) -> torch.Tensor:
    """The 32x8 shuffle of E8M0 bytes that aiter's gemm_a4w4 reads on gfx950.

    With S = ceil8(C), s(r, c) is at (r//32)*32*S + (c//8)*256 + (c%4)*64 + (r%16)*4 + (c%8//4)*2 + r%32//16. All padding
    is 127, the scale 1.

    Args:
        scale: (R, C) uint8 or float8_e8m0fnu, any strides; a row's scale per 32 values.

    Returns:
        (ceil256(R), ceil8(C)) contiguous, of the same dtype.

    Raises:
        ValueError: ``scale`` is not such a matrix.

    Source: aiter ``e8m0_shuffle``, TransformerEngine pull request 422.
    """
    require_dims("scale", scale, "(R, C)")
    _require_dtype("scale", scale, _SCALE_BYTES)
    padded = _pad(scale, 256, 8, MX_SHUFFLED_PADDING)
    rows, columns = padded.shape
    shuffled = padded.view(rows // 32, 2, 16, columns // 8, 2, 4).permute(0, 3, 5, 2, 4, 1)
    return shuffled.reshape(rows, columns).view(scale.dtype)


def unpack_mx_shuffled(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The contiguous (rows, columns) scales of :func:`pack_mx_shuffled`.

    Raises:
        ValueError: ``packed`` is not a contiguous (ceil256(rows), ceil8(columns)) tensor of bytes. A trimmed one has
            lost scales: the shuffle moves them across the whole padded matrix.
    """
    require_dims("packed", packed, "(ceil256(R), ceil8(C))")
    _require_dtype("packed", packed, _SCALE_BYTES)
    _require_trim(rows, columns, packed, 256, 8)
    _require_contiguous("packed", packed)
    blocks = packed.view(torch.uint8).view(packed.shape[0] // 32, packed.shape[1] // 8, 4, 16, 2, 2)
    matrix = blocks.permute(0, 5, 3, 1, 4, 2).reshape(packed.shape)
    return matrix[:rows, :columns].contiguous().view(packed.dtype)


def pack_blocked(scale: torch.Tensor) -> torch.Tensor:
    """The 128x4 blocks of one-byte scales that cuBLAS and ``torch._scaled_mm`` read.

    s(r, c) is at ((r//128)*ceil(C/4) + c//4)*512 + (r%32)*16 + (r%128//32)*4 + c%4. All padding is 0.

    Args:
        scale: (R, C) uint8, float8_e8m0fnu or (for NVFP4) float8_e4m3fn, any strides.

    Returns:
        (ceil128(R), ceil4(C)) contiguous, of the same dtype.

    Raises:
        ValueError: ``scale`` is not such a matrix.

    Source: torchao ``to_blocked``, cuBLAS "1D block scaling factors layout".
    """
    require_dims("scale", scale, "(R, C)")
    _require_dtype("scale", scale, _BLOCKED_BYTES)
    padded = _pad(scale, 128, 4, BLOCKED_PADDING)
    rows, columns = padded.shape
    blocks = padded.view(rows // 128, 4, 32, columns // 4, 4).permute(0, 3, 2, 1, 4)
    return blocks.reshape(rows, columns).view(scale.dtype)


def unpack_blocked(packed: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """The contiguous (rows, columns) scales of :func:`pack_blocked`.

    Raises:
        ValueError: ``packed`` is not a contiguous (ceil128(rows), ceil4(columns)) tensor of bytes.
    """
    require_dims("packed", packed, "(ceil128(R), ceil4(C))")
    _require_dtype("packed", packed, _BLOCKED_BYTES)
    _require_trim(rows, columns, packed, 128, 4)
    _require_contiguous("packed", packed)
    blocks = packed.view(torch.uint8).view(packed.shape[0] // 128, packed.shape[1] // 4, 32, 4, 4)
    matrix = blocks.permute(0, 3, 2, 1, 4).reshape(packed.shape)
    return matrix[:rows, :columns].contiguous().view(packed.dtype)


def _mfma_blocks(name: str, data: torch.Tensor) -> int:
    """How many elements 16 bytes hold; raises unless ``data`` divides into blocks of 16 rows x 32 bytes."""
    require_dims(name, data, "(N, K)")
    size = data.element_size()
    require(16 % size == 0, f"dtype of {name}", data.dtype, "one of at most 16 bytes")
    rows, row_bytes = data.shape[0], data.shape[1] * size
    whole = rows % 16 == 0 and row_bytes % 32 == 0
    require(whole, f"shape of {name}", tuple(data.shape), "a multiple of 16 rows, each a multiple of 32 bytes")
    return 16 // size


def pack_mfma_shuffled(data: torch.Tensor) -> torch.Tensor:
    """The (16, 16) shuffle of a weight's data: blocks of 16 rows x 16 bytes, two side by side, each contiguous.

    Byte k of row n, in rows of B bytes, is at (n//16)*16*B + (k//32)*512 + (k%32//16)*256 + (n%16)*16 + k%16.

    Args:
        data: (N, K) of any dtype and strides; FP4 pairs count as one element of one byte.

    Returns:
        (N, K) contiguous, of the same dtype.

    Raises:
        ValueError: N is no multiple of 16, or a row no multiple of 32 bytes.

    Source: aiter ``shuffle_weight`` with layout (16, 16), as gemm_a4w4 wants its second operand.
    """
    inner = _mfma_blocks("data", data)
    rows, columns = data.shape
    blocks = data.reshape(rows // 16, 16, columns // (2 * inner), 2, inner).permute(0, 2, 3, 1, 4)
    return blocks.clone(memory_format=torch.contiguous_format).view(data.shape)


def unpack_mfma_shuffled(packed: torch.Tensor) -> torch.Tensor:
    """The contiguous (N, K) data of :func:`pack_mfma_shuffled`.

    Raises:
        ValueError: ``packed`` is not contiguous, N no multiple of 16, or a row no multiple of 32 bytes.
    """
    inner = _mfma_blocks("packed", packed)
    _require_contiguous("packed", packed)
    rows, columns = packed.shape
    blocks = packed.view(rows // 16, columns // (2 * inner), 2, 16, inner).permute(0, 3, 1, 2, 4)
    return blocks.clone(memory_format=torch.contiguous_format).view(packed.shape)
