"""Layer by layer: the codes compared, their differences, and the layer at fault by its name."""

from __future__ import annotations

import collections

import numpy as np
import pytest
import small_models
import tensorflow as tf
import tf_keras
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter
from ai_edge_litert.tools import flatbuffer_utils
from small_models import layers

import qat
from qat.canonical import functional
from qat.export.convert import convert
from qat.integers import integer_mismatches
from qat.tflite_file import FileError, read_file
from qat.verify import interpreter
from qat.verify import layers as compare_module
from qat.verify.differences import Difference, difference
from qat.verify.integer import SimulationError
from qat.verify.interpreter import Runner
from qat.verify.larq import open_runner
from qat.verify.layers import LayerComparison, LayerRow, Pair, affordable_examples, compare_layers
from qat.verify.points import points
from qat.verify.recording import record, recordable

EXAMPLES = 12
SHAPE = (8, 8, 2)


def network(x):
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="one")(x)
    x = layers.Conv2D(4, 3, padding="same", activation="relu", name="two")(x)
    x = layers.MaxPooling2D(name="pool")(x)
    x = layers.Conv2D(16, 3, activation="relu", name="three")(x)
    x = layers.GlobalAveragePooling2D(name="mean")(x)
    return layers.Dense(5, name="logits")(x)


@pytest.fixture(scope="module", autouse=True)
def no_trial():
    """Every file here is sound: a first run in another process would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_objection", lambda content, resolver: None)
        yield


@pytest.fixture(scope="module")
def model():
    made = small_models.quantized(small_models.model_of(network, SHAPE), "w8a8")
    return functional(qat.settle_biases(made))


@pytest.fixture(scope="module")
def data(model):
    return small_models.data_for(model, EXAMPLES)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return qat.export_tflite(model, tmp_path_factory.mktemp("layers") / "model.tflite")


def runners(path):
    return {kernels: open_runner(path, kernels=kernels) for kernels in ("default", "reference")}


def compared(model, path, data):
    return compare_layers(model, read_file(path), runners(path), data)


@pytest.fixture(scope="module")
def found(model, path, data):
    return compared(model, path, data)


# ---------------------------------------------------------------- the codes, computed elsewhere


def reference_codes(path, x) -> dict[str, np.ndarray]:
    """{tensor: codes} of all intermediate tensors, as LiteRT itself preserves them."""
    interpreter = Interpreter(
        str(path),
        experimental_op_resolver_type=small_models.KERNELS["reference"],
        experimental_preserve_all_tensors=True,
        num_threads=1,
    )
    interpreter.allocate_tensors()
    examples = collections.defaultdict(list)
    for example in x:
        interpreter.set_tensor(interpreter.get_input_details()[0]["index"], example[None])
        interpreter.invoke()
        for detail in interpreter.get_tensor_details():
            if detail["dtype"] is np.int8 and "kernel" not in detail["name"]:
                examples[detail["name"]].append(interpreter.get_tensor(detail["index"])[0].copy())
    return {name: np.stack(codes).astype(int) for name, codes in examples.items()}


def cut_off(model, layer: str) -> tf_keras.Model:
    return tf_keras.Model(model.inputs, model.get_layer(f"{layer}_fake_quantize").output)


def codes_of(reals, layer) -> np.ndarray:
    grid = layer.quantizer.grid(layer.quantizer_weights).numpy()
    return np.rint(reals / float(grid.scale)).astype(int) + int(grid.zero_point)


def counted(first, second) -> dict[int, int]:
    """{difference: how often}, one number at a time."""
    pairs = zip(first.reshape(-1).tolist(), second.reshape(-1).tolist(), strict=True)
    return dict(collections.Counter(b - a for a, b in pairs))


def as_counts(found: Difference) -> dict[int, int]:
    assert sum(found.histogram) == found.codes
    assert found.different == found.codes - found.histogram[8]
    return {number - 8: count for number, count in enumerate(found.histogram) if count}


@pytest.mark.parametrize("layer", ["one_relu", "three_relu", "mean", "logits"])
def test_histograms_are_those_of_codes_computed_elsewhere(
    model, path, data, found, layer, tmp_path
):
    """The default kernels' codes are the output of a file that ends at this layer."""
    (row,) = (row for row in found.rows if row.tensor == layer)
    quantizer = model.get_layer(f"{layer}_fake_quantize")
    short = cut_off(model, layer)
    keras = codes_of(short(data[0], training=False).numpy(), quantizer)
    ending_here = qat.export_tflite(short, tmp_path / "short.tflite")
    default = codes_of(small_models.run_file(ending_here, data)[0], quantizer)
    reference = reference_codes(path, data[0])[layer].reshape(keras.shape)
    for pair, codes in {
        "keras_default": (keras, default),
        "keras_reference": (keras, reference),
        "default_reference": (default, reference),
        "reference_simulator": (reference, reference),
    }.items():
        assert as_counts(row.pairs[pair].total) == counted(*codes), pair
        largest = max(map(abs, counted(*codes)))
        assert row.pairs[pair].total.largest == largest


def test_every_tensor_has_a_row_named_after_its_layer(found):
    rows = [(row.tensor, row.layer, row.operator) for row in found.rows]
    assert rows == [
        ("in0_1", "in0_1", "QUANTIZE"),
        ("one_relu", "one", "CONV_2D"),
        ("two_relu", "two", "CONV_2D"),
        ("pool", "pool", "MAX_POOL_2D"),
        ("three_relu", "three", "CONV_2D"),
        ("mean", "mean", "MEAN"),
        ("logits", "logits", "FULLY_CONNECTED"),
    ]
    assert found.examples == EXAMPLES and found.not_compared == {}
    for row in found.rows:
        assert row.pairs["reference_simulator"].total.different == 0
        assert ("keras_default" in row.pairs) is (row.tensor != "pool")


def test_what_is_inherited_is_told_from_what_is_a_layers_own(found):
    """The reference kernels' means are a step off in a fifth of the codes; XNNPACK's are not."""
    rows = {row.tensor: row.pairs["default_reference"] for row in found.rows}
    assert rows["in0_1"].total.different == 0
    assert rows["one_relu"].total == rows["one_relu"].own  # there is nothing to inherit
    assert rows["pool"].own.different == 0 == rows["logits"].own.different
    assert rows["mean"].own.different > 10 and rows["mean"].own.largest == 1
    assert rows["logits"].total.different > 0
    first = next(row for row in found.rows if row.pairs["default_reference"].total.different)
    assert found.first_departure("default_reference") == first
    assert found.first_departure("reference_simulator") is None
    assert not any(row.beyond_rounding(pair) for row in found.rows for pair in row.pairs)


# ---------------------------------------------------------------- files that were altered


def altered(path, folder, change) -> str:
    """A copy of the file in which `change(model, {name: tensor})` has changed something."""
    content = flatbuffer_utils.convert_bytearray_to_object(bytearray(path.read_bytes()))
    change(content, {t.name.decode(): t for t in content.subgraphs[0].tensors})
    made = folder / "altered.tflite"
    made.write_bytes(bytes(flatbuffer_utils.convert_object_to_bytearray(content)))
    return made


def one_bias(content, tensors):
    buffer = content.buffers[tensors["two/bias"].buffer]
    values = np.asarray(buffer.data, np.uint8).view(np.int32).copy()
    values[1] += 2000
    buffer.data = values.view(np.uint8)


def one_multiplier(content, tensors):
    tensors["two/kernel"].quantization.scale[2] *= 1.5


def departed(found: LayerComparison, pair: str) -> list[str]:
    return [row.layer for row in found.rows if row.beyond_rounding(pair)]


@pytest.mark.parametrize("change", [one_bias, one_multiplier])
def test_an_altered_layer_is_named(model, path, data, tmp_path, change):
    made = altered(path, tmp_path, change)
    assert "two/kernel" in integer_mismatches(model, read_file(made))[0]
    found = compared(model, made, data)
    for pair in ("keras_default", "keras_reference"):
        assert departed(found, pair) == ["two"]
    assert found.first_departure("keras_default").layer == "two"
    # The layers behind inherit it, with no doing of their own.
    three = next(row for row in found.rows if row.layer == "three").pairs["keras_default"]
    assert three.total.largest > 1 and three.own.different <= three.own.codes / 100
    # Both kernels and the simulator read the same altered file.
    assert departed(found, "default_reference") == departed(found, "reference_simulator") == []


def test_verify_tflite_says_all_of_it(model, path, data, tmp_path):
    made = altered(path, tmp_path, one_bias)
    batches = tf.data.Dataset.from_tensors((data[0],))
    found = qat.verify_tflite(made, model, batches, layer_examples=8)
    assert not found.integers_match and "two/kernel" in found.mismatches[0]
    assert found.layers.examples == 8 and departed(found.layers, "keras_default") == ["two"]
    (pairs,) = found.outputs.values()
    assert pairs["keras_default"].largest == found.max_output_difference_lsb > 1
    for pair in ("keras_default", "keras_reference", "default_reference"):
        assert pairs[pair].codes == 5 * EXAMPLES


def test_another_operator_with_the_same_integers_is_found(model, path, data, tmp_path):
    """Averages for maxima: no integer of the file tells; the layer behind the pool departs."""

    def average(content, tensors):
        for code in content.operatorCodes:
            if code.builtinCode == schema.BuiltinOperator.MAX_POOL_2D:
                code.builtinCode = schema.BuiltinOperator.AVERAGE_POOL_2D
                code.deprecatedBuiltinCode = code.builtinCode

    made = altered(path, tmp_path, average)
    assert integer_mismatches(model, read_file(made)) == []
    assert departed(compared(model, made, data), "keras_default") == ["three"]


def test_another_scale_leaves_a_tensor_out_and_says_so(model, path, data, tmp_path):
    def rescale(content, tensors):
        tensors["two_relu"].quantization.scale[0] *= 2
        tensors["pool"].quantization.scale[0] *= 2

    found = compared(model, altered(path, tmp_path, rescale), data)
    assert list(found.not_compared) == ["two_relu_fake_quantize"]
    assert "grid" in found.not_compared["two_relu_fake_quantize"]


# ---------------------------------------------------------------- what cannot be compared


def test_kernels_that_refuse_the_file_are_said_to(model, path, data):
    ways = {"default": open_runner(path), "reference": FileError("no such kernel")}
    found = compare_layers(model, read_file(path), ways, data)
    assert set(found.not_compared) == {
        "keras_reference",
        "default_reference",
        "reference_simulator",
    }
    assert all("no such kernel" in reason for reason in found.not_compared.values())
    assert {pair for row in found.rows for pair in row.pairs} == {"keras_default"}


def test_float_operators_are_not_simulated(tmp_path):
    def two(x):
        return layers.Conv2D(2, 3, name="two")(layers.Conv2D(2, 3, name="one")(x))

    recipe = small_models.recipe(8, 8, qat.Rule(layer="two", keep_float="a test"))
    model = small_models.quantized(small_models.model_of(two, SHAPE), recipe)
    made = qat.export_tflite(model, tmp_path / "float.tflite")
    found = compared(model, made, small_models.data_for(model, 2))
    assert "is not simulated" in found.not_compared["reference_simulator"] or (
        "float32" in found.not_compared["reference_simulator"]
    )
    assert {"keras_default", "default_reference"} <= set(found.rows[-1].pairs)


def test_without_the_simulator_kernels_are_compared_in_total_alone(model, path, data, monkeypatch):
    def refuse(*given):
        raise SimulationError("not today")

    monkeypatch.setattr(compare_module, "simulate", refuse)
    found = compared(model, path, data)
    alone = "default_reference, each layer on its own"
    assert set(found.not_compared) == {"reference_simulator", alone}
    assert all("not today" in reason for reason in found.not_compared.values())
    pair = found.rows[-1].pairs["default_reference"]
    assert pair.total.different and pair.own is None
    assert not any(row.beyond_rounding("default_reference") for row in found.rows)


@pytest.mark.parametrize(("name", "said"), [(b"two_relu", "same name"), (b"po\0l", "zero byte")])
def test_tensors_that_cannot_be_told_apart_are_not_compared(
    name, said, model, path, data, tmp_path
):
    def rename(content, tensors):
        tensors["pool"].name = name

    found = compared(model, altered(path, tmp_path, rename), data)
    assert found.rows == [] and len(found.not_compared) == 4
    assert all(said in why for why in found.not_compared.values())


def test_recording_that_changes_the_outputs_is_refused(path, data):
    class Changes(Runner):
        def run(self, *inputs):
            results = super().run(*inputs)
            if self.path.endswith("recorded.tflite"):
                results[0].codes[0] += 1
            return results

    with pytest.raises(FileError, match="its outputs change") as error:
        record(Changes(path), recordable(read_file(path)), data)
    assert str(path) in str(error.value)


# ---------------------------------------------------------------- which tensor is a layer's


@pytest.mark.parametrize(
    "build, how",
    [
        (small_models.residual, "w1a1"),
        pytest.param(small_models.branches, "w4a6", marks=pytest.mark.slow),
        pytest.param(small_models.branches, "w8a16", marks=pytest.mark.slow),
        pytest.param(small_models.residual, "w2a2", marks=pytest.mark.slow),
        pytest.param(small_models.residual, "w1a1-reactnet", marks=pytest.mark.slow),
    ],
)
def test_points_are_where_the_export_put_them(build, how, tmp_path):
    model = functional(small_models.quantized(small_models.model_of(build, (11, 10, 3)), how))
    file = read_file(qat.export_tflite(model, tmp_path / "model.tflite"))
    origins, found = convert(model).origins, points(model, file)
    assert len(found) > 5
    for point in found:
        assert point.tensor.name == origins[id(point.call.output)].name


def test_integer_inputs_are_no_points(model, data, tmp_path):
    made = qat.export_tflite(model, tmp_path / "model.tflite", io="int8")
    found = compared(model, made, data)
    assert list(found.not_compared.values()) == ["the file takes its codes as they are"]
    assert found.rows[0].tensor == "one_relu" and "keras_default" in found.rows[0].pairs


# ---------------------------------------------------------------- numbers


def test_differences():
    first, second = np.array([[0, 5, -3, 100]]), np.array([[0, 6, -5, -100]])
    found = difference(first.astype(np.int8), second.astype(np.int8))
    assert (found.codes, found.different, found.largest, found.share) == (4, 3, 200, 0.75)
    assert found.histogram == [1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    booleans = difference(np.array([True, False]), np.array([False, False]))
    assert (booleans.different, booleans.histogram[7]) == (1, 1)


@pytest.mark.parametrize(
    "dtype, pair, different, largest, beyond",
    [
        ("int8", "keras_reference", 0, 0, False),
        ("int8", "keras_reference", 50, 1, False),
        ("int8", "keras_reference", 51, 1, True),
        ("int8", "keras_default", 1, 2, True),
        ("int8", "default_reference", 1, 254, True),
        ("int16", "keras_default", 99, 2, False),
        ("int16", "keras_default", 1, 3, True),
        ("int8", "reference_simulator", 1, 1, True),
        ("int8", "reference_simulator", 0, 0, False),
    ],
)
def test_what_rounding_explains(dtype, pair, different, largest, beyond):
    own = Difference(codes=100, different=different, largest=largest, histogram=[0] * 17)
    pairs = {pair: Pair(total=own, own=own)}
    row = LayerRow(layer="a", tensor="a", dtype=dtype, operator="ADD", pairs=pairs)
    assert row.beyond_rounding(pair) is beyond
    assert not row.beyond_rounding("no pair")


def test_examples_that_can_be_afforded(path):
    file = read_file(path)
    # 64 positions of 3·3·2·4 and of 3·3·4·4, 4 of 3·3·4·16, and 16·5.
    each = 64 * 72 + 64 * 144 + 4 * 576 + 80
    assert affordable_examples(file, 64, 10 * each + 20) == 10
    assert affordable_examples(file, 7, 10 * each + 20) == 7
    assert affordable_examples(file, 64, 5) == 1
