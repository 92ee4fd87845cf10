"""Callbacks in plain `model.fit`, against NumPy twins; `qat.fit` has them in test_train.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_model_optimization as tfmot
import tf_keras
from stripes import (
    BATCH,
    CLASSES,
    STEPS,
    DoAfterEachStep,
    Stripes,
    Watcher,
    compiled,
    float_model,
    linear_model,
    same_model,
)

import qat
from qat import callbacks
from qat.callbacks.scheduled import cosine
from qat.grid import SMALLEST_SCALE

layers = tf_keras.layers


def no_loss(y_true, y_pred):
    """Leaves the weights to the callbacks."""
    return 0.0 * tf.reduce_sum(y_pred)


def fit(model, *given, epochs=2, data=None):
    return model.fit(data or Stripes().epoch(), epochs=epochs, callbacks=list(given), verbose=0)


def kernel_of(model, name):
    """(latent kernel, quantizer, its variables)."""
    return model.get_layer(f"quant_{name}")._weight_vars[0]


def assert_equal_lists(left, right):
    for one, other in zip(left, right, strict=True):
        np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- schedule


def test_the_cosine_goes_from_the_first_value_to_the_last():
    assert [cosine(share, 0.25, 3.0, 1.0) for share in (0.0, 0.25, 0.625, 1.0, 2.0)] == (
        pytest.approx([3.0, 3.0, 2.0, 1.0, 1.0])
    )
    assert cosine(0.5, 0.25, 0.0, 1.0) == pytest.approx((1 - math.cos(math.pi / 3)) / 2)


class Steps(callbacks.Scheduled):
    """Keeps the steps that it is told of."""

    def __init__(self, **options):
        super().__init__(**options)
        self.steps, self.finished = [], 0

    def at_step(self, step):
        self.steps.append((step, self.total))

    def finish(self):
        self.finished += 1


def test_steps_are_counted_over_the_whole_training():
    model = compiled(linear_model(0))
    steps = Steps()
    fit(model, steps, epochs=2)
    fit(model, steps, epochs=1)  # a training of its own
    model.fit(Stripes().epoch(), initial_epoch=1, epochs=2, callbacks=[steps], verbose=0)
    first = [(step, 2 * STEPS) for step in range(2 * STEPS)]
    assert steps.steps == [*first, *((step, STEPS) for step in range(STEPS)), *first[STEPS:]]
    assert steps.finished == 3


def test_one_training_may_be_several_calls():
    model = compiled(linear_model(0))
    steps = Steps(total_steps=2 * STEPS)
    fit(model, steps, epochs=1)
    assert steps.finished == 0
    fit(model, steps, epochs=1)
    assert steps.steps == [(step, 2 * STEPS) for step in range(2 * STEPS)] and steps.finished == 1


def test_a_dataset_without_length_is_an_error_that_helps():
    model, endless = compiled(linear_model(0)), Stripes().train_stream()
    with pytest.raises(ValueError, match="steps_per_epoch"):
        fit(model, Steps(), data=endless.take(3))


# ---------------------------------------------------------------- statistics


def statistics_of(model):
    norm = model.get_layer("bn")
    return np.concatenate([norm.moving_mean.numpy(), norm.moving_variance.numpy()])


def test_batch_norm_is_frozen_from_its_step_on():
    model = compiled(float_model())
    norm = model.get_layer("bn")
    statistics = Watcher(lambda: statistics_of(model))
    gammas = Watcher(norm.gamma.numpy)
    fit(model, callbacks.FreezeBatchNorm(after=0.375), statistics, gammas)
    moved = [
        bool((a != b).any()) for a, b in zip(statistics.seen, statistics.seen[1:], strict=False)
    ]
    assert moved == [True] * 3 + [False] * 5
    # gamma learns on.
    assert all((a != b).any() for a, b in zip(gammas.seen, gammas.seen[1:], strict=False))
    # The next training is as ever.
    fit(model, statistics, epochs=1)
    assert (statistics.seen[-1] != statistics.seen[-2]).any()
    assert "call" not in vars(norm)


@pytest.mark.parametrize("frozen", (False, True))
def test_frozen_batch_norm_trains_on_what_inference_sees(frozen):
    model = compiled(float_model(), 0.0)
    model.get_layer("bn").moving_mean.assign([0.5, -0.5, 1.0, 0.0])
    data = Stripes().epoch()
    given = [callbacks.FreezeBatchNorm(after=0.0)] if frozen else []
    trained = fit(model, *given, epochs=1, data=data).history["loss"][0]
    inferred = model.evaluate(data, verbose=0)
    assert (abs(trained - inferred) < 1e-5) == frozen


@pytest.mark.slow
def test_statistics_can_be_measured_when_they_freeze():
    model, data = compiled(same_model("w4a4"), 0.0, run_eagerly=True), Stripes().epoch()
    freezing = callbacks.FreezeBatchNorm(0.5, data, steps=3)
    fit(model, callbacks.FreezeRanges(0.0), freezing)
    found = statistics_of(model)
    qat.reestimate_batch_norm(same_model("w4a4"), data, steps=3)
    np.testing.assert_array_equal(statistics_of(model), found)


@pytest.mark.slow
def test_batch_norm_is_measured_at_the_end():
    model = compiled(same_model("w4a4"), run_eagerly=True)
    data = Stripes().epoch()
    averages = Watcher(lambda: statistics_of(model))
    early = callbacks.ReestimateBatchNorm(data, steps=3, total_steps=3 * STEPS)
    fit(model, averages, early)
    np.testing.assert_array_equal(statistics_of(model), averages.seen[-1])
    fit(model, averages, early, epochs=1)
    assert (statistics_of(model) != averages.seen[-1]).all()
    found = statistics_of(model)
    qat.reestimate_batch_norm(model, data, steps=3)
    np.testing.assert_array_equal(statistics_of(model), found)


def ranges_of(model):
    names = ("minimum", "maximum", "observed")
    found = [w for w in model.weights if any(f"output_{name}" in w.name for name in names)]
    assert found
    return np.array([float(w) for w in found])


def with_outputs_in_wrappers():
    keras = tfmot.quantization.keras
    model, config = float_model(), qat.configs.uniform()
    annotated = tf_keras.models.clone_model(
        model,
        clone_function=lambda layer: (
            keras.quantize_annotate_layer(layer, config) if "conv" in layer.name else layer
        ),
    )
    with keras.quantize_scope():
        return keras.quantize_apply(annotated)


@pytest.mark.parametrize(
    "build",
    (lambda: same_model("w8a8"), with_outputs_in_wrappers),
    ids=("ours", "tfmot"),
)
def test_ranges_stop_at_their_step_and_go_on_after_training(build):
    model = compiled(build(), 0.05)
    ranges = Watcher(lambda: ranges_of(model))
    fit(model, callbacks.FreezeRanges(after=0.5), ranges)
    moved = [bool((a != b).any()) for a, b in zip(ranges.seen, ranges.seen[1:], strict=False)]
    assert moved == [True] * 4 + [False] * 4
    fit(model, ranges, epochs=1)
    assert (ranges.seen[-1] != ranges.seen[-2]).any()


# ---------------------------------------------------------------- dampening


def grid_of(model, name, bits):
    """(lowest, highest, step) of a symmetric kernel, float64, from its variables."""
    _, quantizer, variables = kernel_of(model, name)
    step = variables["unit"].numpy().astype(float) * variables["gain"].numpy()
    lowest = -(2 ** (bits - 1)) + (1 if quantizer.narrow_range else 0)
    return lowest * step, (2 ** (bits - 1) - 1) * step, step


@pytest.mark.parametrize("aggregation", ("filter", "sum"))
def test_dampening_pulls_weights_to_their_grid_points(aggregation):
    rate, strength, total, start = 0.5, 0.3, 2 * STEPS, 0.25
    model = compiled(same_model("w4a4"), rate, loss=no_loss, run_eagerly=True)
    names, expected = {"conv": 9, "logits": 64}, {}
    for name, filter_size in names.items():
        w = kernel_of(model, name)[0].numpy().astype(float)
        lowest, highest, step = grid_of(model, name, 4)
        assert (w > highest).any() or (w < lowest).any(), "no weight is clipped"
        for t in range(total):
            share = max(0.0, (t / total - start) / (1 - start))
            weight = strength * (1 - math.cos(math.pi * share)) / 2
            target = np.clip(np.rint(w / step) * step, lowest, highest)
            inside = (w >= lowest) & (w <= highest)
            pull = 2 * weight * (w - target) * inside
            w = w - rate * pull / (filter_size if aggregation == "filter" else 1)
        expected[name] = w
    gains = [v.numpy() for v in model.trainable_variables if "gain" in v.name]
    before = {name: kernel_of(model, name)[0].numpy() for name in names}
    callback = callbacks.Dampening(strength, aggregation=aggregation, start=start)
    losses = fit(model, callback).history["loss"]
    for name, w in expected.items():
        np.testing.assert_allclose(kernel_of(model, name)[0], w, rtol=0, atol=1e-6)
        assert np.abs(w - before[name]).max() > 1e-4
    assert_equal_lists(gains, [v.numpy() for v in model.trainable_variables if "gain" in v.name])
    assert losses == [0.0, 0.0] and "compute_loss" not in vars(model)


def test_dampening_leaves_binary_kernels_alone():
    model = compiled(same_model("w1a8"), 1.0, loss=no_loss, run_eagerly=True)
    before = model.get_weights()
    fit(model, callbacks.Dampening(1.0), epochs=1)
    kernels = [i for i, w in enumerate(model.weights) if "kernel" in w.name]
    assert_equal_lists([before[i] for i in kernels], [model.get_weights()[i] for i in kernels])


# ---------------------------------------------------------------- iterative freezing


class Twin:
    """The paper's algorithm 1 for one weight after another, in plain Python."""

    def __init__(self, codes, momentum):
        self.m, self.z = momentum, list(codes)
        self.direction, self.f = [0] * len(codes), [0.0] * len(codes)
        self.average, self.frozen = [float(z) for z in codes], [False] * len(codes)

    def step(self, codes, threshold):
        for i, new in enumerate(codes):
            if self.frozen[i]:
                continue
            delta = new - self.z[i]
            flipped = (
                delta != 0 and self.direction[i] != 0 and (delta > 0) != (self.direction[i] > 0)
            )
            self.f[i] = self.m * flipped + (1 - self.m) * self.f[i]
            if delta:
                self.direction[i] = 1 if delta > 0 else -1
            self.z[i] = new
            if self.f[i] > threshold:
                self.frozen[i] = True
                self.z[i] = round(self.average[i])
            self.average[i] = self.m * new + (1 - self.m) * self.average[i]


@pytest.mark.slow
def test_weights_are_frozen_as_in_the_paper():
    momentum, first, last, start, total = 0.2, 0.35, 0.15, 0.25, 40
    model = compiled(same_model("w4a4"), 0.0, run_eagerly=True)
    weight, quantizer, variables = kernel_of(model, "conv")
    step = quantizer.grid(variables).scale.numpy()
    rng = np.random.default_rng(0)
    walk = rng.integers(-5, 5, weight.shape) + 0.5
    walk = walk + rng.normal(
        0, rng.choice([0.0, 0.05, 0.4, 1.0], weight.shape), (total, *weight.shape)
    )
    walk = (walk * step).astype(np.float32)

    def codes(w):
        return np.clip(np.rint(w / step), -7, 7).astype(int).ravel()

    twin = Twin(codes(weight.numpy()), momentum)
    thresholds = [cosine((t + 1) / total, start, first, last) for t in range(total)]
    for t, threshold in enumerate(thresholds):
        twin.step(codes(walk[t]), threshold if (t + 1) / total > start else math.inf)
    freezing = callbacks.IterativeFreezing(
        last, first_threshold=first, momentum=momentum, start=start
    )
    shaken = DoAfterEachStep(lambda t: weight.assign(walk[t]))
    fit(model, shaken, freezing, epochs=1, data=Stripes().epoch(total))
    (tracked,) = (t for t in freezing._tracked if t.kernel.weight is weight)
    np.testing.assert_array_equal(tracked.frozen.numpy().ravel(), twin.frozen)
    assert 0.1 < np.mean(twin.frozen) < 0.9
    np.testing.assert_array_equal(tracked.codes.numpy().ravel(), twin.z)
    loose = ~np.array(twin.frozen)
    np.testing.assert_allclose(
        tracked.frequency.numpy().ravel()[loose], np.array(twin.f)[loose], atol=1e-6
    )
    frozen = tracked.frozen.numpy()
    pinned = (np.reshape(twin.z, weight.shape) * step)[frozen]
    np.testing.assert_allclose(weight.numpy()[frozen], pinned, rtol=1e-6)
    np.testing.assert_array_equal(weight.numpy()[~frozen], walk[-1][~frozen])
    others = [t.frozen.numpy() for t in freezing._tracked]
    share = sum(mask.sum() for mask in others) / sum(mask.size for mask in others)
    assert freezing.frozen_share == pytest.approx(share)


@pytest.mark.slow
def test_frozen_weights_keep_their_integers_while_the_rest_learns():
    model = compiled(same_model("w2a2"), 0.3)
    weight, quantizer, variables = kernel_of(model, "conv")
    freezing = callbacks.IterativeFreezing(0.02, first_threshold=0.02, momentum=0.2, start=0.0)
    (seen, codes) = [], []

    def look(step):
        tracked = next(t for t in freezing._tracked if t.kernel.weight is weight)
        seen.append(tracked.frozen.numpy())
        codes.append(quantizer.codes(weight, variables).numpy())

    fit(model, freezing, DoAfterEachStep(look), epochs=10)
    assert 0 < seen[-1].mean() < 1
    for earlier, before, after in zip(seen, codes, codes[1:], strict=False):
        np.testing.assert_array_equal(before[earlier], after[earlier])
    assert (codes[0] != codes[-1])[~seen[-1]].any()


# ---------------------------------------------------------------- gradual bits

STAGES = [(8, 0.25), (4, 0.5)]
WIDTHS = [8] * 2 + [4] * 2 + [2] * 4


def quantizers_of(model):
    """{name: (quantizer, its variables)} of kernels and activations."""
    found = {}
    for layer in model.layers:
        if isinstance(layer, qat.FakeQuantize):
            found[layer.name] = layer.quantizer, layer.quantizer_weights
        elif getattr(layer, "_weight_vars", None):
            found[layer.name] = layer._weight_vars[0][1:]
    return found


@pytest.mark.parametrize("method", ("lsq", "lsqplus", "pact", "minmax"))
def test_widths_fall_to_the_recipes(method):
    model = compiled(same_model(f"w2a2-{method}"), 0.0, run_eagerly=True)
    quantizers = quantizers_of(model)
    own = {name: quantizer.num_bits for name, (quantizer, _) in quantizers.items()}
    assert sorted(set(own.values())) == [2, 8]
    kappa = {n: getattr(q, "gradient_scale", None) for n, (q, _) in quantizers.items()}

    def ends(name):
        quantizer, variables = quantizers[name]
        kernel = kernel_of(model, name[6:])[0] if name.startswith("quant_") else None
        grid = quantizer.grid(variables, kernel if kernel is None else tf.convert_to_tensor(kernel))
        lowest = np.array(grid.lowest) if not quantizer.symmetric else 0.0
        return np.array(grid.highest) - lowest

    def look():
        return {n: (q.num_bits, ends(n)) for n, (q, _) in quantizers.items()}

    watcher = Watcher(look)
    fit(model, callbacks.FreezeRanges(0.0), callbacks.GradualBits(STAGES), watcher)
    for name, bits in own.items():
        widths = [seen[name][0] for seen in watcher.seen[1:]]
        assert widths == [max(bits, width) for width in WIDTHS], name
        for seen in watcher.seen:  # the range is kept
            np.testing.assert_allclose(seen[name][1], watcher.seen[0][name][1], rtol=1e-6)
    assert {n: q.num_bits for n, (q, _) in quantizers.items()} == own
    for name, (quantizer, _) in quantizers.items():
        if kappa[name] is not None:
            assert quantizer.gradient_scale == pytest.approx(kappa[name], rel=1e-12)


def test_channels_of_zeros_are_still_to_be_found_at_another_width():
    model = compiled(same_model("w2a2"), 0.0, run_eagerly=True)
    (quantizer, variables) = kernel_of(model, "conv")[1:]
    unit, kernel = variables["unit"].numpy(), kernel_of(model, "conv")[0].numpy()
    unit[..., 0], kernel[..., 0] = SMALLEST_SCALE, 0
    variables["unit"].assign(unit)
    kernel_of(model, "conv")[0].assign(kernel)
    fit(model, callbacks.GradualBits(STAGES))
    quantizer(tf.ones_like(kernel), True, variables)
    found = variables["unit"].numpy().ravel()
    assert found[0] > 0.1
    np.testing.assert_allclose(found[1:], unit.ravel()[1:], rtol=1e-6)


def test_the_gradient_scale_follows_the_width():
    model = compiled(same_model("w2a2"), 0.0, run_eagerly=True)
    (quantizer, variables) = kernel_of(model, "conv")[1:]
    seen = Watcher(lambda: quantizer.gradient_scale)
    fit(model, callbacks.GradualBits(STAGES), seen)
    expected = [1 / math.sqrt(9 * (2 ** (bits - 1) - 1)) for bits in WIDTHS]
    assert seen.seen[1:] == pytest.approx(expected)


@pytest.mark.slow
def test_a_training_with_gradual_bits_exports(tmp_path):
    model = compiled(same_model("w2a2"), 0.01)
    fit(model, callbacks.GradualBits(STAGES))
    qat.settle_biases(model)
    path = qat.export_tflite(model, tmp_path / "model.tflite")
    found = qat.verify_tflite(path, model, Stripes().validation, layer_examples=0)
    assert found.integers_match
    assert {q.num_bits for q, _ in quantizers_of(model).values()} == {2, 8}


@pytest.mark.slow
def test_validation_sees_the_widths_of_the_moment():
    data, model = Stripes(), compiled(same_model("w2a2"), 0.0)
    shown = model.fit(
        data.epoch(),
        epochs=2,
        validation_data=data.validation,
        callbacks=[callbacks.GradualBits([(8, 0.5)]), callbacks.FreezeBatchNorm(0.0)],
        verbose=0,
    ).history["val_loss"]
    assert shown[0] != shown[1]
    assert shown[1] == pytest.approx(model.evaluate(data.validation, verbose=0), rel=1e-5)


# ---------------------------------------------------------------- distillation


def log_softmax(x):
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def batch_of_logits(seed):
    rng = np.random.default_rng(seed)
    student, teacher = rng.normal(0, 2, (2, BATCH, CLASSES))
    return rng.integers(0, CLASSES, BATCH), student, teacher


def expected_loss(labels, student, teacher, temperature, weight):
    soft = np.exp(log_softmax(teacher / temperature)) * log_softmax(student / temperature)
    hard = -log_softmax(student)[np.arange(BATCH), labels].mean()
    return weight * temperature**2 * -soft.sum(-1).mean() + (1 - weight) * hard


@pytest.mark.parametrize("temperature, weight", ((1.0, 1.0), (3.0, 0.25), (2.0, 0.0)))
@pytest.mark.parametrize("from_logits", (True, False))
def test_the_distillation_loss(temperature, weight, from_logits):
    labels, student, teacher = batch_of_logits(1)
    loss = callbacks.DistillationLoss(temperature, weight, from_logits)
    packed = np.concatenate([labels[:, None], teacher], -1).astype(np.float32)
    output = student if from_logits else np.exp(log_softmax(student))
    expected = expected_loss(labels, student, teacher, temperature, weight)
    assert float(loss(packed, output.astype(np.float32))) == pytest.approx(expected, rel=1e-5)
    # Without a teacher it is the labels' loss.
    expected = expected_loss(labels, student, teacher, 1.0, 0.0)
    for shape in ((-1,), (-1, 1)):
        found = float(loss(labels.reshape(shape), output.astype(np.float32)))
        assert found == pytest.approx(expected, rel=1e-5)


def test_the_distillation_loss_is_serializable():
    loss = callbacks.DistillationLoss(2.0, 0.5, False)
    config = tf_keras.utils.serialize_keras_object(loss)
    again = tf_keras.utils.deserialize_keras_object(config)
    assert type(again) is callbacks.DistillationLoss and again.get_config() == loss.get_config()


@pytest.mark.parametrize("softmax", (False, True), ids=("logits", "softmax"))
def test_a_teacher_teaches_and_metrics_see_labels(softmax):
    student, teacher, data = linear_model(1), linear_model(2, softmax=softmax), Stripes()
    before = teacher.get_weights()
    rates = {"metrics": ["accuracy"], "loss": callbacks.DistillationLoss(2.0, 0.5)}
    compiled(student, 0.0, **rates)
    found = student.fit(
        data.epoch(),
        validation_data=data.epoch(),
        callbacks=[callbacks.Distillation(teacher)],
        verbose=0,
    ).history
    images, labels = zip(*(data.batch(1000 + step) for step in range(STEPS)), strict=True)

    def logits(model):
        kernel, bias = (weight.numpy().astype(float) for weight in model.weights)
        return [batch.reshape(BATCH, -1) @ kernel + bias for batch in images]

    answers = list(zip(labels, logits(student), logits(teacher), strict=True))
    expected = np.mean([expected_loss(*each, 2.0, 0.5) for each in answers])
    assert found["loss"][0] == pytest.approx(expected, rel=1e-5)
    assert found["val_loss"][0] == pytest.approx(expected, rel=1e-5)
    accuracy = np.mean([(s.argmax(-1) == y).mean() for y, s, _ in answers])
    assert found["accuracy"][0] == pytest.approx(accuracy, abs=1e-6)
    assert_equal_lists(before, teacher.get_weights())
    # Afterwards the model is as it was: the loss is that of the labels.
    expected = np.mean([expected_loss(*each, 1.0, 0.0) for each in answers])
    assert student.evaluate(data.epoch(), verbose=0)[0] == pytest.approx(expected, rel=1e-5)


def test_dampening_and_distillation_share_the_loss():
    model = compiled(same_model("w4a4"), loss=callbacks.DistillationLoss(), run_eagerly=True)
    both = [callbacks.Distillation(linear_model(0)), callbacks.Dampening(1.0)]
    fit(model, *both, epochs=1)
    assert "compute_loss" not in vars(model)


# ---------------------------------------------------------------- wrong arguments

WRONG = {
    "share": (lambda: callbacks.FreezeBatchNorm(after=1.5), "after.*1.5"),
    "negative share": (lambda: callbacks.FreezeRanges(after=-0.1), "after.*-0.1"),
    "strength": (lambda: callbacks.Dampening(-1.0), "strength.*-1.0"),
    "aggregation": (lambda: callbacks.Dampening(aggregation="mean"), "filter.*sum.*'mean'"),
    "threshold": (lambda: callbacks.IterativeFreezing(0.0), "threshold.*0.0"),
    "thresholds": (lambda: callbacks.IterativeFreezing(0.2, first_threshold=0.1), "first.*0.1"),
    "momentum": (lambda: callbacks.IterativeFreezing(momentum=2.0), "momentum.*2.0"),
    "no stage": (lambda: callbacks.GradualBits([]), "stages"),
    "rising widths": (lambda: callbacks.GradualBits([(4, 0.2), (8, 0.5)]), "falling"),
    "falling ends": (lambda: callbacks.GradualBits([(8, 0.5), (4, 0.2)]), "rising"),
    "16 bits": (lambda: callbacks.GradualBits([(16, 0.5)]), "16"),
    "never the own width": (lambda: callbacks.GradualBits([(8, 1.0)]), "below 1"),
    "temperature": (lambda: callbacks.DistillationLoss(0.0), "temperature.*0.0"),
    "weight": (lambda: callbacks.DistillationLoss(1.0, 2.0), "weight.*2.0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_named(name):
    make, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        make()
