"""The table of recommended settings, and how it reaches a training."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest

from qat import settings
from qat.recipe import Recipe, RecipeError, Rule, TensorSpec
from qat.settings import RECOMMENDED, TrainSettings, default_epochs, recommended, width_class
from qat.train import TrainConfig, _scheduled


@pytest.mark.parametrize(
    "name, row",
    (
        ("w8a8", "8 bits"),
        ("w8a16", "8 bits"),
        ("w7a8", "4 to 7 bits"),
        ("w8a5", "4 to 7 bits"),
        ("w4a16", "4 to 7 bits"),
        ("w4a4-minmax", "4 to 7 bits"),
        ("w3a8", "2 and 3 bits"),
        ("wta8", "ternary"),
        ("wta4", "ternary"),
        ("wta2", "ternary"),
        ("wta1", "binary"),
        ("w8a2", "2 and 3 bits"),
        ("w2a4", "2 and 3 bits"),
        ("w1a1", "binary"),
        ("w8a1", "binary"),
        ("w1a8", "binary"),
    ),
)
def test_the_narrowest_width_decides(name, row):
    assert width_class(Recipe.from_name(name)) == row
    assert recommended(name) == RECOMMENDED[row]


@pytest.mark.parametrize(
    "name, gently", (("w8a8", True), ("w4a4", True), ("w2a2", True), ("w1a1", False))
)
def test_a_converged_model_is_trained_gently(name, gently):
    """A sign has to be learned anew, whatever the float model has learned."""
    young, converged = recommended(name), recommended(name, converged=True)
    assert (converged.learning_rate < young.learning_rate) == gently
    assert dataclasses.replace(converged, learning_rate=young.learning_rate) == young


def test_rules_count_and_float_layers_do_not():
    eight = TensorSpec()
    rest = Rule(weights=eight, activations=eight)
    narrow = Rule(layer="conv2", weights=TensorSpec(bits=2))
    kept = Rule(layer="head", keep_float="regression")
    assert width_class(Recipe(name="own", rules=(kept, rest))) == "8 bits"
    assert width_class(Recipe(name="own", rules=(narrow, kept, rest))) == "2 and 3 bits"


def test_an_unknown_recipe_is_an_error():
    with pytest.raises(RecipeError):
        recommended("int8")


@pytest.mark.parametrize("row", RECOMMENDED)
def test_every_row_can_be_trained(row):
    class Data:
        def train_stream(self, start_step=0):
            return None

    def callbacks(**fields):  # raises where a value is illegal
        settings = dataclasses.replace(RECOMMENDED[row], **fields)
        config = settings.train_config(epochs=3, steps_per_epoch=10)
        return [type(each).__name__ for each in _scheduled(config, Data())]

    assert callbacks() == ["RandomByStep"]
    freezing = {"freeze_batch_norm": 0.5, "freeze_ranges": 0.5, "dampening": 0.1}
    names = ["FreezeBatchNorm", "FreezeRanges", "Dampening"]
    wide_first = callbacks(**freezing, gradual_bits=((8, 0.5),))
    assert wide_first == ["RandomByStep", "GradualBits", *names]
    frozen_weights = callbacks(**freezing, iterative_freezing=0.01)
    assert frozen_weights == ["RandomByStep", *names, "IterativeFreezing"]
    # Narrower networks are trained longer.
    factors = [RECOMMENDED[name].epochs_factor for name in RECOMMENDED]
    assert all(left <= right for left, right in itertools.pairwise(factors))


def test_a_config_has_all_settings():
    names = {field.name for field in dataclasses.fields(TrainSettings)}
    own = {"epochs_factor", "warmup", "distill"}
    assert names - own <= {field.name for field in dataclasses.fields(TrainConfig)}
    given = TrainSettings(
        learning_rate=0.5,
        warmup=0.1,
        weight_decay=0.25,
        quantizer_learning_rate=0.125,
        distill=True,
        distill_temperature=2.0,
        distill_weight=0.5,
        freeze_batch_norm=0.75,
        reestimate_batch_norm=7,
        freeze_ranges=0.9,
        dampening=0.3,
        gradual_bits=((8, 0.2),),
    )
    teacher = object()
    config = given.train_config(
        epochs=4, steps_per_epoch=25, float_model=teacher, jit_compile=True, from_logits=False
    )
    assert (config.warmup_steps, config.teacher, config.epochs) == (10, teacher, 4)
    assert config.jit_compile and not config.from_logits
    for name in names - own:
        assert getattr(config, name) == getattr(given, name), name
    quiet = dataclasses.replace(given, distill=False)
    assert quiet.train_config(epochs=1, steps_per_epoch=1, float_model=teacher).teacher is None


def test_epochs_follow_the_datasets_size_times_the_factor():
    for steps, factor in itertools.product((3, 400, 10**6), (1, 3)):
        expected = factor * default_epochs(steps, quantized=True)
        assert TrainSettings(epochs_factor=factor).epochs(steps) == expected


def test_settings_go_into_json():
    given = TrainSettings(gradual_bits=((8, 0.25), (4, 0.5)))
    content = json.loads(json.dumps(given.to_dict()))
    assert content == given.to_dict()
    assert content["gradual_bits"] == [[8, 0.25], [4, 0.5]]
    assert set(content) == set(vars(settings.TrainSettings()))
