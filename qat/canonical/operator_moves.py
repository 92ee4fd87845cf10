"""TensorFlow functions that move or pick numbers → layers: shapes, slices, paddings, resizing.

Each function takes an `OperatorCall` and the arguments of the TensorFlow function under their
names there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tf_keras

from qat.canonical.operator_call import NoLayerError, OperatorCall, constants, integers, is_tensor
from qat.operator_layers import Pad, Slice

layers = tf_keras.layers


def _shape(call: OperatorCall, **_) -> Any:
    raise NoLayerError("sizes are computed in the model; give them as numbers")


def _concat(call: OperatorCall, values: list, axis: Any) -> Any:
    values = list(values)
    if not all(is_tensor(value) for value in values):
        raise NoLayerError("it joins constants to a tensor; pad instead")
    axis = call.axis(axis, len(values[0].shape))
    return call.layer(layers.Concatenate, axis)(values) if len(values) > 1 else values[0]


def _stack(call: OperatorCall, values: list, axis: Any) -> Any:
    axis = call.axis(axis, len(values[0].shape) + 1)
    shape = list(values[0].shape[1:])
    shape.insert(axis - 1, 1)
    values = [call.reshaped(x, shape, f"row{i}") for i, x in enumerate(values)]
    return call.layer(layers.Concatenate, axis)(values) if len(values) > 1 else values[0]


def _getitem(call: OperatorCall, tensor: Any, slice_spec: Any, **_) -> Any:
    """A slice of every axis; then a reshape drops and inserts axes."""
    spec = list(slice_spec) if isinstance(slice_spec, list | tuple) else [slice_spec]
    rank = len(tensor.shape)
    if any(part is Ellipsis for part in spec):
        at = next(i for i, part in enumerate(spec) if part is Ellipsis)
        named = sum(part is not None for part in spec) - 1
        spec[at : at + 1] = [{}] * (rank - named)
    parts = [part for part in spec if part is not None]
    parts = [_slice(part) for part in parts + [{}] * (rank - len(parts))]
    if parts[0] not in ([None, None, None], [0, None, None], [0, None, 1]) or spec[:1] == [None]:
        raise NoLayerError("it works on axis 0, the batch")
    sliced = tensor
    if any(part != [None, None, None] for part in parts[1:]):
        sliced = call.layer(Slice, parts[1:])(tensor)
    return call.reshaped(sliced, call.shape[1:], "shape")


def _slice(part: Any) -> list[int | None]:
    """[start, stop, step] of an integer or of a slice, which Keras hands over as a dictionary."""
    if isinstance(part, slice):
        part = {"start": part.start, "stop": part.stop, "step": part.step}
    if not isinstance(part, dict):
        (index,) = integers(part)
        return [index, index + 1 if index != -1 else None, None]
    keys = (part.get(key) for key in ("start", "stop", "step"))
    return [None if value is None else integers(value)[0] for value in keys]


def _cut(call: OperatorCall, x: Any, axis: int, start: int, size: int, suffix: str) -> Any:
    slices = [[None, None, None] for _ in x.shape[1:]]
    slices[axis - 1] = [start, start + size, None]
    return call.layer(Slice, slices, suffix=suffix)(x)


def _split(call: OperatorCall, value: Any, num_or_size_splits: Any, axis: Any, **_) -> list:
    axis = call.axis(axis, len(value.shape))
    sizes, whole = constants(num_or_size_splits), value.shape[axis]
    if whole is None:
        raise NoLayerError("the size of its axis is unknown; fix the model's input size")
    sizes = [whole // int(sizes)] * int(sizes) if sizes.ndim == 0 else [int(n) for n in sizes]
    sizes = [n if n >= 0 else whole - sum(sizes) - 1 for n in sizes]
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return [
        _cut(call, value, axis, start, size, f"part{i}")
        for i, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]


def _unstack(call: OperatorCall, value: Any, axis: Any, **_) -> list:
    axis = call.axis(axis, len(value.shape))
    parts = [_cut(call, value, axis, i, 1, f"part{i}") for i in range(len(call.call.outputs))]
    return [call.reshaped(part, call.shape[1:], f"shape{i}") for i, part in enumerate(parts)]


def _resize(call, images: Any, size: Any, method: Any, preserve_aspect_ratio, antialias) -> Any:
    method = str(getattr(method, "value", method))
    if method not in ("bilinear", "nearest") or antialias or preserve_aspect_ratio:
        raise NoLayerError("only 'bilinear' and 'nearest', without antialias, can stay in integers")
    height, width = integers(size)
    return call.layer(layers.Resizing, height, width, interpolation=method)(images)


def _pad(call: OperatorCall, paddings: Any, mode: str, constant_values: Any, **given) -> Any:
    (x,) = given.values()
    if mode.upper() != "CONSTANT" or constants(constant_values).any():
        raise NoLayerError("only zeros can be padded")
    pairs = constants(paddings).astype(int).tolist()
    if pairs[0] != [0, 0]:
        raise NoLayerError("it works on axis 0, the batch")
    spatial, kind = pairs[1:-1], {1: layers.ZeroPadding1D, 2: layers.ZeroPadding2D}
    if pairs[-1] == [0, 0] and len(spatial) in kind:
        amounts = tuple(tuple(pair) for pair in spatial)
        return call.layer(kind[len(spatial)], amounts if len(spatial) > 1 else amounts[0])(x)
    return call.layer(Pad, pairs[1:])(x)


def _reshape(call: OperatorCall, tensor: Any, shape: Any) -> Any:
    """Sizes after the batch must be numbers, one of them perhaps -1; the batch is the input's."""
    batch, *sizes = list(shape) if isinstance(shape, list | tuple) else integers(shape)
    sizes = integers(sizes) if sizes else []
    whole = tensor.shape[1:].num_elements()
    keeps = whole is None or -1 in sizes or int(np.prod(sizes)) == whole
    if -1 in sizes and not is_tensor(batch) and batch != tensor.shape[0]:
        keeps = False
    if not keeps:
        raise NoLayerError("it moves numbers between examples of the batch")
    known = [size for size in sizes if size != -1]
    if -1 in sizes and whole is not None:
        sizes[sizes.index(-1)] = whole // int(np.prod(known))
    return call.reshaped(tensor, [None if size == -1 else size for size in sizes])


def _transpose(call: OperatorCall, a: Any, perm: Any, **_) -> Any:
    order = None if perm is None else integers(perm)
    if order is None or order[0] != 0:
        raise NoLayerError("it moves axis 0, the batch")
    return call.layer(layers.Permute, tuple(order[1:]))(a)


def _same_numbers(call: OperatorCall, **arguments: Any) -> Any:
    """expand_dims and squeeze: the output's shape says it all, the batch in front."""
    x = next(value for value in arguments.values() if is_tensor(value))
    if call.shape[:1] != tuple(x.shape[:1]):
        raise NoLayerError("it works on axis 0, the batch")
    return call.reshaped(x, call.shape[1:])


def _cast(call: OperatorCall, x: Any, dtype: Any) -> Any:
    if call.call.outputs[0].dtype != x.dtype:
        raise NoLayerError(f"it changes {x.dtype.name}; let the model take float32 inputs")
    return x


def _identity(call: OperatorCall, input: Any) -> Any:
    return input


def _tile(call: OperatorCall, input: Any, multiples: Any) -> Any:
    times = integers(multiples)
    if times[0] != 1:
        raise NoLayerError("it works on axis 0, the batch")
    for axis, count in enumerate(times):
        if count > 1:
            input = call.layer(layers.Concatenate, axis, suffix=f"axis{axis}")([input] * count)
    return input


def _blocks(call: OperatorCall, input: Any, block_size: Any, *, to_space: bool) -> Any:
    """Depth to space or back: two reshapes and a transposition."""
    height, width, depth = input.shape[1:]
    block = integers(block_size)[0]
    if None in (height, width):
        raise NoLayerError("it needs fixed sizes; fix the model's input size")
    split = (height // block, block, width // block, block, depth)
    if to_space:
        split = (height, width, block, block, depth // block**2)
    x = call.reshaped(input, split, "blocks")
    x = call.layer(layers.Permute, (1, 3, 2, 4, 5), suffix="order")(x)
    return call.reshaped(x, call.shape[1:])


def _depth_to_space(call: OperatorCall, input: Any, block_size: Any, data_format: str) -> Any:
    return _blocks(call, input, block_size, to_space=True)


def _space_to_depth(call: OperatorCall, input: Any, block_size: Any, data_format: str) -> Any:
    return _blocks(call, input, block_size, to_space=False)


REWRITES: dict[str, Callable[..., Any]] = {
    "__operators__.getitem": _getitem,
    "cast": _cast,
    "concat": _concat,
    "expand_dims": _same_numbers,
    "identity": _identity,
    "image.resize": _resize,
    "nn.depth_to_space": _depth_to_space,
    "nn.space_to_depth": _space_to_depth,
    "pad": _pad,
    "reshape": _reshape,
    "shape": _shape,
    "split": _split,
    "squeeze": _same_numbers,
    "stack": _stack,
    "tile": _tile,
    "transpose": _transpose,
    "unstack": _unstack,
}
