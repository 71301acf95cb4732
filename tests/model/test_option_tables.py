"""The tables of fields and of refused options name what the installed Megatron-Core has."""

from __future__ import annotations

import sys

import pytest
from support.reference import tiny_config, write_hf_folder

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.model.megatron_fields import FIELDS, hf_fields
from step35_patch.model.refused_options import REFUSED_OPTIONS, Place

pytestmark = pytest.mark.megatron

from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

# Refused since a Megatron-Core that is not the oldest tested one.
NEW_OPTIONS = {
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "mtp_detach_heads",
    "use_grouped_gemm_for_shared_expert",
    "use_transformer_engine_op_fuser",
}


@pytest.fixture(scope="module")
def parser():
    """Megatron's, with the package's arguments."""
    from megatron.training.arguments import parse_args

    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain_gpt.py"])
        parse_args(lambda parser: parsers.append(parser) or parser)
    return parsers[0]


def test_fields_have_the_names_that_they_are_known_by(parser):
    config_fields = TransformerConfig.__dataclass_fields__
    for row in FIELDS:
        assert row.hf is None or row.hf in Step35Config.model_fields
        assert row.option is None or row.option in parser._option_string_actions
        if row.of_provider:
            assert row.megatron in set(Step35ModelProvider.__dataclass_fields__) - {*config_fields}
        else:
            assert row.megatron is None or row.megatron in config_fields


def test_refused_options_are_known_where_they_are_refused(parser):
    """A misspelt one would never be refused."""
    arguments = {action.dest for action in parser._actions}
    known = {
        Place.ARGUMENT: arguments,
        Place.CONFIG: set(TransformerConfig.__dataclass_fields__),
        Place.TORCH_ATTENTION: set(TransformerConfig.__dataclass_fields__),
    }
    for place, names in known.items():
        wanted = {row.name for row in REFUSED_OPTIONS if place in row.places}
        assert wanted - names <= NEW_OPTIONS


def test_provider_describes_the_config_that_it_was_made_from(tmp_path):
    config = tiny_config(use_moe=True, use_head_wise_attn_gate=True, moe_layers_enum=[2, 3, 4, 5])
    provider = Step35ModelProvider.from_hf(write_hf_folder(tmp_path, config, {}))
    described = hf_fields(provider)
    assert described == {name: config[name] for name in described}


def test_provider_refuses_another_window_than_its_config_s(tmp_path):
    folder = write_hf_folder(tmp_path, tiny_config(), {})
    with pytest.raises(ValueError, match="sliding_attention_setting"):
        Step35ModelProvider.from_hf(folder, sliding_attention_setting={"sliding_window": 99})
