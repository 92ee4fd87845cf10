from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

import models
import qat
from qat.settings import recommended

TESTS = pathlib.Path(__file__).resolve().parent
PROJECT = TESTS.parent
PROGRAMS = ("train", "quantize", "export", "evaluate")

# What the plan of the programs promises to keep; train.py's flags are a contract with scripts.
TRAIN_FLAGS = (
    "dataset data_dir model recipe float_model float_epochs qat_epochs batch_size learning_rate "
    "qat_learning_rate seed output_dir resume distribution mixed_precision jit_compile distill "
    "target io weight_storage strict checkpoint_steps deterministic profile_steps augment_shift "
    "augment_flip"
).split()
QUANTIZE_FLAGS = (
    "model_path recipe dataset data_dir calibration_data input_range qat_epochs loss "
    "custom_objects allow_unsafe_deserialization batch_size qat_learning_rate seed output_dir "
    "resume distribution mixed_precision jit_compile distill target io weight_storage strict "
    "checkpoint_steps deterministic profile_steps augment_shift augment_flip"
).split()
FLAGS = {
    "train": TRAIN_FLAGS,
    "quantize": QUANTIZE_FLAGS,
    "export": ["qat_model", "output", "target", "io", "weight_storage"],
    "evaluate": ["tflite", "dataset", "data_dir", "split", "input_range", "threads", "json"],
}

RULES = {
    "layer.json": {"layer": "conv9", "weights": {"bits": 8}},
    "bits.json": {"weights": {"bits": 9}},
    "option.json": {"weights": {"bits": 8, "options": {"colour": "red"}}},
    "key.json": {"weight": {"bits": 8}},
}

# A wrong call that is not noticed must not train for minutes; later flags win.
QUICK = {
    "train": "--model=lenet --float_epochs=0 --qat_epochs=0 ",
    "quantize": "--output_dir=new --qat_epochs=0 ",
    "export": "",
    "evaluate": "",
}

# name: (arguments, what the message must name)
TRAIN_CALLS = {
    "no output_dir": ("", "output_dir"),
    "unknown flag": ("--output_dir=new --width=2", "width"),
    "positional argument": ("--output_dir=new digits", "'digits' --name=value"),
    "batch_size 0": ("--output_dir=new --batch_size=0", "batch_size 0"),
    "batch_size word": ("--output_dir=new --batch_size=many", "batch_size many"),
    "epochs below 0": ("--output_dir=new --float_epochs=-1", "float_epochs -1"),
    "half an epoch": ("--output_dir=new --qat_epochs=0.5", "qat_epochs 0.5"),
    "rate below 0": ("--output_dir=new --learning_rate=-1", "learning_rate -1"),
    "rate NaN": ("--output_dir=new --learning_rate=nan --float_epochs=1", "learning_rate nan"),
    "rate infinite": (
        "--output_dir=new --qat_learning_rate=inf --qat_epochs=1",
        "learning_rate inf",
    ),
    "shift below 0": ("--output_dir=new --augment_shift=-1", "augment_shift -1"),
    "shift of a whole image": (
        "--output_dir=new --augment_shift=8",
        "--augment_shift=8 digits 8x8 0 7",
    ),
    "seed below 0": ("--output_dir=new --seed=-1", "seed -1"),
    "seed above 32 bits": ("--output_dir=new --seed=4294967296", "seed 4294967296"),
    "checkpoint_steps 0": ("--output_dir=new --checkpoint_steps=0", "checkpoint_steps 0"),
    "unknown io": ("--output_dir=new --io=int4", "io int4 float32 int8 uint8"),
    "unknown target": ("--output_dir=new --target=gpu", "target gpu litert tflm"),
    "unknown storage": ("--output_dir=new --weight_storage=zip", "weight_storage zip size speed"),
    "unknown precision": ("--output_dir=new --mixed_precision=int8", "mixed_precision float32"),
    "unknown distribution": ("--output_dir=new --distribution=gpu", "distribution gpu mirrored"),
    "no TPU": ("--output_dir=new --distribution=tpu", "distribution tpu TPU"),
    "no TF_CONFIG": ("--output_dir=new --distribution=multi_worker", "multi_worker TF_CONFIG"),
    "half a profile": ("--output_dir=new --profile_steps=5", "profile_steps 5 10,20"),
    "profile backwards": (
        "--output_dir=new --profile_steps=20,10 --float_epochs=1",
        "profile_steps 20,10",
    ),
    "no recipe name": ("--output_dir=new --recipe=int8", "'int8' w<W>a<A> w8a8"),
    "illegal width": ("--output_dir=new --recipe=w9a8", "'w9a8' 1…8"),
    "unknown method": ("--output_dir=new --recipe=w4a8-magic", "'magic' minmax"),
    "recipe file missing": ("--output_dir=new --recipe=gone.json", "gone.json"),
    "recipe file truncated": ("--output_dir=new --recipe=truncated.json", "truncated.json"),
    "recipe file of a list": ("--output_dir=new --recipe=list.json", "list.json"),
    "recipe file not UTF-8": ("--output_dir=new --recipe=bytes.json", "bytes.json"),
    "recipe with an unknown key": ("--output_dir=new --recipe=key.json", "key.json 'weight'"),
    "recipe with 9 bits": ("--output_dir=new --recipe=bits.json", "bits.json 9"),
    "recipe with an unknown option": ("--output_dir=new --recipe=option.json", "colour"),
    "recipe with an unknown layer": ("--output_dir=new --recipe=layer.json", "conv9 layers: conv1"),
    "unknown model": ("--output_dir=new --model=alexnet", "'alexnet' cnn5 resnet20"),
    "no width": ("--output_dir=new --model=cnn5:width=0", "--model=cnn5:width=0 width above"),
    "unknown dataset": ("--output_dir=new --dataset=digitz", "'digitz' digits"),
    "data_dir is a file": ("--output_dir=new --data_dir=text.txt", "text.txt"),
    "output_dir is a file": ("--output_dir=text.txt", "output_dir text.txt"),
    "output_dir below a file": ("--output_dir=text.txt/new", "output_dir text.txt/new"),
    "output_dir not writable": ("--output_dir=/proc/new", "output_dir /proc/new"),
    "float model missing": ("--output_dir=new --float_model=gone.keras", "gone.keras"),
    "float model is a folder": ("--output_dir=new --float_model=run", "float_model run"),
    "float model is text": ("--output_dir=new --float_model=text.txt", "float_model text.txt"),
    "float model truncated": ("--output_dir=new --float_model=short.keras", "short.keras"),
    "float model damaged": ("--output_dir=new --float_model=broken.keras", "broken.keras"),
    "float model of other images": ("--output_dir=new --float_model=wide.keras", "wide.keras 9"),
    "float model is quantized": ("--output_dir=new --float_model=qat.keras", "qat.keras quantized"),
    "float model with NaN": ("--output_dir=new --float_model=nan.keras", "NaN"),
    "epochs of a given model": (
        "--output_dir=new --float_model=float.keras --float_epochs=2",
        "--float_epochs --float_model=float.keras",
    ),
    "rate of a given model": (
        "--output_dir=new --float_model=float.keras --learning_rate=0.5",
        "--learning_rate --float_model=float.keras",
    ),
    "files that may be no run's": ("--output_dir=run", "float_model.keras run.json"),
    "wrong dataset for an old run": ("--output_dir=run --dataset=digitz", "'digitz'"),
    "wrong recipe for an old run": ("--output_dir=run --recipe=layer.json", "conv9"),
    "wrong model for an old run": ("--output_dir=run --model=alexnet", "'alexnet'"),
}
QUANTIZE_CALLS = {
    "no model": ("--dataset=digits", "model_path"),
    "model missing": ("--model_path=gone.keras --dataset=digits", "gone.keras"),
    "model truncated": ("--model_path=short.keras --dataset=digits", "short.keras"),
    "model is quantized": ("--model_path=qat.keras --dataset=digits", "qat.keras quantized"),
    "model with NaN": ("--model_path=nan.keras --dataset=digits", "nan.keras NaN"),
    "no data": ("--model_path=float.keras", "--dataset --calibration_data"),
    "data twice": (
        "--model_path=float.keras --dataset=digits --calibration_data=good.npz",
        "--dataset --calibration_data",
    ),
    "arrays mirrored": (
        "--model_path=float.keras --calibration_data=good.npz --noaugment_flip",
        "--augment_flip --dataset",
    ),
    "unknown dataset": ("--model_path=float.keras --dataset=digitz", "'digitz' digits"),
    "dataset of other classes": ("--model_path=seven.keras --dataset=digits", "7 10 digits"),
    "arrays missing": ("--model_path=float.keras --calibration_data=gone.npz", "gone.npz"),
    "arrays are text": ("--model_path=float.keras --calibration_data=text.txt", "text.txt"),
    "arrays of other images": (
        "--model_path=wide.keras --calibration_data=good.npz",
        "good.npz (9, 8, 1) (8, 8, 1)",
    ),
    "unknown loss": (
        "--model_path=float.keras --calibration_data=good.npz --loss=mistake",
        "--loss=mistake mean_squared_error",
    ),
    "two losses": (
        "--model_path=float.keras --calibration_data=good.npz --loss=mse,mae",
        "--loss=mse,mae",
    ),
    "loss of other targets": (
        "--model_path=float.keras --calibration_data=good.npz --loss=mse",
        "mse (10,)",
    ),
    "loss without targets": (
        "--model_path=float.keras --calibration_data=alone.npz --loss=mse --qat_epochs=1",
        "alone.npz --loss=mse",
    ),
    "loss without targets, nothing to train": (
        "--model_path=float.keras --calibration_data=alone.npz --loss=mse",
        "alone.npz --loss=mse",
    ),
    "half open images": ("--model_path=half.keras --dataset=digits", "half.keras (8, None)"),
    "input_range turned": (
        "--model_path=float.keras --dataset=digits --input_range=1,0",
        "input_range 1.0 0.0",
    ),
}
EXPORT_CALLS = {
    "no model": ("--output=new.tflite", "qat_model"),
    "no output": ("--qat_model=qat.keras", "output"),
    "model missing": ("--qat_model=gone.keras --output=new.tflite", "gone.keras"),
    "model truncated": ("--qat_model=short.keras --output=new.tflite", "short.keras"),
    "model damaged": ("--qat_model=damaged.keras --output=new.tflite", "damaged.keras"),
    "model is float": ("--qat_model=float.keras --output=new.tflite", "float.keras"),
    "model is a folder": ("--qat_model=run --output=new.tflite", "run"),
    "weights NaN": ("--qat_model=qat_nan.keras --output=new.tflite", "conv1 NaN"),
    "unknown io": ("--qat_model=qat.keras --output=new.tflite --io=int4", "io int4 uint8"),
    "folder missing": ("--qat_model=qat.keras --output=gone/new.tflite", "gone/new.tflite"),
    "output is a folder": ("--qat_model=qat.keras --output=run", "run"),
    "output is the model": ("--qat_model=qat.keras --output=./qat.keras", "--output=./qat.keras"),
}
EVALUATE_CALLS = {
    "no file": ("", "tflite"),
    "file missing": ("--tflite=gone.tflite", "gone.tflite"),
    "file is text": ("--tflite=text.txt", "text.txt"),
    "file empty": ("--tflite=empty.tflite", "empty.tflite"),
    "file truncated": ("--tflite=short.tflite", "short.tflite"),
    "unknown split": ("--tflite=good.tflite --split=tset", "'tset' train test"),
    "unknown dataset": ("--tflite=good.tflite --dataset=digitz", "'digitz' digits"),
    "fewer classes": ("--tflite=seven.tflite", "seven.tflite 7 10"),
    "one bound": ("--tflite=good.tflite --input_range=1", "input_range 1 -1,1"),
    "bounds turned": ("--tflite=good.tflite --input_range=1,-1", "input_range 1 -1"),
    "bound infinite": ("--tflite=good.tflite --input_range=0,inf", "input_range inf"),
    "no threads": ("--tflite=good.tflite --threads=0", "threads 0"),
    "json folder missing": ("--tflite=good.tflite --json=gone/new.json", "gone/new.json"),
}
# They go first: C++ libraries greet once a process, which is the business of one test below.
RIGHT_CALLS = {
    **{f"{program}: help": (program, "--help") for program in PROGRAMS},
    "train": (
        "train",
        "--output_dir=new/run --model=lenet --recipe=w4a8 --float_epochs=0 --qat_epochs=0",
    ),
    "train on a given model": (
        "train",
        "--output_dir=new --float_model=float.keras --qat_epochs=0 --recipe=w2a2 --nodistill",
    ),
    "quantize with a dataset": (
        "quantize",
        "--model_path=float.keras --dataset=digits --qat_epochs=0 --output_dir=new --io=uint8",
    ),
    "quantize with arrays": (
        "quantize",
        "--model_path=float.keras --calibration_data=good.npz --qat_epochs=1 --recipe=w4a8 "
        "--output_dir=new",
    ),
    "export": ("export", "--qat_model=qat.keras --output=new.tflite --io=uint8"),
    "evaluate": ("evaluate", "--tflite=good.tflite --split=test[:50] --json=new.json"),
}
WRONG_CALLS = {
    f"{program}: {name}": (program, QUICK[program] + arguments, named)
    for program, calls in zip(
        PROGRAMS, (TRAIN_CALLS, QUANTIZE_CALLS, EXPORT_CALLS, EVALUATE_CALLS), strict=True
    )
    for name, (arguments, named) in calls.items()
}


def float_model(name: str = "lenet", shape=(8, 8, 1), num_classes: int = 10) -> tf_keras.Model:
    tf_keras.utils.set_random_seed(0)
    return models.build(name, shape, num_classes)


def quantized_model(num_classes: int = 10) -> tf_keras.Model:
    model = qat.quantize_model(float_model(num_classes=num_classes), input_range=(0.0, 255.0))
    images = np.random.default_rng(0).uniform(0, 255, (16, 8, 8, 1)).astype(np.float32)
    return qat.calibrate(model, tf.data.Dataset.from_tensors(images))


def with_nan(model: tf_keras.Model) -> tf_keras.Model:
    kernel = next(weight for weight in model.weights if "conv1/kernel" in weight.name)
    kernel.assign(np.where(np.arange(kernel.shape[-1]) == 1, np.nan, kernel.numpy()))
    return model


def damaged(content: bytes) -> bytes:
    """As long as it was, with another byte every 50 in the second quarter."""
    changed = bytearray(content)
    for place in range(len(content) // 4, len(content) // 2, 50):
        changed[place] ^= 0xFF
    return bytes(changed)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> pathlib.Path:
    """A folder with the files that the calls name."""
    folder = tmp_path_factory.mktemp("work")
    recipe = qat.Recipe.from_name("w8a8")
    (folder / "text.txt").write_text("not a model\n")
    (folder / "empty.tflite").touch()
    (folder / "truncated.json").write_text(recipe.to_json()[:-20])
    (folder / "list.json").write_text("[]")
    (folder / "bytes.json").write_bytes(b"\xff\xfe\x00")
    everything = {"weights": {"bits": 8}, "activations": {"bits": 8}}
    for name, rule in RULES.items():
        rules = [rule, everything]
        content = {"schema_version": 1, "name": "own", "rules": rules}
        (folder / name).write_text(json.dumps(content))
    float_model().save(folder / "float.keras")
    float_model(shape=(9, 8, 1)).save(folder / "wide.keras")
    with_nan(float_model()).save(folder / "nan.keras")
    half_open = tf_keras.Input((8, None, 1))
    pooled = tf_keras.layers.GlobalAveragePooling2D()(half_open)
    tf_keras.Model(half_open, tf_keras.layers.Dense(10)(pooled)).save(folder / "half.keras")
    float_model(num_classes=7).save(folder / "seven.keras")
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 8, 8, 1), np.uint8)
    np.savez(folder / "good.npz", x=images, y=rng.integers(0, 10, 40))
    np.savez(folder / "alone.npz", x=images)
    quantized = quantized_model()
    qat.save_model(quantized, folder / "qat.keras", recipe=recipe)
    qat.export_tflite(quantized, folder / "good.tflite")
    qat.save_model(with_nan(quantized), folder / "qat_nan.keras", recipe=recipe)
    qat.export_tflite(quantized_model(num_classes=7), folder / "seven.tflite")
    (folder / "broken.keras").write_bytes(damaged((folder / "float.keras").read_bytes()))
    whole = (folder / "qat.keras").read_bytes()
    (folder / "short.keras").write_bytes(whole[: len(whole) // 2])
    (folder / "damaged.keras").write_bytes(damaged(whole))
    whole = (folder / "good.tflite").read_bytes()
    (folder / "short.tflite").write_bytes(whole[: len(whole) // 2])
    (folder / "run").mkdir()
    shutil.copy(folder / "float.keras", folder / "run" / "float_model.keras")
    (folder / "run" / "report.json").write_text("{}\n")
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """A user's: TFDS has a home outside the folder of the calls, TensorFlow logs as ever."""
    own = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    return own | {"TFDS_DATA_DIR": str(tmp_path_factory.mktemp("tfds"))}


@pytest.fixture(scope="module")
def results(work, environment, tmp_path_factory) -> dict[str, dict]:
    """What each of the calls did, run in one process."""
    folder = tmp_path_factory.mktemp("calls")
    every = RIGHT_CALLS | WRONG_CALLS
    calls = [[program, *arguments.split()] for program, arguments, *_ in every.values()]
    (folder / "calls.json").write_text(json.dumps(calls))
    subprocess.run(
        [
            sys.executable,
            TESTS / "program_calls.py",
            folder / "calls.json",
            folder / "results.json",
        ],
        cwd=work,
        env=environment | {"PYTHONPATH": str(PROJECT)},
        check=True,
        timeout=300,
    )
    return dict(zip(every, json.loads((folder / "results.json").read_text()), strict=True))


# ---------------------------------------------------------------- wrong calls


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_exits_with_2_and_one_helpful_line(name, results):
    result, (_, _, named) = results[name], WRONG_CALLS[name]
    assert result["code"] == 2, result["stderr"][-3000:]
    lines = result["stderr"].splitlines()
    assert len(lines) == 1, result["stderr"]
    assert lines[0].startswith("error: ") and len(lines[0]) <= 600, lines[0]
    missing = [word for word in named.split() if word not in lines[0]]
    assert not missing, f"{missing} not in: {lines[0]}"
    assert "Traceback" not in lines[0] and "0x" not in lines[0]


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_a_wrong_call_changes_no_file(name, results):
    assert results[name]["changes"] == []


# What TensorFlow 2.21 and LiteRT write while they are imported, whatever TF_CPP_MIN_LOG_LEVEL says.
CPP_LOG = re.compile(
    r"[IWE]\d{4} \d\d:|WARNING: All log messages before absl|INFO: Created|To enable"
)


def test_stderr_of_a_process_of_its_own_is_the_one_line(work, environment):
    """But for TensorFlow's own C++ log: this process imports it itself."""
    result = subprocess.run(
        [sys.executable, PROJECT / "scripts" / "train.py", "--output_dir=new", "--recipe=w9a8"],
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    lines = [line for line in result.stderr.splitlines() if not CPP_LOG.match(line)]
    assert result.returncode == 2 and lines[-1].startswith("error: recipe 'w9a8'"), result.stderr
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    assert not (work / "new").exists()


# ---------------------------------------------------------------- right calls


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_explains_every_flag(program, results):
    result = results[f"{program}: help"]
    assert (result["code"], result["stderr"], result["changes"]) == (0, "", [])
    shown = re.findall(r"^ +--(?:\[no\])?(\w+):", result["stdout"], re.MULTILINE)
    assert sorted(shown) == sorted(FLAGS[program])
    assert f"qat-{program}" in result["stdout"], "there is no example"


def test_train_leaves_a_whole_output_folder(results):
    result = results["train"]
    assert result["code"] == 0, result["stderr"]
    files = [pathlib.PurePath(path).relative_to("new") for path in result["changes"]]
    top = {path.parts[1] for path in files if len(path.parts) > 1}
    assert top - {"tensorboard"} == {
        "float_model.keras",
        "qat_model.keras",
        "model.tflite",
        "recipe.json",
        "run.json",
        "report.json",
        "report.md",
        "differences.png",
        "bytes.png",
    }
    assert "lenet w4a8 on digits/1.0.0" in result["stdout"]


@pytest.mark.parametrize("call", ("quantize with a dataset", "quantize with arrays"))
def test_quantize_leaves_a_whole_output_folder(call, results):
    result = results[call]
    assert result["code"] == 0, result["stderr"]
    names = {pathlib.PurePath(path).name for path in result["changes"]}
    assert {"qat_model.keras", "model.tflite", "recipe.json", "report.json", "report.md"} <= names
    assert "float_model.keras" not in names
    assert "float.keras w" in result["stdout"] and "integers match" in result["stdout"]


def test_train_on_a_given_model_writes_no_other_float_model(results):
    result = results["train on a given model"]
    assert result["code"] == 0, result["stderr"]
    assert "new/qat_model.keras" in result["changes"]
    assert "new/float_model.keras" not in result["changes"]
    assert "float.keras" not in result["changes"]


@pytest.mark.parametrize(
    "call, recipe, distill",
    (
        ("train", "w4a8", recommended("w4a8").distill),
        ("train on a given model", "w2a2", False),
    ),
)
def test_train_says_which_settings_it_took(call, recipe, distill, results):
    shown = re.search(r"settings: (\{.*\})", results[call]["stdout"])
    settings = json.loads(shown[1])
    best = recommended(recipe, converged=call == "train on a given model")
    assert settings == best.to_dict() | {"distill": distill}
    assert recommended("w2a2").distill, "the flag has nothing to switch off"


def test_export_writes_its_file_alone(results):
    result = results["export"]
    assert result["code"] == 0, result["stderr"]
    assert result["changes"] == ["new.tflite"]
    assert "CONV_2D x 2" in result["stdout"]


def test_evaluate_prints_what_it_writes(results):
    result = results["evaluate"]
    assert result["code"] == 0, result["stderr"]
    assert result["changes"] == ["new.json"]
    content = json.loads(result["stdout"])
    assert content["num_eval_examples"] == 50 and 0 <= content["accuracy"] <= 1
    assert content["tflite"] == "good.tflite" and content["float_operators"] == []
