"""Q3_K, Q6_K: blocks of 256 whose sub-blocks of 16 have a scale, quantized itself, and levels around zero.

    x[i] ~ d * scale[j] * (level[i] - half)        j: sub-block of i; half: 4 for Q3_K, 32 for Q6_K

ggml searches each sub-block's scale (search.py), rounds the scales to steps of d, and then the values to the scales as
they are stored.
"""

from __future__ import annotations

from stepgguf.quants.lanes.blocks import (
    bit_field,
    load_half,
    mean_square_of_block,
    nibbles,
    signed_extreme,
    store_short,
    store_weights,
)
from stepgguf.quants.lanes.compile import inlined
from stepgguf.quants.lanes.lane_kernels import define_type
from stepgguf.quants.lanes.operands import ByteTile, F32Lanes, F32Tile, Importance, Mask
from stepgguf.quants.lanes.rounding import clamp, from_half, nearest_int, to_half
from stepgguf.quants.lanes.search import GROUP_MAX_EPS, make_scale_search
from stepgguf.quants.lanes.vector import (
    absolute,
    any_lane,
    byte_tile,
    f32_tile,
    floats,
    ints,
    load,
    load_bytes,
    store,
    store_bytes,
    to_float,
    where,
)

_search_4, _search_32 = make_scale_search(4), make_scale_search(32)


@inlined
def _requantize(x: F32Tile, levels: ByteTile, first: int, scale: F32Lanes, half: int) -> None:
    """Round the levels of 16 values anew for the scale as it is stored; where that is 0 the search's stay."""
    is_zero = scale == floats(0.0)
    for i in range(first, first + 16):
        level = clamp(nearest_int(load(x, i) / scale), ints(-half), ints(half - 1)) + ints(half)
        store_bytes(levels, i, where(is_zero, load_bytes(levels, i), level))


# Q3_K -----------------------------------------------------------------------------------------------------------
#
# block_q3_K     0  hmask 32    bit k of byte i: the upper bit of level 32 k + i
#               32  qs 64       levels' lower 2 bits: byte 32 h + i has those of 128 h + i + (0, 32, 64, 96)
#               96  scales 12   6 bits each: lower 4 of scales j and j + 8 in byte j, then upper 2 of j + (0, 4, 8, 12)
#              108  d f16


@inlined
def _refine_q3_k(x: F32Tile, levels: ByteTile, aux: F32Tile, first: int) -> F32Lanes:
    """make_q3_quants: the scale of 16 values, each weighing its square; a level moves if that alone helps.

    aux [16]: scratch, the levels from -4 to 3.
    """
    zero = floats(0.0)
    extreme = signed_extreme(x, first, 16)
    is_zero = absolute(extreme) < floats(GROUP_MAX_EPS)
    inverse = floats(-4.0) / extreme
    sum_xl, sum_l2 = zero, zero
    for i in range(16):
        v = load(x, first + i)
        level = to_float(clamp(nearest_int(inverse * v), ints(-4), ints(3)))
        store(aux, i, level)
        sum_xl = sum_xl + v * v * v * level
        sum_l2 = sum_l2 + v * v * level * level
    for _ in range(5):
        has_changed = zero < zero
        for i in range(16):
            v, old = load(x, first + i), load(aux, i)
            # Unlike make_qp_quants (search.py), ggml asks of the new sum of squares here that it is above 0.
            xl = sum_xl - v * v * v * old
            l2 = sum_l2 - v * v * old * old
            level = to_float(clamp(nearest_int(v * l2 / xl), ints(-4), ints(3)))
            is_candidate = (xl > zero) & (level != old)
            xl = xl + v * v * v * level
            l2 = l2 + v * v * level * level
            is_better = is_candidate & (l2 > zero) & (xl * xl * sum_l2 > sum_xl * sum_xl * l2)
            store(aux, i, where(is_better, level, old))
            sum_xl = where(is_better, xl, sum_xl)
            sum_l2 = where(is_better, l2, sum_l2)
            has_changed = has_changed | is_better
        if not any_lane(has_changed):
            break
    for i in range(16):
        store_bytes(levels, first + i, where(is_zero, ints(0), nearest_int(load(aux, i)) + ints(4)))
    return where(is_zero, zero, where(sum_l2 > zero, sum_xl / sum_l2, zero))


@inlined
def _encode_q3_k(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    levels, scale_levels = byte_tile(256), byte_tile(16)
    d = to_half(_search_scales_q3_k(x, importance, levels, scale_levels))
    for j in range(16):
        scale_level = load_bytes(scale_levels, j) - ints(32)
        _requantize(x, levels, 16 * j, from_half(d) * to_float(scale_level), 4)
    _pack_levels_q3_k(levels, y)
    _pack_scales_q3_k(scale_levels, y)
    store_short(y, 108, d)


@inlined
def _search_scales_q3_k(x: F32Tile, importance: Importance, levels: ByteTile, scale_levels: ByteTile) -> F32Lanes:
    """The factor d; `levels` gets the values' levels, `scale_levels` the scales': 0 to 63, where 32 stands for 0."""
    w, scales, sums = f32_tile(16), f32_tile(16), f32_tile(16)
    if importance is None:
        for j in range(16):
            store(scales, j, _refine_q3_k(x, levels, w, 16 * j))
        largest = signed_extreme(scales, 0, 16)
        is_zero = largest == floats(0.0)
        inverse = floats(-32.0) / largest
        for j in range(16):
            level = clamp(nearest_int(inverse * load(scales, j)), ints(-32), ints(31)) + ints(32)
            store_bytes(scale_levels, j, where(is_zero, ints(0), level))
        # ggml divides twice: 1 / (-32 / largest) is not always largest / -32.
        return where(is_zero, floats(0.0), floats(1.0) / inverse)
    sigma2 = mean_square_of_block(x, 2.0)
    for j in range(16):
        store(sums, j, store_weights(x, importance, w, 16 * j, 16, sigma2))
        store(scales, j, _search_4(x, w, levels, 16 * j, 16))
    # Each scale weighs as much as its sub-block's values do together.
    return _search_32(scales, sums, scale_levels, 0, 16)


@inlined
def _pack_levels_q3_k(levels: ByteTile, y: ByteTile) -> None:
    """Pack levels into hmask and qs. Values 32 apart share a byte, so that 32 bytes of both unpack side by side."""
    for i in range(32):
        upper = ints(0)
        for j in range(2):
            lower = ints(0)
            for k in range(4):
                level = load_bytes(levels, 128 * j + 32 * k + i)
                lower = lower | (bit_field(level, 0, 2) << ints(2 * k))
                upper = upper | (bit_field(level, 2, 1) << ints(4 * j + k))
            store_bytes(y, 32 + 32 * j + i, lower)
        store_bytes(y, i, upper)


@inlined
def _pack_scales_q3_k(scale_levels: ByteTile, y: ByteTile) -> None:
    """Pack 16 scales of 6 bits into 12 bytes: 8 with their lower 4 bits, then 4 with the upper 2."""
    for j in range(8):
        store_bytes(y, 96 + j, nibbles(load_bytes(scale_levels, j), load_bytes(scale_levels, j + 8)))
    for j in range(4):
        upper = ints(0)
        for k in range(4):
            upper = upper | (bit_field(load_bytes(scale_levels, 4 * k + j), 4, 2) << ints(2 * k))
        store_bytes(y, 104 + j, upper)


@inlined
def _decode_q3_k(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 108)
    for j in range(16):
        low = bit_field(load_bytes(y, 96 + j % 8), 4 * (j // 8), 4)
        high = bit_field(load_bytes(y, 104 + j % 4), 2 * (j // 4), 2)
        scale = d * to_float((low | (high << ints(4))) - ints(32))
        for i in range(16):
            # Value 16 j + i is number `place` of its 32; j // 8 is its half of the block, j // 2 its 32 of 8.
            place = j % 2 * 16 + i
            lower = bit_field(load_bytes(y, 32 + j // 8 * 32 + place), j % 8 // 2 * 2, 2)
            upper = bit_field(load_bytes(y, place), j // 2, 1)
            store(z, 16 * j + i, scale * to_float((lower | (upper << ints(2))) - ints(4)))


# Q6_K -----------------------------------------------------------------------------------------------------------
#
# block_q6_K     0  ql 128      levels' lower 4 bits: byte 64 h + i has those of 128 h + i and 128 h + 64 + i
#              128  qh 64       levels' upper 2 bits: byte 32 h + i has those of 128 h + i + (0, 32, 64, 96)
#              192  scales 16   int8
#              208  d f16


@inlined
def _encode_q6_k(x: F32Tile, importance: Importance, y: ByteTile) -> None:
    levels = byte_tile(256)
    w, scales = f32_tile(16), f32_tile(16)
    for j in range(16):
        for i in range(16):
            v = load(x, 16 * j + i)
            store(w, i, v * v if importance is None else floats(importance[16 * j + i]))
        store(scales, j, _search_32(x, w, levels, 16 * j, 16))
    largest = signed_extreme(scales, 0, 16)
    is_zero = absolute(largest) < floats(GROUP_MAX_EPS)  # then every byte is
    inverse = floats(-128.0) / largest
    d = where(is_zero, ints(0), to_half(floats(1.0) / inverse))
    for j in range(16):
        level = nearest_int(inverse * load(scales, j))
        level = where(is_zero, ints(0), where(level > ints(127), ints(127), level))
        store_bytes(y, 192 + j, level)
        _requantize(x, levels, 16 * j, from_half(d) * to_float(level), 32)
    store_short(y, 208, d)
    _pack_levels_q6_k(levels, is_zero, y)


@inlined
def _pack_levels_q6_k(levels: ByteTile, is_zero: Mask, y: ByteTile) -> None:
    """Pack levels into ql and qh; all bits are 0 where the block is zero, though level 32 stands for 0."""
    for i in range(256):
        store_bytes(levels, i, where(is_zero, ints(0), load_bytes(levels, i)))
    for j in range(2):
        for i in range(32):
            upper = ints(0)
            for k in range(2):
                low, high = load_bytes(levels, 128 * j + 32 * k + i), load_bytes(levels, 128 * j + 32 * k + 64 + i)
                store_bytes(y, 64 * j + 32 * k + i, nibbles(low, high))
                upper = upper | ((low >> ints(4)) << ints(2 * k)) | ((high >> ints(4)) << ints(2 * k + 4))
            store_bytes(y, 128 + 32 * j + i, upper)


@inlined
def _decode_q6_k(y: ByteTile, z: F32Tile) -> None:
    d = load_half(y, 208)
    for j in range(16):
        scale_level = load_bytes(y, 192 + j)
        scale = d * to_float((scale_level ^ ints(0x80)) - ints(0x80))  # its sign bit counts -128
        for i in range(16):
            place = j % 4 * 16 + i  # of 64 bytes, each with a level of either half of 128
            lower = bit_field(load_bytes(y, j // 8 * 64 + place), j % 8 // 4 * 4, 4)
            upper = bit_field(load_bytes(y, 128 + j // 8 * 32 + place % 32), j % 8 // 2 * 2, 2)
            store(z, 16 * j + i, scale * to_float((lower | (upper << ints(4))) - ints(32)))


TYPES = {
    "Q3_K": define_type("Q3_K", _encode_q3_k, _decode_q3_k),
    "Q6_K": define_type("Q6_K", _encode_q6_k, _decode_q6_k),
}
