"""The tables of fields and of refused options name what the installed Megatron-Core has."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path

import pytest
from support.reference import tiny_config, write_hf_folder

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.model.megatron_fields import FIELDS, hf_fields
from step35_patch.model.named_options import NAMED_OPTIONS
from step35_patch.model.refused_options import REFUSED_OPTIONS, Place

pytestmark = pytest.mark.megatron

from megatron.core.optimizer import OptimizerConfig  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

TOOL = Path(__file__).resolve().parent.parent.parent / "tools" / "options.py"

# Refused, and not in every tested Megatron-Core.
NEW_OPTIONS = {
    "freeze_all_layers",
    "moe_single_grouped_bias",
    "moe_single_grouped_weight",
    "use_grouped_gemm_for_dense_mlp",
    "use_legacy_models",
    "moe_mlp_glu_interleave_size",
    "moe_shared_expert_glu_interleave_size",
    "mtp_detach_heads",
    "use_grouped_gemm_for_shared_expert",
    "use_transformer_engine_op_fuser",
}


@pytest.fixture(scope="module")
def tool():
    """tools/options.py, which writes docs/options.md."""
    spec = importlib.util.spec_from_file_location("options", TOOL)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def parser(tool):
    """Megatron's."""
    return tool.megatron_parser()


@pytest.fixture(scope="module")
def options(tool):
    """All of the installed Megatron-Core's, by name."""
    return tool.installed_options()


def test_every_option_is_decided(tool, options):
    """A new release's new option is somebody's to look up: CONTRIBUTING.md says how."""
    assert len(options) > 700
    rows = tool.rows(options.values())
    assert [name for name, (found, _) in rows.items() if found == tool.UNDECIDED] == []


def test_new_field_is_undecided_whatever_group_its_argument_is_in(tool):
    field = tool.Option("moe_new_idea", True, "logging", "None")
    assert tool.verdict(field)[0] == tool.UNDECIDED
    argument = dataclasses.replace(field, is_field=False)
    assert tool.verdict(argument)[0] == tool.NEUTRAL
    assert tool.verdict(dataclasses.replace(argument, group="moe"))[0] == tool.UNDECIDED


def test_document_is_what_the_tables_say(tool, options):
    """`python tools/options.py` writes it again."""
    lines = tool.DOCUMENT.read_text().splitlines()
    table = {line.split("`")[1]: line for line in lines if line.startswith("| `")}
    rows = tool.rows(options.values())
    assert [name for name, (_, text) in rows.items() if f" {text} |" not in table[name]] == []


def test_no_option_is_decided_twice(tool):
    refused = {row.name for row in REFUSED_OPTIONS}
    named = {row.name for row in NAMED_OPTIONS}
    neutral = {*tool.NEUTRAL_NAMES}
    assert not (refused & named or refused & neutral or named & neutral)


def test_named_options_are_fields(options):
    known = {name for name, option in options.items() if option.is_field}
    # Since 0.18.
    assert {row.name for row in NAMED_OPTIONS} - known <= {"moe_expert_rank_capacity_factor"}


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
        Place.OPTIMIZER: set(OptimizerConfig.__dataclass_fields__),
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
