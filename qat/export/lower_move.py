"""Keras layers that move, repeat or pick values → TRANSPOSE, SLICE, TILE, resizes, 3-D maxima.

None of them changes a grid; bilinear resizing averages codes.
"""

from __future__ import annotations

import tf_keras
from ai_edge_litert import schema_py_generated as schema

from qat.export.builder import Builder, Stored
from qat.export.lower_linear import PADDING
from qat.export.lower_shape import pool_options

layers = tf_keras.layers
Shape = tuple[int, ...]


def _permute(builder, layer: layers.Permute, inputs, shape):
    order = {"order": (0, *layer.dims)}
    options = schema.TransposeOptionsT()
    return builder.moved(
        inputs[0], layer.name, shape, "TRANSPOSE",
        options=options, constants=order,
    )  # fmt: skip


def _repeat(builder, layer: layers.RepeatVector, inputs, shape):
    (x,) = inputs
    row = builder.reshape(x, (1, 1, x.shape[-1]), f"{layer.name}/row")
    options, times = schema.TileOptionsT(), {"times": (1, layer.n, 1)}
    return builder.moved(
        row, layer.name, shape, "TILE", options=options, version=1, constants=times
    )


def _crop(builder, layer, inputs, shape):
    cuts = [layer.cropping] if len(shape) == 3 else layer.cropping
    constants = {"begin": (0, *(first for first, _ in cuts), 0), "size": (-1, *shape[1:])}
    return builder.moved(
        inputs[0], layer.name, shape, "SLICE",
        options=schema.SliceOptionsT(), constants=constants,
    )  # fmt: skip


def _resize(builder: Builder, x: Stored, name: str, size: tuple[int, int], interpolation: str):
    """Rows and columns of [batch, height, width, depth], half-pixel centers as in Keras."""
    operator = "RESIZE_NEAREST_NEIGHBOR" if interpolation == "nearest" else "RESIZE_BILINEAR"
    options = getattr(schema, f"{_OPTIONS[operator]}T")()
    options.alignCorners, options.halfPixelCenters = False, True
    return builder.moved(
        x, name, (x.shape[0], *size, x.shape[3]), operator,
        options=options, version=3, constants={"size": size},
    )  # fmt: skip


_OPTIONS = {
    "RESIZE_NEAREST_NEIGHBOR": "ResizeNearestNeighborOptions",
    "RESIZE_BILINEAR": "ResizeBilinearOptions",
}


def _resize_image(builder, layer, inputs, shape):
    return _resize(builder, inputs[0], layer.name, shape[1:3], layer.interpolation)


def _lengthen(builder, layer: layers.UpSampling1D, inputs, shape):
    (x,) = inputs
    image = builder.reshape(x, (1, x.shape[1], 1, x.shape[2]), f"{layer.name}/image")
    resized = _resize(builder, image, f"{layer.name}/rows", (shape[1], 1), "nearest")
    return builder.reshape(resized, shape, layer.name)


def _in_two_steps(builder: Builder, name: str, x: Stored, shape: Shape, step) -> Stored:
    """A window on [batch, d, h, w, depth]: first on h and w, then on d.

    step: `(image, name, output's rows and columns, index) → image`; index 0 is that of h and w.
    """
    depth, channels = x.shape[1], x.shape[4]
    planes = builder.reshape(x, (depth, *x.shape[2:]), f"{name}/planes")
    planes = step(planes, f"{name}/in_plane", shape[2:4], 0)
    area = shape[2] * shape[3]
    column = builder.reshape(planes, (1, depth, area, channels), f"{name}/column")
    column = step(column, f"{name}/across", (shape[1], area), 1)
    return builder.reshape(column, shape, name)


def _upsample_3d(builder, layer: layers.UpSampling3D, inputs, shape):
    def step(image, name, size, index):
        return _resize(builder, image, name, size, "nearest")

    return _in_two_steps(builder, layer.name, inputs[0], shape, step)


def _pool_3d(operator: str):
    """Exact for maxima; averages of averages are rounded twice."""

    def lower(builder, layer, inputs, shape):
        (depth, *window), (depth_stride, *strides) = layer.pool_size, layer.strides
        windows = [(window, strides), ((depth, 1), (depth_stride, 1))]

        def step(image, name, size, index):
            options = pool_options(PADDING[layer.padding], *windows[index])
            return builder.moved(
                image, name, (image.shape[0], *size, image.shape[3]), operator,
                options=options,
            )  # fmt: skip

        return _in_two_steps(builder, layer.name, inputs[0], shape, step)

    return lower


LOWERINGS = {
    layers.Permute: _permute,
    layers.RepeatVector: _repeat,
    **dict.fromkeys((layers.Cropping1D, layers.Cropping2D, layers.Cropping3D), _crop),
    layers.UpSampling1D: _lengthen,
    layers.UpSampling2D: _resize_image,
    layers.UpSampling3D: _upsample_3d,
    layers.Resizing: _resize_image,
    layers.MaxPooling3D: _pool_3d("MAX_POOL_2D"),
    layers.AveragePooling3D: _pool_3d("AVERAGE_POOL_2D"),
}
