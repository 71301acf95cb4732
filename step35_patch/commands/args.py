"""`step35-patch args`: Megatron's arguments for a config, ready for a launch script."""

from __future__ import annotations

import argparse
import json
import shlex
from typing import TYPE_CHECKING, Any

from step35_patch.commands.config_argument import add_config_argument, read_config

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch args`."""
    add_config_argument(parser)
    parser.add_argument(
        "--format",
        choices=list(_FORMATS),
        help="bash: an array with comments, for a launch script; yaml: the model section of a "
        "Megatron-Bridge config; json: the words, and each option's value (default: the options "
        "alone, one a line, to be continued)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print them; returns the exit status: 0, or 2 for an unusable config."""
    config = read_config(options)
    if config is None:
        return 2
    print(_FORMATS[options.format](config) if options.format else as_lines(config))
    return 0


def as_lines(config: Step35Config) -> str:
    """One option a line, to be pasted into a command."""
    from step35_patch.arguments import megatron_options

    options = megatron_options(config).items()
    return " \\\n".join(_words(option, value) for option, value in options)


def as_bash(config: Step35Config) -> str:
    """An array, by subject."""
    from step35_patch.arguments import OPTION_GROUPS, megatron_options

    values = megatron_options(config)
    lines = [
        "# Step-3.5 for pretrain_gpt.py, by: step35-patch args --format bash",
        '# torchrun ... pretrain_gpt.py "${MODEL_ARGUMENTS[@]}" "${OTHER_ARGUMENTS[@]}"',
        "# STEP35_CONFIG alone fills them in; those that are given are held against it.",
        "MODEL_ARGUMENTS=(",
    ]
    for group in OPTION_GROUPS:
        given = [option for option in group.options if option in values]
        if given:
            lines.append(f"    # {group.title}{': ' * bool(group.note)}{group.note}")
            lines += [f"    {_words(option, values[option])}" for option in given]
    return "\n".join([*lines, ")"])


def as_json(config: Step35Config) -> str:
    """The words of the command line, and each option's value: text, or true for a flag."""
    from step35_patch.arguments import OPTION_GROUPS, megatron_arguments, megatron_options

    values = megatron_options(config)
    report = {
        "arguments": megatron_arguments(config),
        "options": {name: True if value is None else value for name, value in values.items()},
        "groups": {
            group.title: given
            for group in OPTION_GROUPS
            if (given := [option for option in group.options if option in values])
        },
    }
    return json.dumps(report, indent=1)


def as_yaml(config: Step35Config) -> str:
    """The fields of Megatron-Bridge's model provider, by subject."""
    lines = [
        "# Step-3.5 for Megatron-Bridge, by: step35-patch args --format yaml",
        "# Read by process_config_with_overrides, as its scripts do with --config-file, into a",
        "# ConfigContainer whose model is a Step35BridgeProvider. AutoBridge makes that after",
        "# `import step35_patch.bridge`, with these values already: what is left out keeps them.",
        "# Not for --yaml-cfg of Megatron-LM.",
        "model:",
    ]
    for title, fields in _provider_fields(config):
        lines.append(f"  # {title}")
        lines += [f"  {name}: {_yaml(value)}" for name, value in fields.items()]
    return "\n".join(lines)


def _provider_fields(config: Step35Config) -> list[tuple[str, dict[str, Any]]]:
    """The fields of a provider, under the title of their option's group."""
    from step35_patch.arguments import OPTION_GROUPS
    from step35_patch.model.megatron_fields import decided_by, provider_fields

    title_of = {option: group.title for group in OPTION_GROUPS for option in group.options}
    fields: dict[str, dict[str, Any]] = {group.title: {} for group in OPTION_GROUPS}
    for row in decided_by(config):
        if row.megatron is not None and row.option is not None:
            fields[title_of[row.option]][row.megatron] = row.megatron_value(config)
    told = {name for found in fields.values() for name in found}
    fields["By layer, which Megatron has one value or no name for"] = {
        name: value for name, value in provider_fields(config).items() if name not in told
    }
    return [(title, found) for title, found in fields.items() if found]


def _words(option: str, value: str | None) -> str:
    return option if value is None else f"{option} {shlex.quote(value)}"


def _yaml(value: Any) -> str:
    """A value in YAML's flow style, which is JSON's, in what YAML 1.1 and 1.2 read alike."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_yaml(entry)}" for name, entry in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_yaml, value)) + "]"
    text = json.dumps(value)
    # PyYAML takes 1e-05 for text.
    if isinstance(value, float) and "e" in text and "." not in text:
        text = text.replace("e", ".0e")
    return text


_FORMATS = {"bash": as_bash, "yaml": as_yaml, "json": as_json}
