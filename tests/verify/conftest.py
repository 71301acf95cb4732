import pytest
from support.reference import random_weights, tiny_config, write_hf_folder


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A config, its weights, and the folder of both."""
    config = tiny_config()
    weights = random_weights(config, 51)
    return config, weights, write_hf_folder(tmp_path_factory.mktemp("hf"), config, weights)
