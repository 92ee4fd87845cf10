"""Teaching qat a custom layer or activation function."""

from __future__ import annotations

from collections.abc import Callable

import tf_keras

from qat.errors import UserError
from qat.export.lower_activation import lower_pointwise
from qat.export.lowerings import LOWERINGS, Lowering
from qat.float_only import FLOAT_ONLY
from qat.roles import ACTIVATIONS, ROLES, Role

_NEED_LOWERING = (Role.PASS, Role.COMPUTE)
_LEGAL = {found.name.lower(): found for found in (Role.IDENTITY, Role.POINTWISE, Role.FLOAT)}
_LEGAL |= {found.name.lower(): found for found in _NEED_LOWERING}


def register(
    kind: type | Callable,
    role: str,
    *,
    lowering: Lowering | None = None,
    reason: str | None = None,
) -> None:
    """Says what a custom layer class, or a function in `Activation(function)`, is to the file.

    | role | what the layer does | in the file |
    |---|---|---|
    | "identity" | nothing at inference, e.g. stochastic depth | no operator |
    | "pointwise" | a function of one number, the same for all | a table of its 256 codes |
    | "float" | anything that TensorFlow's converter can write | float operators |
    | "pass" | moves or picks values; the output has the input's grid | what `lowering` writes |
    | "compute" | other arithmetic; the output gets a grid of its own | what `lowering` writes |

    Args:
        kind: a layer class that Keras can copy (register_keras_serializable), or a function; a
            function can only be pointwise.
        role: from the table.
        lowering: `(builder, layer, inputs, output shape) → Stored or Pending`, as the functions in
            `qat/export/lower_*.py`; for "float", takes the converter's place.
        reason: of "float", for the account.

    Raises:
        UserError: an unknown role, one without the lowering or reason that it needs, or something
            that is neither a layer class nor a function.
    """
    if role not in _LEGAL:
        raise UserError(f"unknown role {role!r}; legal: {', '.join(_LEGAL)}")
    found, is_layer = _LEGAL[role], isinstance(kind, type)
    if is_layer and not issubclass(kind, tf_keras.layers.Layer) or not callable(kind):
        raise UserError(f"{kind!r} is no tf_keras layer class and no function")
    name = kind.__name__
    if not is_layer and found is not Role.POINTWISE:
        raise UserError(
            f"the function {name!r} can only be registered as 'pointwise', not {role!r}"
        )
    if found in _NEED_LOWERING and lowering is None:
        raise UserError(
            f"{name} as {role!r} needs a lowering: the function that writes its operators"
        )
    if (found is Role.FLOAT) != (reason is not None):
        raise UserError(f"{name}: 'float' needs a reason for the account, other roles have none")
    if not is_layer:
        ACTIVATIONS[name] = found
        return
    ROLES[kind] = found
    if reason is not None:
        FLOAT_ONLY[kind] = reason
    made = {Role.IDENTITY: _nothing, Role.POINTWISE: lower_pointwise}.get(found)
    if lowering or made:
        LOWERINGS[kind] = lowering or made


def _nothing(builder, layer, inputs, shape):
    return inputs[0]
