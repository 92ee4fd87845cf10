"""TensorFlow functions that a model's file may call on tensors: computations, nothing else.

A TFOpLambda layer names any public symbol of TensorFlow, `io.write_file` and `load_library` too.
"""

from __future__ import annotations

_ROOT = (
    "__operators__.add __operators__.eq __operators__.getitem __operators__.logical_and "
    "__operators__.logical_not __operators__.logical_or __operators__.logical_xor "
    "__operators__.ne abs acos acosh add add_n argmax argmin argsort asin asinh atan atan2 atanh "
    "batch_to_space bitcast boolean_mask broadcast_to cast ceil clip_by_norm clip_by_value concat "
    "cos cosh cumsum divide einsum ensure_shape equal exp expand_dims eye fill floor floor_div "
    "floordiv floormod gather gather_nd greater greater_equal identity less less_equal logical_and "
    "logical_not logical_or matmul maximum meshgrid minimum multiply negative norm not_equal "
    "one_hot ones ones_like pad pow range rank realdiv reduce_all reduce_any reduce_logsumexp "
    "reduce_max reduce_mean reduce_min reduce_prod reduce_sum repeat reshape reverse roll round "
    "saturate_cast scalar_mul shape sigmoid sign sin sinh size slice sort space_to_batch "
    "space_to_batch_nd split sqrt square squeeze stack stop_gradient strided_slice subtract tan "
    "tanh tensordot tile transpose truediv truncatediv unstack where zeros zeros_like"
).split()
_MATH = (
    "abs add add_n argmax argmin ceil cos cosh count_nonzero cumprod cumsum divide divide_no_nan "
    "equal erf erfc exp expm1 floor floordiv floormod greater greater_equal is_finite is_inf "
    "is_nan l2_normalize less less_equal log log1p log_sigmoid log_softmax logical_and logical_not "
    "logical_or logical_xor maximum minimum mod multiply multiply_no_nan negative not_equal pow "
    "reciprocal reciprocal_no_nan reduce_all reduce_any reduce_euclidean_norm reduce_logsumexp "
    "reduce_max reduce_mean reduce_min reduce_prod reduce_std reduce_sum reduce_variance rint "
    "round rsqrt scalar_mul sigmoid sign sin sinh softmax softplus softsign sqrt square "
    "squared_difference subtract tan tanh top_k truediv xdivy xlogy"
).split()
_NN = (
    "atrous_conv2d avg_pool avg_pool1d avg_pool2d avg_pool3d batch_normalization bias_add "
    "conv1d conv1d_transpose conv2d conv2d_transpose conv3d conv3d_transpose conv_transpose "
    "convolution crelu depth_to_space depthwise_conv2d dilation2d dropout elu gelu "
    "l2_normalize leaky_relu local_response_normalization log_softmax lrn max_pool max_pool1d "
    "max_pool2d max_pool3d max_pool_with_argmax moments normalize_moments pool relu relu6 selu "
    "separable_conv2d sigmoid silu softmax softplus softsign space_to_batch space_to_depth swish "
    "tanh top_k"
).split()
_IMAGE = (
    "adjust_brightness adjust_contrast central_crop convert_image_dtype crop_and_resize "
    "crop_to_bounding_box extract_patches flip_left_right flip_up_down grayscale_to_rgb hsv_to_rgb "
    "pad_to_bounding_box per_image_standardization resize resize_with_crop_or_pad resize_with_pad "
    "rgb_to_grayscale rgb_to_hsv rot90 transpose"
).split()
_LINALG = "band_part diag diag_part einsum l2_normalize matmul matrix_transpose norm trace".split()
_KERAS = (
    "activations.elu activations.exponential activations.gelu activations.hard_sigmoid "
    "activations.linear activations.mish activations.relu activations.selu activations.sigmoid "
    "activations.softmax activations.softplus activations.softsign activations.swish "
    "activations.tanh backend.abs backend.argmax backend.argmin backend.batch_dot "
    "backend.batch_flatten backend.bias_add backend.cast backend.clip backend.concatenate "
    "backend.dot backend.elu backend.equal backend.exp backend.expand_dims backend.flatten "
    "backend.greater backend.hard_sigmoid backend.l2_normalize backend.less backend.log "
    "backend.max backend.maximum backend.mean backend.min backend.minimum backend.one_hot "
    "backend.ones_like backend.permute_dimensions backend.pool2d backend.pow backend.prod "
    "backend.relu backend.repeat_elements backend.reshape backend.resize_images backend.reverse "
    "backend.round backend.shape backend.sigmoid backend.sign backend.softmax backend.softplus "
    "backend.softsign backend.spatial_2d_padding backend.sqrt backend.square backend.squeeze "
    "backend.stack backend.std backend.stop_gradient backend.sum backend.switch backend.tanh "
    "backend.tile backend.transpose backend.var backend.zeros_like"
).split()
_BY_NAMESPACE = {
    "": _ROOT,
    "math.": _MATH,
    "nn.": _NN,
    "image.": _IMAGE,
    "linalg.": _LINALG,
    "keras.": _KERAS,
}
_CURRENT = frozenset(
    f"{namespace}{name}" for namespace, names in _BY_NAMESPACE.items() for name in names
)
# Canonical names as TFOpLambda writes them; older TensorFlows had some under compat.v1.
SAFE_CALLS = _CURRENT | {f"compat.v1.{name}" for name in _CURRENT}
