"""Damaged .tflite files: mutants of a whole one, the same on every run, and foreign ones."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable, Iterator

from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.tools import flatbuffer_utils

Mutant = tuple[str, bytes]
WILD = (-(2**31), -1, 0, 1, 3, 2**15, 2**31 - 1)
ENUMS = ("padding", "fusedActivationFunction", "weightsFormat", "quantizedBiasType")


def mutants(content: bytes, count: int, seed: int = 0) -> Iterator[Mutant]:
    """(what was done, content) of `count` damaged copies, all kinds in turn."""
    rng = random.Random(seed)
    for number in range(count):
        damage = KINDS[number % len(KINDS)]
        yield f"{damage.__name__.strip('_')} {number}", damage(content, rng)


def foreign() -> dict[str, bytes]:
    """{what it is: content} of files that never were a .tflite."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as zipped:
        zipped.writestr("model.json", "{}")
    noise = random.Random(0).randbytes
    return {
        "empty": b"",
        "one byte": b"\x1c",
        "text": b"these are not the weights that you are looking for\n" * 9,
        "png": b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + bytes(64),
        "zip": archive.getvalue(),
        "saved_model.pb": b"\x08\x01\x12\x9a\x2c\x0a\x06\x0a\x04Func" + noise(300),
        "hdf5": b"\x89HDF\r\n\x1a\n" + bytes(88),
        "mark alone": b"\x1c\x00\x00\x00TFL3",
        "mark and zeros": b"\x1c\x00\x00\x00TFL3" + bytes(4096),
        "mark and ones": b"\x1c\x00\x00\x00TFL3" + b"\xff" * 4096,
        "mark and noise": b"\x1c\x00\x00\x00TFL3" + noise(4096),
        "mark and text": b"\x1c\x00\x00\x00TFL3" + b"lorem ipsum " * 400,
    }


def _truncated(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


def _one_bit(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, range(len(content)), 1)


def _many_bits(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, range(len(content)), rng.randrange(2, 64))


def _structure_bit(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, _structure(content), 1)


def _structure_bits(content: bytes, rng: random.Random) -> bytes:
    return _flipped(content, rng, _structure(content), rng.randrange(2, 9))


def _byte(content: bytes, rng: random.Random) -> bytes:
    place = rng.choice(_structure(content))
    return content[:place] + rng.randbytes(1) + content[place + 1 :]


def _zeroed(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content)), rng.choice((4, 16, 64, 512))
    return content[:start] + bytes(len(content[start : start + length])) + content[start + length :]


def _copied(content: bytes, rng: random.Random) -> bytes:
    """A span over another one of the same length."""
    length = rng.choice((4, 16, 64, 512))
    source, target = (rng.randrange(len(content) - length) for _ in range(2))
    return content[:target] + content[source : source + length] + content[target + length :]


def _cut_out(content: bytes, rng: random.Random) -> bytes:
    """A span missing: all that follows it moves."""
    start = rng.randrange(8, len(content))
    return content[:start] + content[start + rng.choice((1, 4, 64)) :]


def _inserted(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(8, len(content))
    return content[:start] + rng.randbytes(rng.choice((1, 4, 64))) + content[start:]


def _edited(content: bytes, rng: random.Random) -> bytes:
    """A sound flatbuffer that states something absurd: no check of offsets can see it."""
    model = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    rng.choice(EDITS)(model, rng)
    return bytes(flatbuffer_utils.convert_object_to_bytearray(model))


def _structure(content: bytes) -> list[int]:
    """Places outside the constants: offsets, tables, shapes, indices, scales."""
    places = set(range(len(content)))
    for buffer in flatbuffer_utils.convert_bytearray_to_object(bytearray(content)).buffers:
        if buffer.data is not None and len(buffer.data) > 16:
            start = content.find(bytes(buffer.data))
            places -= set(range(start, start + len(buffer.data)))
    return sorted(places)


def _flipped(content: bytes, rng: random.Random, places, count: int) -> bytes:
    damaged = bytearray(content)
    for _ in range(count):
        damaged[rng.choice(places)] ^= 1 << rng.randrange(8)
    return bytes(damaged)


def _shape(model: schema.ModelT, rng: random.Random) -> None:
    shapes = [tensor.shape for tensor in model.subgraphs[0].tensors]
    shape = rng.choice([shape for shape in shapes if shape is not None and len(shape)])
    shape[rng.randrange(len(shape))] = rng.choice(WILD)


def _rank(model: schema.ModelT, rng: random.Random) -> None:
    tensor = rng.choice(model.subgraphs[0].tensors)
    tensor.shape = [1] * rng.choice((0, 1, 3, 9, 1000))


def _type(model: schema.ModelT, rng: random.Random) -> None:
    rng.choice(model.subgraphs[0].tensors).type = rng.randrange(20)


def _grid(model: schema.ModelT, rng: random.Random) -> None:
    grids = [t.quantization for t in model.subgraphs[0].tensors if t.quantization is not None]
    grid = rng.choice([grid for grid in grids if grid.scale is not None])
    grid.scale = rng.choice(([], [0.0], [float("nan")], [1e30], [-1.0], [0.1, 0.2]))


def _axis(model: schema.ModelT, rng: random.Random) -> None:
    grids = [t.quantization for t in model.subgraphs[0].tensors if t.quantization is not None]
    rng.choice(grids).quantizedDimension = rng.choice(WILD)


def _indices(model: schema.ModelT, rng: random.Random) -> None:
    op, graph = rng.choice(model.subgraphs[0].operators), model.subgraphs[0]
    indices = rng.choice((op.inputs, op.outputs, graph.inputs, graph.outputs))
    indices[rng.randrange(len(indices))] = rng.choice((*WILD, rng.randrange(len(graph.tensors))))


def _arity(model: schema.ModelT, rng: random.Random) -> None:
    op = rng.choice(model.subgraphs[0].operators)
    op.inputs = list(op.inputs)[: rng.randrange(3)] + [0] * rng.randrange(3)


def _kind(model: schema.ModelT, rng: random.Random) -> None:
    code = rng.choice(model.operatorCodes)
    code.builtinCode = code.deprecatedBuiltinCode = rng.randrange(127)


def _option(model: schema.ModelT, rng: random.Random) -> None:
    found = [op.builtinOptions for op in model.subgraphs[0].operators]
    options = rng.choice([options for options in found if options is not None])
    names = [name for name, value in vars(options).items() if isinstance(value, int)]
    wild = (-(2**31), -1, 0, 3, 2**30)
    for name in names:
        if rng.random() < 0.5 and not isinstance(getattr(options, name), bool):
            setattr(options, name, rng.choice((0, 1, 4) if name in ENUMS else wild))


def _buffer(model: schema.ModelT, rng: random.Random) -> None:
    tensor = rng.choice(model.subgraphs[0].tensors)
    tensor.buffer = rng.choice((0, rng.randrange(len(model.buffers)), 2**32 - 1))


def _data(model: schema.ModelT, rng: random.Random) -> None:
    buffer = rng.choice([b for b in model.buffers if b.data is not None and len(b.data)])
    buffer.data = bytes(rng.randbytes(rng.choice((1, 4, len(buffer.data)))))


EDITS: tuple[Callable, ...] = (
    _shape,
    _shape,
    _rank,
    _type,
    _grid,
    _axis,
    _indices,
    _indices,
    _arity,
    _kind,
    _option,
    _buffer,
    _data,
)
KINDS: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _truncated,
    _one_bit,
    _many_bits,
    _structure_bit,
    _structure_bits,
    _byte,
    _zeroed,
    _copied,
    _cut_out,
    _inserted,
    _edited,
    _edited,
)
