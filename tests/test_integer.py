"""The integer simulator against LiteRT's reference kernels: no code may differ."""

from __future__ import annotations

import ast
import pathlib
import time

import integer_cases as cases
import integer_moves as moves
import integer_pointwise as pointwise
import numpy as np
import pytest
from ai_edge_litert.interpreter import OpResolverType
from hypothesis import HealthCheck, given, settings
from single_operator import Operator, Tensor, constant, model, reference

from qat.verify import integer
from qat.verify.integer import SimulationError, Simulator, simulate

UNIT_INTERVAL = {"int8": (1 / 256, -128), "int16": (1 / 32768, 0)}
SUITE = {
    "ADD": pointwise.binary("ADD"),
    "AVERAGE_POOL_2D": cases.pool("AVERAGE_POOL_2D"),
    "BATCH_MATMUL": cases.batch_matmul(),
    "CAST, GATHER": moves.lookup(),
    "CONCATENATION": moves.concatenation(),
    "CONV_2D": cases.conv_2d(),
    "DEPTHWISE_CONV_2D": cases.depthwise_conv_2d(),
    "DEQUANTIZE": moves.dequantize(),
    "DEQUANTIZE, QUANTIZE of a constant": moves.unpacked_kernel(),
    "ELU": pointwise.unary("ELU", types=("int8",)),
    "EXP": pointwise.unary("EXP", types=("int8",), high=0.05),
    "FULLY_CONNECTED": cases.fully_connected(),
    "GELU": pointwise.unary("GELU", types=("int8",)),
    "GREATER_EQUAL": pointwise.greater_equal(),
    "HARD_SWISH": pointwise.unary("HARD_SWISH", types=("int8",)),
    "LEAKY_RELU": pointwise.unary("LEAKY_RELU"),
    "LOGISTIC": pointwise.unary("LOGISTIC", grids=UNIT_INTERVAL),
    "MAXIMUM": pointwise.extreme("MAXIMUM"),
    "MAX_POOL_2D": cases.pool("MAX_POOL_2D"),
    "MEAN": cases.reduction("MEAN"),
    "MINIMUM": pointwise.extreme("MINIMUM"),
    "MUL": pointwise.binary("MUL"),
    "PAD, PADV2": moves.pad(),
    "PRELU": pointwise.prelu(),
    "QUANTIZE": moves.quantize(),
    "REDUCE_MAX": cases.reduction("REDUCE_MAX"),
    "RELU": pointwise.unary("RELU"),
    "RELU6": pointwise.unary("RELU6"),
    "RESHAPE, SQUEEZE, EXPAND_DIMS": moves.reshaping(),
    "RESIZE_BILINEAR, RESIZE_NEAREST_NEIGHBOR": moves.resizing(),
    "SELECT_V2": pointwise.select_v2(),
    "SLICE": moves.slicing(),
    "SOFTMAX": pointwise.unary("SOFTMAX", grids=UNIT_INTERVAL),
    "SPLIT": moves.split(),
    "STRIDED_SLICE": moves.strided_slicing(),
    "TRANSPOSE": moves.transpose(),
    "SUB": pointwise.binary("SUB"),
    "TANH": pointwise.unary("TANH", grids={"int16": UNIT_INTERVAL["int16"]}),
    "TILE": moves.tile(),
    "TRANSPOSE_CONV": cases.transpose_conv(),
}
NOT_IN_REFERENCE = {"ELU": OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES}
FAST_EXAMPLES, SLOW_EXAMPLES = 40, 400


def _compare(operator: str, examples: int) -> None:
    resolver = NOT_IN_REFERENCE.get(operator, OpResolverType.BUILTIN_REF)

    @settings(max_examples=examples, suppress_health_check=[HealthCheck.too_slow])
    @given(SUITE[operator])
    def check(case):
        content, inputs = case
        for ours, theirs in zip(
            simulate(content, *inputs),
            reference(content, *inputs, resolver=resolver),
            strict=True,
        ):
            assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
            np.testing.assert_array_equal(ours, theirs)

    check()


@pytest.mark.parametrize("operator", SUITE)
def test_operator_equals_the_reference_kernel(operator):
    _compare(operator, FAST_EXAMPLES)


@pytest.mark.slow
@pytest.mark.parametrize("operator", SUITE)
def test_operator_equals_the_reference_kernel_often(operator):
    assert SLOW_EXAMPLES * len(SUITE) >= 10_000
    _compare(operator, SLOW_EXAMPLES)


@pytest.mark.parametrize("operator", ["LOGISTIC", "TANH"])
@pytest.mark.parametrize("scale", [2.0**-12, 2.0**-11, 1e-3, 3.1e-4, 0.01])
def test_every_int16_code_of_a_curve(operator, scale):
    x = Tensor(dtype="int16", shape=(1, 65536), scale=scale)
    y = Tensor(dtype="int16", shape=(1, 65536), scale=1 / 32768)
    content = model(Operator(name=operator, inputs=[x], outputs=[y], options={}))
    codes = np.arange(-32768, 32768).astype(np.int16)[None]
    np.testing.assert_array_equal(simulate(content, codes)[0], reference(content, codes)[0])


def test_every_simulated_operator_is_in_the_suite():
    named = {name for key in SUITE for name in key.removesuffix(" of a constant").split(", ")}
    assert named == set(integer._KERNELS)


def test_the_simulator_shares_no_code_with_the_exporter():
    folder = pathlib.Path(integer.__file__).parent
    files = [folder / "arithmetic.py", folder / "reader.py", *folder.glob("integer*.py")]
    imported = set()
    for file in files:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported |= {f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                imported |= {alias.name for alias in node.names}
    ours = {name for name in imported if name.startswith("qat.")}
    assert {".".join(name.split(".")[:2]) for name in ours} <= {"qat.verify", "qat.errors"}
    litert = {name for name in imported if name.startswith(("ai_edge_litert", "tensorflow", "tf_"))}
    assert litert == {"ai_edge_litert.schema_py_generated"}


def _chain() -> bytes:
    """Eight operators in a row, with every kind of constant."""
    rng = np.random.default_rng(0)

    def grid(shape, scale=0.05, zero_point=3):
        return Tensor(dtype="int8", shape=shape, scale=scale, zero_point=zero_point)

    def kernel(dtype, shape, axis):
        high = 8 if dtype == "int4" else 128
        scales = rng.uniform(0.01, 0.05, shape[axis])
        return constant(rng.integers(1 - high, high, shape), dtype, scale=scales, axis=axis)

    def bias(size):
        return constant(rng.integers(-500, 500, size), scale=np.ones(size))

    def operator(name, inputs, output, **options):
        return Operator(name=name, inputs=inputs, outputs=[output], options=options)

    stride = {"strideH": 1, "strideW": 1}
    dilation = {"dilationHFactor": 1, "dilationWFactor": 1}
    window = {"filterHeight": 2, "filterWidth": 2, "strideH": 2, "strideW": 2}
    x, a, b, c = grid((1, 8, 8, 2)), grid((1, 8, 8, 4)), grid((1, 8, 8, 4)), grid((1, 10, 10, 4))
    e, f, g, h = grid((1, 5, 5, 4)), grid((1, 10, 10, 2)), grid((1, 200)), grid((1, 6))
    return model(
        operator("CONV_2D", [x, kernel("int4", (4, 3, 3, 2), 0), bias(4)], a, **stride, **dilation),
        operator(
            "DEPTHWISE_CONV_2D", [a, kernel("int8", (1, 3, 3, 4), 3), bias(4)], b, **stride,
            **dilation, depthMultiplier=1, fusedActivationFunction=1,
        ),
        operator("PAD", [b, constant([[0, 0], [1, 1], [1, 1], [0, 0]])], c),
        operator("MAX_POOL_2D", [c], e, **window),
        operator(
            "TRANSPOSE_CONV",
            [constant((1, 10, 10, 2)), kernel("int8", (2, 3, 3, 4), 0), e, bias(2)], f,
            strideH=2, strideW=2,
        ),
        operator("RESHAPE", [f, constant([-1, 200])], g, newShape=[-1, 200]),
        operator("FULLY_CONNECTED", [g, kernel("int8", (6, 200), 0), bias(6)], h),
        operator("SOFTMAX", [h], grid((1, 6), 1 / 256, -128), beta=1.0),
    )  # fmt: skip


@pytest.fixture(scope="module")
def chain():
    return _chain()


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).integers(-128, 128, (3, 8, 8, 2)).astype(np.int8)


def test_all_tensors_of_a_chain(chain, images):
    theirs = reference(chain, images[:1], every_tensor=True)
    ours = Simulator(chain).tensors(images[:1])
    assert len(ours) == 9
    for name, codes in ours.items():
        np.testing.assert_array_equal(codes, theirs[name], err_msg=name)


def test_several_examples_at_once(chain, images):
    together = simulate(chain, images)[0]
    alone = [simulate(chain, image[None])[0] for image in images]
    np.testing.assert_array_equal(together, np.concatenate(alone))


def test_a_path_serves_like_bytes(chain, images, tmp_path):
    path = tmp_path / "model.tflite"
    path.write_bytes(chain)
    np.testing.assert_array_equal(simulate(path, images)[0], simulate(chain, images)[0])


def test_damaged_files_are_refused_or_simulated(chain, images):
    rng, refused = np.random.default_rng(2), 0
    started = time.monotonic()
    for _ in range(200):
        damaged = bytearray(chain)
        for place in rng.integers(0, len(damaged), rng.integers(1, 9)):
            damaged[place] = rng.integers(256)
        try:
            simulate(bytes(damaged), images[:1])
        except SimulationError as error:
            refused += 1
            assert "\n" not in str(error)
    assert refused > 20
    assert time.monotonic() - started < 60


def test_truncated_files_are_refused(chain, images):
    for length in range(0, len(chain) - 8, 97):
        with pytest.raises(SimulationError):
            simulate(chain[:length], images[:1])


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"\x00" * 64])
def test_foreign_bytes_are_refused(content):
    with pytest.raises(SimulationError, match="not a .tflite file"):
        Simulator(content)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(SimulationError, match="absent.tflite: No such file"):
        Simulator(tmp_path / "absent.tflite")


def test_inputs_that_do_not_fit_are_refused(chain, images):
    with pytest.raises(SimulationError, match="the file has 1 inputs, got 2"):
        simulate(chain, images, images)
    with pytest.raises(SimulationError, match="is int8, got float64"):
        simulate(chain, images.astype(float))
    with pytest.raises(SimulationError, match=r"shape \(1, 8, 8, 2\), got \(3, 8, 7, 2\)"):
        simulate(chain, images[:, :, 1:])


def _unary(name: str, x: Tensor, y: Tensor, **options) -> bytes:
    return model(Operator(name=name, inputs=[x], outputs=[y], options=options))


@pytest.mark.parametrize(
    ("name", "x", "y", "message"),
    [
        ("RELU", {"dtype": "float32"}, {"dtype": "float32"}, "runs on float32; simulated are int8"),
        (
            "LOGISTIC",
            {"dtype": "int8", "scale": 0.1},
            {"dtype": "int8", "scale": 0.1},
            "has output scale",
        ),
        (
            "QUANTIZE",
            {"dtype": "int16", "scale": 0.1},
            {"dtype": "uint8", "scale": 0.1},
            "turns int16 into uint8",
        ),
        (
            "MAX_POOL_2D",
            {"dtype": "int8", "scale": 0.1},
            {"dtype": "int8", "scale": 0.1},
            "reads a tensor of shape",
        ),
    ],
)
def test_what_is_not_covered_is_refused_by_name(name, x, y, message):
    content = _unary(name, Tensor(shape=(1, 4), **x), Tensor(shape=(1, 4), **y))
    codes = np.zeros((1, 4), x["dtype"])
    with pytest.raises(SimulationError, match=rf"operator 0 \({name}\) {message}"):
        simulate(content, codes)


def test_an_int64_kernel_reading_an_int32_bias_is_refused():
    """LiteRT runs it and answers garbage."""
    x = Tensor(dtype="int16", shape=(1, 3, 3, 1), scale=0.1)
    y = Tensor(dtype="int16", shape=(1, 3, 3, 1), scale=0.1)
    inputs = [x, constant(np.ones((1, 1, 1, 1)), "int8", scale=0.1), constant([5], scale=0.01)]
    options = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    content = model(Operator(name="CONV_2D", inputs=inputs, outputs=[y], options=options))
    with pytest.raises(SimulationError, match="int32 bias, which the kernel would read as int64"):
        simulate(content, np.zeros((1, 3, 3, 1), np.int16))


def test_int4_depthwise_is_the_same_in_version_7():
    """BUILTIN_REF registers versions up to 6 and runs int4 there."""
    rng = np.random.default_rng(3)
    x = Tensor(dtype="int8", shape=(1, 5, 5, 3), scale=0.1, zero_point=-4)
    y = Tensor(dtype="int8", shape=(1, 5, 5, 3), scale=0.1, zero_point=2)
    kernel = constant(rng.integers(-7, 8, (1, 3, 3, 3)), "int4", scale=[0.1, 0.2, 0.3], axis=3)
    bias = constant([1, -20, 30], scale=[0.01, 0.02, 0.03])
    options = {"strideH": 1, "strideW": 1, "dilationHFactor": 1, "dilationWFactor": 1}
    operator = Operator(
        name="DEPTHWISE_CONV_2D", inputs=[x, kernel, bias], outputs=[y], options=options, version=7
    )
    codes = rng.integers(-128, 128, x.shape).astype(np.int8)
    version7 = model(operator)
    with pytest.raises(ValueError, match="DEPTHWISE_CONV_2D"):
        reference(version7, codes)
    operator.version = 6
    np.testing.assert_array_equal(
        simulate(version7, codes)[0], reference(model(operator), codes)[0]
    )
