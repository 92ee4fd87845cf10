"""Settings of the whole suite, and data that only some machines have."""

import pytest
import tensorflow_datasets as tfds
from hypothesis import settings

# The same examples on every run: a change that passed here passes everywhere.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")


@pytest.fixture
def fashion_mnist() -> tfds.core.DatasetBuilder:
    """The prepared builder; tests skip where there is none."""
    try:
        builder = tfds.builder("fashion_mnist")
    except Exception as error:
        pytest.skip(f"TFDS cannot open fashion_mnist: {error}")
    if not builder.is_prepared():
        pytest.skip(f"fashion_mnist is not prepared in {builder.data_dir}; set TFDS_DATA_DIR")
    return builder
