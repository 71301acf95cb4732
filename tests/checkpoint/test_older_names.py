"""Checkpoints name the MTP layers' output matrices as they always did; the model no longer does."""

from __future__ import annotations

import pytest
import torch
from support.ours import build
from support.reference import random_weights, tiny_config, write_hf_folder

pytestmark = pytest.mark.megatron

OLDER = "mtp_output_layers.1.weight"
NAME = "mtp_output_heads.1.weight"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    config = tiny_config()
    folder = tmp_path_factory.mktemp("hf")
    return build(write_hf_folder(folder, config, random_weights(config, 3)))


def test_the_key_of_a_sharded_checkpoint_stays(model):
    assert model.sharded_state_dict()[NAME].key == OLDER
    assert model.sharded_state_dict("first.")[f"first.{NAME}"].key == f"first.{OLDER}"


def test_an_older_state_dict_is_loaded(model):
    weight = model.mtp_output_heads.get_parameter("1.weight")
    before = weight.detach().clone()
    older = {
        name.replace(NAME, OLDER): value.clone()
        for name, value in model.state_dict_for_save_checkpoint().items()
        if torch.is_tensor(value)
    }
    with torch.no_grad():
        weight.zero_()
    missing, unexpected = model.load_state_dict(older, strict=False)
    assert NAME not in missing and not unexpected
    torch.testing.assert_close(weight, before, rtol=0, atol=0)
