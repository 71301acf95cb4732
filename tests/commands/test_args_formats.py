"""`step35-patch args --format`: what a shell, a YAML reader and a JSON reader make of it."""

import dataclasses
import json
import subprocess

import pytest
import yaml
from support.config_samples import published, resaved, tiny

from step35_patch.arguments import OPTION_GROUPS, megatron_arguments, megatron_options
from step35_patch.cli import main
from step35_patch.config import Step35Config


def dense() -> dict:
    return tiny(moe_layers_enum=[], use_head_wise_attn_gate=False)


@pytest.fixture(params=[published, tiny, resaved, dense], ids=lambda make: make.__name__)
def config(request, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(request.param()))
    return Step35Config.from_dict(request.param())


def printed(tmp_path, capsys, form: str) -> str:
    assert main(["args", str(tmp_path), "--format", form]) == 0
    return capsys.readouterr().out


def test_bash_reads_the_same_words(config, tmp_path, capsys):
    (tmp_path / "model.sh").write_text(printed(tmp_path, capsys, "bash"))
    for name in "01,":  # what [0,1] would stand for, unquoted
        (tmp_path / name).touch()
    command = 'set -eu; source "$1"; printf "%s\\0" "${MODEL_ARGUMENTS[@]}"'
    done = subprocess.run(
        ["bash", "-c", command, "bash", "./model.sh"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == ""
    words = done.stdout.split("\0")[:-1]
    given = megatron_arguments(config)
    assert sorted(words) == sorted(given)
    # Each value still follows its option.
    for option, value in megatron_options(config).items():
        assert value is None or words[words.index(option) + 1] == value


def test_every_option_has_one_group(config, tmp_path, capsys):
    grouped = [option for group in OPTION_GROUPS for option in group.options]
    assert len(grouped) == len(set(grouped))
    assert megatron_options(config).keys() <= set(grouped)
    text = printed(tmp_path, capsys, "bash")
    is_moe = any(plan.is_moe for plan in config.layers)
    assert ("    # MoE: " in text) == is_moe and "    # Attention: " in text


def test_json_has_words_and_values(config, tmp_path, capsys):
    found = json.loads(printed(tmp_path, capsys, "json"))
    assert found["arguments"] == megatron_arguments(config)
    values = megatron_options(config)
    assert found["options"] == {k: True if v is None else v for k, v in values.items()}
    assert {o for group in found["groups"].values() for o in group} == values.keys()


def test_yaml_is_the_provider(config, tmp_path, capsys):
    """Its names are fields of the provider, and its values those that the provider has."""
    from step35_patch import Step35ModelProvider

    found = yaml.safe_load(printed(tmp_path, capsys, "yaml"))
    assert list(found) == ["model"]
    provider = Step35ModelProvider.from_hf(tmp_path)
    fields = {field.name for field in dataclasses.fields(provider)}
    assert found["model"].keys() <= fields
    for name, value in found["model"].items():
        there = json.loads(json.dumps(getattr(provider, name)))
        assert value == there and type(value) is type(there), name
    assert {"num_layers", "layer_types", "swiglu_limits"} <= found["model"].keys()


def test_without_a_format_it_can_be_continued(config, tmp_path, capsys):
    assert main(["args", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("--num-layers ") and not any(line.startswith("#") for line in lines)
    assert all(line.endswith(" \\") for line in lines[:-1]) and not lines[-1].endswith("\\")
