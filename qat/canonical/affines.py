"""Affine layers that are part of something larger become one with it."""

from __future__ import annotations

from typing import Any

import tf_keras

from qat.canonical.graph import Call, calls, functional, rebuild
from qat.canonical.hard_activations import factors, hard_activation, is_affine
from qat.canonical.made import MadeLayers, Origins
from qat.operator_layers import Affine

layers = tf_keras.layers
_WITH_KERNEL = (layers.Conv1D, layers.Conv2D, layers.DepthwiseConv2D, layers.Dense)


def join_affines(model: tf_keras.Model) -> tuple[tf_keras.Model, dict[str, Origins]]:
    """A new functional model of the same float function with fewer `Affine` layers.

    Hard activations made of them become activation layers. An affine layer on another one, or on a
    Rescaling, becomes one; a plain positive factor that does not follow a kernel becomes a
    Rescaling, which the kernels behind it absorb. All other layers are shared with the result.

    Returns:
        (model, origins): origins names the layers that each new one takes the place of.
    """
    joining = _Joining(functional(model))
    return rebuild(joining.model, joining.visit, joining.on_input), joining.made.origins


class _Joining:
    def __init__(self, model: tf_keras.Model):
        self.model = model
        self.made = MadeLayers(())
        self.producer = {id(call.output): call for call in calls(model) if len(call.outputs) == 1}
        # For the id of each of the old model's tensors, the new model's.
        self.new: dict[int, Any] = {}

    def on_input(self, old: Any, new: Any) -> Any:
        self.new[id(old)] = new
        return new

    def visit(self, call: Call, args: tuple, kwargs: dict) -> Any:
        found = hard_activation(call, self.producer)
        if found is not None:
            function, match = found
            output = self._instead(match.calls, match.source, layers.Activation, function)
        elif isinstance(call.layer, Affine):
            output = self._affine(call)
        else:
            output = call.layer(*args, **kwargs)
        if len(call.outputs) == 1:
            self.new[id(call.output)] = output
        return output

    def _affine(self, call: Call) -> Any:
        """The layer together with all the affine layers in front of it."""
        (multiplier, offset), source, joined = factors(call.layer), call.inputs[0], (call,)
        while (found := self.producer.get(id(source))) is not None and is_affine(found.layer):
            inner, shift = factors(found.layer)
            multiplier, offset = multiplier * inner, multiplier * shift + offset
            source, joined = found.inputs[0], (*joined, found)
        before = self.producer.get(id(source))
        behind_kernel = before is not None and isinstance(before.layer, _WITH_KERNEL)
        if multiplier.ndim == 0 and multiplier > 0 and not offset.any() and not behind_kernel:
            return self._instead(joined, source, layers.Rescaling, float(multiplier))
        return self._instead(joined, source, Affine, multiplier, offset)

    def _instead(self, joined: tuple[Call, ...], source: Any, kind: type, *args: Any) -> Any:
        """A layer of this kind in place of the calls, on a tensor of the old model."""
        origins = tuple((one.layer.name, type(one.layer).__name__) for one in joined)
        last = joined[0].layer
        layer = self.made.once(
            last, str(id(source)), last.name, origins, lambda name: kind(*args, name=name)
        )
        return layer(self.new[id(source)])
