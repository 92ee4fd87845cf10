"""Operators that move codes without computing: shapes, slices, paddings, resizing.

After tflite/kernels/{concatenation, pad, reshape, squeeze, expand_dims, split, slice,
strided_slice, transpose}.cc and internal/reference/{resize_bilinear, resize_nearest_neighbor}.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from qat.verify.arithmetic import round_away
from qat.verify.integer_call import Call, Value, same_grid

_MOVED = ("int8", "int16", "uint8", "float32", "bool")
_PAD_RANK = 5


def _moved(call: Call, *values: Value) -> None:
    call.require_types(*_MOVED, values=values)


def concatenation(call: Call) -> np.ndarray:
    """int8 inputs must lie on the output's grid; int16 is copied, whatever the scales."""
    call.require(len(call.inputs) > 0 and None not in call.inputs, "has no input or one left out")
    _moved(call, *call.inputs)
    call.require(call.option("fusedActivationFunction") == 0, "has a fused activation")
    shapes = [value.shape for value in call.inputs]
    axis = call.axis(call.option("axis"), len(shapes[0]))
    fits = {(len(s), *s[:axis], *s[axis + 1 :]) for s in shapes}
    call.require(len(fits) == 1, f"joins the shapes {shapes[:4]}, which do not fit")
    for value in call.inputs:
        if value.dtype in ("int8", "uint8"):
            call.require(same_grid(value.tensor, call.output), "joins tensors on different grids")
        elif value.dtype == "int16":
            call.require(value.tensor.zero_point == 0, "has an int16 zero point that is not 0")
    call.require_size((sum(s[axis] for s in shapes), *shapes[0][:axis], *shapes[0][axis + 1 :]))
    return np.concatenate([value.codes for value in call.inputs], axis)


def pad(call: Call) -> np.ndarray:
    """PAD fills with the code of zero, PADV2 with a constant on the output's grid."""
    x, amounts, fill = call.arguments(2, 3)
    _moved(call, x)
    rank = len(x.shape)
    call.require(
        rank <= _PAD_RANK, f"pads a tensor of rank {rank}; the kernel stops at {_PAD_RANK}"
    )
    call.require(amounts.shape == (rank, 2), f"has paddings of shape {amounts.shape}")
    pairs = np.asarray(call.constant(amounts, "int32", "int64"), np.int64).reshape(rank, 2)
    call.require(bool(np.all(pairs >= 0)), "has a negative padding")
    sizes = zip(x.shape, pairs.tolist(), strict=True)
    call.require_size(tuple(size + sum(pair) for size, pair in sizes))
    constant = 0 if x.dtype == "float32" else call.output.zero_point
    if fill is not None:
        call.require(fill.dtype == x.dtype and fill.codes.size == 1, "has no single fill value")
        if x.dtype != "float32":
            call.require(same_grid(fill.tensor, call.output), "fills with a value of another grid")
        constant = fill.codes.reshape(-1)[0]
    return np.pad(x.codes, pairs, constant_values=constant)


def reshape(call: Call) -> np.ndarray:
    """The shape comes from the second input if it is a vector, else from the options."""
    x, wanted = call.arguments(1, 2)
    _moved(call, x)
    if wanted is not None and len(wanted.shape) == 1:
        shape = call.constant(wanted, "int32")
    else:
        shape = [int(size) for size in call.option("newShape")]
        shape = [] if shape == [0] else shape
    known = math.prod(size for size in shape if size != -1)
    legal = all(size >= -1 for size in shape) and shape.count(-1) <= 1
    call.require(legal, f"has the impossible shape {shape[:8]}")
    if -1 in shape:
        fits = known > 0 and x.codes.size % known == 0
    else:
        fits = known == x.codes.size
    call.require(fits, f"reshapes {x.shape} to {shape[:8]}")
    return x.codes.reshape(shape)


def transpose(call: Call) -> np.ndarray:
    """The dimensions in another order."""
    x, order = call.arguments(2)
    _moved(call, x)
    axes = call.constant(order, "int32")
    call.require(sorted(axes) == list(range(len(x.shape))), f"transposes {x.shape} by {axes}")
    return x.codes.transpose(axes)


def tile(call: Call) -> np.ndarray:
    """The tensor, repeated along each dimension."""
    x, times = call.arguments(2)
    _moved(call, x)
    counts = call.constant(times, "int32", "int64")
    legal = len(counts) == len(x.shape) and min(counts, default=1) >= 0
    call.require(legal, f"repeats {x.shape} {counts} times")
    call.require_size(tuple(size * n for size, n in zip(x.shape, counts, strict=True)))
    return np.tile(x.codes, counts)


def squeeze(call: Call) -> np.ndarray:
    """Drops the named dimensions of size 1, or all of them when none is named."""
    (x,) = call.arguments(1)
    _moved(call, x)
    named = call.option("squeezeDims")
    rank = len(x.shape)
    named = {call.axis(int(d), rank) for d in (() if named is None else named)}
    call.require(all(x.shape[d] == 1 for d in named), f"squeezes {sorted(named)} of {x.shape}")
    return x.codes.squeeze(tuple(named)) if named else x.codes.squeeze()


def expand_dims(call: Call) -> np.ndarray:
    """Inserts a dimension of size 1."""
    x, axis = call.arguments(2)
    _moved(call, x)
    numbers = call.constant(axis, "int32", "int64")
    call.require(len(numbers) == 1, f"names {len(numbers)} dimensions")
    return np.expand_dims(x.codes, call.axis(numbers[0], len(x.shape) + 1))


def split(call: Call) -> list[np.ndarray]:
    """Equal parts along a dimension, one per output."""
    axis, x = call.arguments(2)
    _moved(call, x)
    numbers, parts = call.constant(axis, "int32"), len(call.outputs)
    call.require(len(numbers) == 1 and parts > 0, "names no dimension or writes nothing")
    dimension = call.axis(numbers[0], len(x.shape))
    fits = call.option("numSplits") == parts and x.shape[dimension] % parts == 0
    call.require(fits, f"splits dimension {dimension} of {x.shape} into {parts}")
    return np.split(x.codes, parts, dimension)


def slice_(call: Call) -> np.ndarray:
    """`size` codes from `begin` on; size -1 = the rest."""
    x, begin, size = call.arguments(3)
    _moved(call, x)
    begins = call.constant(begin, "int32", "int64")
    sizes = call.constant(size, "int32", "int64")
    call.require(len(begins) == len(sizes) == len(x.shape), f"slices a tensor of shape {x.shape}")
    cuts = []
    for start, count, length in zip(begins, sizes, x.shape, strict=True):
        stop = length if count == -1 else start + count
        call.require(0 <= start <= stop <= length, f"takes {start}:{stop} of {length}")
        cuts.append(slice(start, stop))
    return x.codes[tuple(cuts)]


def strided_slice(call: Call) -> np.ndarray:
    """NumPy's `x[begin:end:stride, …]`, with masks for open ends and dropped dimensions."""
    x, *indices = call.arguments(4)
    _moved(call, x)
    for mask in ("ellipsisMask", "newAxisMask", "offset"):
        call.require(not call.option(mask), f"has the option {mask}, which is not simulated")
    begins, ends, strides = (call.constant(value, "int32") for value in indices)
    same = len(begins) == len(ends) == len(strides) <= len(x.shape)
    call.require(same and 0 not in strides, f"slices {x.shape} with strides {strides}")
    cuts = []
    for d, (begin, end, stride) in enumerate(zip(begins, ends, strides, strict=True)):
        opens, ends_open, shrinks = (
            call.option(f"{mask}Mask") >> d & 1 for mask in ("begin", "end", "shrinkAxis")
        )
        if shrinks:
            begin = 0 if opens and stride > 0 else -1 if opens else begin
            cuts.append(call.axis(begin, x.shape[d]))
        else:
            cuts.append(slice(None if opens else begin, None if ends_open else end, stride))
    return x.codes[tuple(cuts)]


def _resized(call: Call) -> tuple[Value, tuple[int, int], bool, bool]:
    x, size = call.arguments(2)
    _moved(call, x)
    call.require(len(x.shape) == 4 and min(x.shape) > 0, f"resizes a tensor of shape {x.shape}")
    target = tuple(call.constant(size, "int32"))
    call.require(len(target) == 2 and min(target) > 0, f"resizes to {target}")
    call.require_size((x.shape[0], *target, x.shape[3]))
    return x, target, bool(call.option("alignCorners")), bool(call.option("halfPixelCenters"))


def resize_nearest_neighbor(call: Call) -> np.ndarray:
    """The nearest code; positions are computed in float32."""
    x, target, corners, centers = _resized(call)
    rows, columns = (
        _nearest(*sizes, corners, centers) for sizes in zip(x.shape[1:3], target, strict=True)
    )
    return x.codes[:, rows[:, None], columns]


def _nearest(size: int, target: int, corners: bool, centers: bool) -> np.ndarray:
    scale = np.float32(size) / np.float32(target)
    if corners and target > 1:
        scale = np.float32(size - 1) / np.float32(target - 1)
    places = (np.arange(target).astype(np.float32) + np.float32(0.5 * centers)) * scale
    places = round_away(places) if corners else np.floor(places)
    return np.clip(places.astype(np.int64), 0, size - 1)


def resize_bilinear(call: Call) -> np.ndarray:
    """Four codes weighed in 10-bit fixed point, halves away from zero."""
    x, target, corners, centers = _resized(call)
    call.require(x.dtype in ("int8", "int16"), f"interpolates {x.dtype}")
    call.require(not (corners and centers), "aligns corners and has half-pixel centers")
    rows, columns = (
        _between(*sizes, corners, centers) for sizes in zip(x.shape[1:3], target, strict=True)
    )
    codes = x.codes.astype(np.int64)
    total = np.zeros((x.shape[0], *target, x.shape[3]), np.int64)
    for row, row_weight in rows:
        for column, weight in columns:
            corner = codes[:, row[:, None], column]
            total += corner * row_weight[:, None, None] * weight[:, None]
    half = np.where(total > 0, 1 << 19, -(1 << 19))
    total = total + half
    return np.sign(total) * (np.abs(total) >> 20)


def _between(size: int, target: int, corners: bool, centers: bool):
    """((lower pixels, weights), (upper pixels, weights)), weights in 1/1024."""
    scale = (1024 * size + target // 2) // target
    if corners and target > 1:
        scale = (1024 * (size - 1) + (target - 1) // 2) // (target - 1)
    places = np.arange(target, dtype=np.int64) * scale
    if centers:
        places = places + scale // 2 - 512
    lower = np.maximum(places // 1024, 0)
    upper = np.minimum((places + 1023) // 1024, size - 1)
    fraction = places - 1024 * lower
    return (lower, 1024 - fraction), (upper, fraction)


KERNELS: dict[str, Callable[[Call], np.ndarray | list[np.ndarray]]] = {
    "CONCATENATION": concatenation,
    "EXPAND_DIMS": expand_dims,
    "PAD": pad,
    "PADV2": pad,
    "RESHAPE": reshape,
    "RESIZE_BILINEAR": resize_bilinear,
    "RESIZE_NEAREST_NEIGHBOR": resize_nearest_neighbor,
    "SLICE": slice_,
    "SPLIT": split,
    "SQUEEZE": squeeze,
    "STRIDED_SLICE": strided_slice,
    "TILE": tile,
    "TRANSPOSE": transpose,
}
