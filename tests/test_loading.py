"""Model files of both Keras versions: which are loaded, which are refused; none runs its code."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
import zipfile

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import qat
from qat.errors import QatError

SHAPE = (6, 6, 3)
SEQUENCE = (4, 3)
FILES = ("two.keras", "two.h5", "two_folder", "three.keras", "three.h5")


def small(framework):
    """A Sequential nested in a functional model, a shared layer, weights that are not zero."""
    layers = framework.layers
    stem = framework.Sequential(
        [layers.InputLayer(SHAPE), layers.Conv2D(4, 3, name="conv"), layers.BatchNormalization()],
        name="stem",
    )
    x = framework.Input(SHAPE, name="image")
    shared = layers.Dense(4, activation="relu", name="shared")
    y = layers.GlobalAveragePooling2D(name="pool")(shared(shared(stem(x))))
    model = framework.Model(x, y, name="small")
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1, weight.shape) for weight in model.get_weights()])
    return model


def tiny(framework, *more):
    """Takes no time to save: layers behind one another."""
    x = framework.Input(SEQUENCE, name="input")
    y = framework.layers.Dense(4, name="shared")(x)
    for layer in more:
        y = layer(y)
    return framework.Model(x, y, name="tiny")


def framework_of(name):
    return keras if name.startswith("three") else tf_keras


def saved(model, path, traces=False):
    model.save(path, **({} if path.suffix else {"save_format": "tf", "save_traces": traces}))
    return path


@pytest.fixture(scope="module", params=FILES)
def file(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / request.param
    model = small(framework_of(request.param))
    x = np.random.default_rng(1).normal(0, 1, (3, *SHAPE)).astype("float32")
    return saved(model, path, traces=True), x, np.asarray(model(x))


def test_every_kind_of_file_is_loaded(file):
    path, x, expected = file
    model = qat.load_model(path)
    assert isinstance(model, tf_keras.Model) and model.name == "small"
    np.testing.assert_allclose(model(x), expected, rtol=1e-5, atol=1e-6)
    assert {"image", "stem", "shared", "pool"} <= {layer.name for layer in model.layers}


def test_a_tf_keras_model_is_taken_as_it_is():
    model = tiny(tf_keras)
    assert qat.load_model(model) is model


@pytest.mark.parametrize("policy", ("mixed_float16", "bfloat16"))
def test_tf_keras_models_of_16_bits_become_float32(policy, caplog):
    tf_keras.mixed_precision.set_global_policy(policy)
    try:
        x = tf_keras.Input(SHAPE)
        y = tf_keras.layers.TimeDistributed(tf_keras.layers.Dense(3))(x)
        model = tf_keras.Model(x, small(tf_keras)(y))
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")
    model.get_layer("small").trainable = False
    loaded = qat.load_model(model)
    assert {layer.compute_dtype for layer in loaded._flatten_layers()} == {"float32"}
    assert not loaded.get_layer("small").trainable_weights and loaded.trainable_weights
    for one, other in zip(model.weights, loaded.weights, strict=True):
        assert other.dtype == tf.float32
        np.testing.assert_array_equal(tf.cast(one, tf.float32), other)
    assert policy in caplog.text


def test_hdf5_files_may_have_any_name_that_keras_reads(tmp_path):
    path = saved(tiny(tf_keras), tmp_path / "two.h5")
    assert qat.load_model(str(path.rename(tmp_path / "two.keras"))).name == "tiny"


def loss_of_ones_own(y_true, y_pred):
    return y_true - y_pred


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("nested", [False, True])
def test_a_loss_of_the_users_own_is_no_obstacle(name, nested, tmp_path):
    """What a model was trained with stays out of it; Keras wants to know that of a model inside."""
    framework = framework_of(name)
    model = tiny(framework)
    model.compile("sgd", loss=loss_of_ones_own)
    if nested:
        x = framework.Input(SEQUENCE)
        model = framework.Model(x, framework.layers.Dense(2)(model(x)))
    given = {"loss_of_ones_own": loss_of_ones_own} if nested and name.endswith(".keras") else None
    loaded = qat.load_model(saved(model, tmp_path / name), custom_objects=given)
    x = np.ones((2, *SEQUENCE), np.float32)
    np.testing.assert_allclose(loaded(x), np.asarray(model(x)), rtol=1e-5, atol=1e-6)


def test_layers_that_applications_define_are_known(tmp_path):
    from tf_keras.src.applications.convnext import LayerScale

    path = saved(tiny(tf_keras, LayerScale(0.5, 4, name="scale")), tmp_path / "scaled.h5")
    assert type(qat.load_model(path).get_layer("scale")) is LayerScale


# ---------------------------------------------------------------- code in files


def writes(path):
    """A Lambda's function that leaves a trace whenever it runs."""
    return eval(f"lambda x: (open({str(path)!r}, 'w').close(), x)[1]")


def with_lambda(name, folder, wrap=lambda framework, layer: layer):
    trace = folder / "trace"
    framework = framework_of(name)
    layer = framework.layers.Lambda(writes(trace), name="sneaky")
    path = saved(tiny(framework, wrap(framework, layer)), folder / name)
    trace.unlink()  # of building and saving it
    return path, trace


@pytest.mark.parametrize("name", FILES)
def test_byte_code_is_not_run(name, tmp_path):
    path, trace = with_lambda(name, tmp_path)
    message = "'sneaky' .Lambda. holds Python code.*--allow_unsafe_deserialization"
    with pytest.raises(QatError, match=message) as error:
        qat.load_model(path)
    assert "\n" not in str(error.value) and not trace.exists()
    model = qat.load_model(path, allow_unsafe_deserialization=True)
    assert trace.exists() and isinstance(model.get_layer("sneaky"), tf_keras.layers.Lambda)


@pytest.mark.parametrize("name", ("two.keras", "two.h5", "three.keras"))
def test_byte_code_in_a_wrapper_is_not_run(name, tmp_path):
    def wrap(framework, layer):
        return framework.layers.TimeDistributed(layer, name="outer")

    path, trace = with_lambda(name, tmp_path, wrap)
    with pytest.raises(QatError, match="'sneaky'.*holds Python code"):
        qat.load_model(path)
    assert not trace.exists()


def edited(path, change):
    """The file with its configuration changed by a function."""
    if path.suffix == ".h5":
        with h5py.File(path, "r+") as file:
            config = json.loads(file.attrs["model_config"])
            change(config)
            file.attrs["model_config"] = json.dumps(config)
        return path
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    change(config)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in {**members, "config.json": json.dumps(config)}.items():
            archive.writestr(name, content)
    return path


def layer_of(config, name):
    return next(each for each in config["config"]["layers"] if each["name"] == name)


def imports_a_module(config):
    layer_of(config, "shared").update(module="sneaky_module", registered_name=None)


def imports_a_class(config):
    layer_of(config, "shared").update(
        module="sneaky_module", class_name="Sneaky", registered_name="Sneaky"
    )


def imports_a_function(config):
    layer_of(config, "shared")["config"]["activation"] = {
        "module": "sneaky_module",
        "class_name": "function",
        "config": "run",
        "registered_name": "run",
    }


def uses_a_function_of_keras(config):
    layer_of(config, "shared")["config"]["activation"] = {
        "module": "keras.utils",
        "class_name": "function",
        "config": "get_file",
        "registered_name": "get_file",
    }


def hides_it_in_a_loss(config):
    config["compile_config"] = {
        "optimizer": "sgd",
        "loss": {
            "module": "sneaky_module",
            "class_name": "function",
            "config": "run",
            "registered_name": "run",
        },
    }


def hides_it_in_an_initializer(config):
    layer_of(config, "shared")["config"]["kernel_initializer"] = {
        "module": "sneaky_module",
        "class_name": "Sneaky",
        "config": {},
        "registered_name": None,
    }


@pytest.mark.parametrize("name", ("two.keras", "three.keras"))
@pytest.mark.parametrize(
    "change",
    (
        imports_a_module,
        imports_a_class,
        imports_a_function,
        uses_a_function_of_keras,
        hides_it_in_an_initializer,
    ),
)
def test_what_a_file_names_is_not_imported(name, change, tmp_path, monkeypatch):
    module = tmp_path / "sneaky_module.py"
    module.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef run(x): return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = edited(saved(tiny(framework_of(name)), tmp_path / name), change)
    with pytest.raises(QatError, match="'shared' .* neither Keras's nor given; pass") as error:
        qat.load_model(path)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "trace").exists() and "sneaky_module" not in sys.modules


@pytest.mark.parametrize("name", ("two.keras", "three.keras"))
def test_a_loss_is_not_imported(name, tmp_path, monkeypatch):
    module = tmp_path / "sneaky_module.py"
    module.write_text(f"open({str(tmp_path / 'trace')!r}, 'w')\ndef run(x): return x\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = edited(saved(tiny(framework_of(name)), tmp_path / name), hides_it_in_a_loss)
    assert qat.load_model(path).name == "tiny"
    assert not (tmp_path / "trace").exists() and "sneaky_module" not in sys.modules


@pytest.mark.parametrize("symbol", ("io.write_file", "load_library", "raw_ops.PyFunc"))
@pytest.mark.parametrize("name", ("two.keras", "two.h5"))
def test_tensorflow_calls_are_computations(name, symbol, tmp_path):
    x = tf_keras.Input(SHAPE)
    path = saved(tf_keras.Model(x, tf.nn.relu(x)), tmp_path / name)
    assert qat.load_model(path)

    def change(config):
        config["config"]["layers"][1]["config"]["function"] = symbol

    with pytest.raises(QatError, match=f"calls tf.{symbol}, which is no known computation"):
        qat.load_model(edited(path, change))


@pytest.mark.parametrize("name", ("a.h5", "a.keras"))
@pytest.mark.parametrize("made", (tf.constant_initializer(0.5), tf.zeros_initializer()))
def test_initializers_of_tensorflow_are_known(made, name, tmp_path):
    """EfficientNetV2 has one."""
    inputs = tf_keras.Input((3,))
    outputs = tf_keras.layers.Dense(2, bias_initializer=made)(inputs)
    path = saved(tf_keras.Model(inputs, outputs), tmp_path / name)
    assert len(qat.load_model(path).layers) == 2


@pytest.mark.parametrize("kind", ("TFSMLayer", "TorchModuleWrapper"))
def test_layers_that_run_other_programs_are_refused(kind, tmp_path):
    path = saved(tiny(keras), tmp_path / "three.keras")
    path = edited(path, lambda config: layer_of(config, "shared").update(class_name=kind))
    with pytest.raises(QatError, match="runs a program from elsewhere"):
        qat.load_model(path)


def test_a_saved_models_own_functions_are_not_run(tmp_path):
    """The traced functions are gone, and the model is loaded all the same."""
    path = saved(tiny(tf_keras), tmp_path / "folder", traces=True)
    (path / "saved_model.pb").write_bytes(b"")
    assert qat.load_model(path).name == "tiny"


def test_a_given_class_vouches_for_no_module(tmp_path):
    path = saved(tiny(tf_keras), tmp_path / "two.keras")
    with pytest.raises(QatError, match="neither Keras's nor given"):
        qat.load_model(edited(path, imports_a_module), custom_objects={"Dense": Twice})


# ---------------------------------------------------------------- custom objects


class Twice(tf_keras.layers.Layer):
    def call(self, x):
        return 2 * x


def negative(x):
    return -x


@pytest.mark.parametrize("name", ("two.keras", "two.h5", "two_folder"))
def test_custom_objects_are_asked_for_and_taken(name, tmp_path):
    path = saved(tiny(tf_keras, Twice(name="twice")), tmp_path / name)
    with pytest.raises(QatError, match=r"'twice' \(Twice\).*--custom_objects=module:Twice"):
        qat.load_model(path)
    model = qat.load_model(path, custom_objects={"Twice": Twice})
    assert isinstance(model.get_layer("twice"), Twice)
    given = [f"{__name__}:Twice"]
    assert isinstance(qat.load_model(path, custom_objects=given).get_layer("twice"), Twice)


@pytest.mark.parametrize("name", ("two.keras", "two.h5"))
def test_a_lambda_of_a_given_function_is_no_hidden_code(name, tmp_path):
    layer = tf_keras.layers.Lambda(Negation(), name="named")
    path = saved(tiny(tf_keras, layer), tmp_path / name)
    with pytest.raises(QatError, match="holds Python code"):
        qat.load_model(path)
    model = qat.load_model(path, custom_objects={"negative": negative})
    assert model.get_layer("named").function is negative


class Negation:
    """tf_keras stores the byte code of plain functions, and the names of other callables."""

    __name__ = "negative"

    def __call__(self, x):
        return negative(x)


@pytest.mark.parametrize(
    ("given", "message"),
    (
        ("Foo", "need module:NAME, got 'Foo'"),
        ("no_such_module:Foo", "no_such_module cannot be imported"),
        ("json:Foo", "json has no 'Foo'"),
        ("not_python:Foo", "not_python cannot be imported: SyntaxError"),
    ),
)
def test_custom_objects_that_cannot_be_found(given, message, tmp_path, monkeypatch):
    (tmp_path / "not_python.py").write_text("class\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(QatError, match=f"--custom_objects: {message}"):
        qat.parse_custom_objects([given])


def test_custom_objects_are_found_in_the_working_folder(tmp_path, monkeypatch):
    (tmp_path / "my_own_layers.py").write_text("class Mine: pass\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert qat.parse_custom_objects(["my_own_layers:Mine"])["Mine"].__name__ == "Mine"
    assert sys.path == before


# ---------------------------------------------------------------- wrong files


def cut(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


def written(path, content):
    path.write_bytes(content)
    return path


def folder(path):
    path.mkdir()
    return path


def exported(path):
    tf.saved_model.save(tf.Module(), str(path))
    return path


def weights_only(path):
    tiny(tf_keras).save_weights(path)
    return path


class Subclassed(tf_keras.Model):
    def __init__(self):
        super().__init__(name="sub")
        self.dense = tf_keras.layers.Dense(2)

    def call(self, x):
        return self.dense(x)


def subclassed(path):
    model = Subclassed()
    model(np.zeros((1, 3), "float32"))
    return saved(model, path)


def quantized(path):
    x = tf_keras.Input((4,))
    model = qat.quantize_model(tf_keras.Model(x, tf_keras.layers.Dense(2)(x)))
    if path.suffix == ".keras":
        qat.save_model(model, path, recipe=qat.Recipe.from_name("w8a8"))
    else:
        model.save(path)
    return path


def operations(path):
    x = keras.Input(SHAPE)
    return saved(keras.Model(x, keras.layers.Conv2D(2, 3)(x) + 1.0), path)


def not_finite(path):
    model = tiny(tf_keras)
    model.get_layer("shared").bias.assign([1, np.inf, 1, 1])
    return saved(model, path)


WRONG = {
    "missing": (lambda path: path / "gone.keras", "no such file or folder"),
    "empty folder": (lambda path: folder(path / "here"), "is no SavedModel"),
    "no Keras model": (lambda path: exported(path / "here"), "without keras_metadata.pb"),
    "subclassed": (lambda path: subclassed(path / "here"), "'sub' is subclassed .Subclassed."),
    "text": (lambda path: written(path / "a.h5", b"hello, world"), "it is none of them"),
    "empty": (lambda path: written(path / "a.keras", b""), "it is none of them"),
    "TFLite": (lambda path: written(path / "a.tflite", b"\x1c\0\0\0TFL3"), "it is a TFLite file"),
    "cut zip": (lambda path: cut(saved(tiny(tf_keras), path / "a.keras")), "is damaged or no"),
    "cut HDF5": (lambda path: cut(saved(tiny(tf_keras), path / "a.h5")), "is damaged or no"),
    "only weights": (lambda path: weights_only(path / "a.weights.h5"), "no Keras model, only"),
    "quantized": (lambda path: quantized(path / "a.keras"), "qat.load_quantized_model"),
    "quantized HDF5": (lambda path: quantized(path / "a.h5"), "is a quantized model"),
    "operations in HDF5": (
        lambda path: operations(path / "a.h5"),
        "'add.*save the model as a .keras",
    ),
    "not finite": (lambda path: not_finite(path / "a.keras"), "NaN or infinite values in shared/"),
    "other zip": (lambda path: other_zip(path / "a.keras"), "without config.json"),
    "other suffix": (
        lambda path: saved(tiny(tf_keras), path / "a.keras").rename(path / "a.zip"),
        "ends in .keras",
    ),
}


def other_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "")
    return path


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_told_apart_in_one_line(case, tmp_path):
    make, message = WRONG[case]
    path = make(tmp_path)
    with pytest.raises(QatError, match=message) as error:
        qat.load_model(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "message"),
    (
        (Subclassed(), "'sub' is subclassed"),
        (tf_keras.Sequential([tf_keras.layers.Dense(2)], name="s"), "'s' is not built"),
        (3, "need a Keras model or a path, got builtins.int"),
    ),
)
def test_wrong_objects_are_refused(model, message):
    with pytest.raises(QatError, match=message):
        qat.load_model(model)


def test_without_keras_3_its_files_say_what_to_install(tmp_path, monkeypatch):
    path = saved(tiny(keras), tmp_path / "three.keras")
    monkeypatch.setitem(sys.modules, "keras", None)
    with pytest.raises(QatError, match="not installed: python -m pip install 'keras"):
        qat.load_model(path)
    assert qat.load_model(tiny(tf_keras))


@pytest.mark.slow
def test_without_keras_3_the_package_works(tmp_path):
    path = saved(tiny(keras), tmp_path / "three.keras")
    saved(tiny(tf_keras), tmp_path / "two.keras")
    code = (
        "import sys; sys.modules['keras'] = None\n"
        "import qat\n"
        f"qat.load_model({str(tmp_path / 'two.keras')!r})\n"
        f"qat.load_model({str(path)!r})"
    )
    root = pathlib.Path(__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert run.returncode == 1
    assert "was written by Keras 3, which is not installed: python -m pip install" in run.stderr


# ---------------------------------------------------------------- tf_keras.applications

CONSTRUCTORS = sorted(name for name in dir(tf_keras.applications) if name[0].isupper())
SMALLEST = {"InceptionResNetV2": 75, "InceptionV3": 75, "Xception": 71}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_an_application_of_tf_keras_is_loaded_from_its_file(name, tmp_path):
    size = SMALLEST.get(name, 32)
    build = getattr(tf_keras.applications, name)
    model = build(weights=None, input_shape=(size, size, 3), classes=10)
    path = saved(model, tmp_path / "model.h5")
    x = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3)).astype("float32")
    np.testing.assert_allclose(qat.load_model(path)(x), model(x), rtol=1e-5, atol=1e-7)
    tf_keras.backend.clear_session()
