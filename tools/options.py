"""The table of Megatron-Core's options and what this package makes of each: docs/options.md.

    python tools/options.py

Each field of TransformerConfig and each argument of Megatron's parser has one verdict: fixed by the
model, named at start, or without effect on what the model computes. The first two are read from the
package's own tables (`step35_patch.model.megatron_fields`, `step35_patch.model.refused_options`,
`step35_patch.model.named_options`), the third from `tools/neutral_options.py`. A name without one
is undecided: tests/model/test_option_tables.py fails on it, until somebody has looked it up in
Megatron-Core and put it where it belongs.

The three tested releases are read in processes of their own, from the folders that `./run setup`
makes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

from neutral_options import NEUTRAL_GROUPS, NEUTRAL_NAMES  # noqa: E402

DOCUMENT = ROOT / "docs" / "options.md"

FIXED, NAMED, NEUTRAL, UNDECIDED = "fixed", "named", "neutral", "undecided"

# Decided by code, not by a row of a table: what it is, and where.
_BY_CODE = {
    "rotary_base": "by layer; `step35_patch.patch.arguments.fill_in`",
    "rotary_percent": "by layer; `step35_patch.patch.arguments.fill_in`",
    "reset_attention_mask": "`step35_patch.patch.arguments.layout_problems`: where the mask would "
    "be ignored",
    "yaml_cfg": "`step35_patch.patch.parse_args.parse`: it replaces the arguments",
}


@dataclasses.dataclass(frozen=True)
class Option:
    """A name of one Megatron-Core: a field, an argument, or one thing under both.

    Attributes:
        name: The field, and the attribute of the parsed arguments.
        is_field: Of TransformerConfig.
        group: The title of the argument's group, or None without an argument.
        default: As source text; the field's, or else the argument's.
    """

    name: str
    is_field: bool
    group: str | None
    default: str


def installed_options() -> dict[str, Option]:
    """Those of the Megatron-Core that this interpreter imports."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    fields = {field.name: _default(field) for field in dataclasses.fields(TransformerConfig)}
    arguments = {
        action.dest: (group.title, action.default)
        for group in megatron_parser()._action_groups
        for action in group._group_actions
        if action.dest != "help" and not action.dest.startswith("step35_")
    }
    return {
        name: Option(
            name,
            name in fields,
            arguments[name][0] if name in arguments else None,
            _text(fields[name] if name in fields else arguments[name][1]),
        )
        for name in sorted({*fields, *arguments})
    }


def megatron_parser():
    """Megatron's own; with this package's arguments besides if it is active."""
    from megatron.training import arguments

    parsers = []
    words, sys.argv = sys.argv, ["pretrain_gpt.py"]
    try:
        arguments.parse_args(lambda parser: parsers.append(parser) or parser)
    finally:
        sys.argv = words
    return parsers[0]


def _default(field: dataclasses.Field) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def _text(value: object) -> str:
    """A default without what differs between two runs, such as an address."""
    if callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return repr(getattr(value, "name", value))


def verdict(option: Option) -> tuple[str, str]:
    """What is made of an option, and the legal value or the reason."""
    from step35_patch.model.megatron_fields import FIELDS
    from step35_patch.model.named_options import NAMED_OPTIONS
    from step35_patch.model.refused_options import REFUSED_OPTIONS

    name = option.name
    named = {row.name: row for row in NAMED_OPTIONS}
    refused = {row.name: row for row in REFUSED_OPTIONS}
    fields = {
        known: row
        for row in FIELDS
        for known in (row.megatron, row.option and _attribute(row.option))
        if known is not None
    }
    if name in named:
        row = named[name]
        return NAMED, f"`{row.published[0]!r}`; another value: {row.effect}"
    if name in refused:
        row = refused[name]
        return FIXED, f"{' or '.join(f'`{value!r}`' for value in row.legal)}: {row.reason}"
    if name in _BY_CODE:
        return FIXED, _BY_CODE[name]
    if name in fields:
        row = fields[name]
        value = f"from the config's `{row.hf}`" if row.hf else f"`{row.value!r}`"
        if row.is_default:
            return NEUTRAL, f"filled in ({value}); another value is taken"
        return FIXED, "the activation of SwiGLU" if name == "activation_func" else value
    if name in NEUTRAL_NAMES:
        return NEUTRAL, NEUTRAL_NAMES[name]
    # A field may change what a layer computes, whatever group its argument stands in.
    if not option.is_field and option.group in NEUTRAL_GROUPS:
        return NEUTRAL, NEUTRAL_GROUPS[option.group]
    return UNDECIDED, "look it up in Megatron-Core"


def _attribute(option: str) -> str:
    """The parsed argument's name of an option of `FIELDS`."""
    return {
        "--norm-epsilon": "norm_epsilon",
        "--apply-layernorm-1p": "apply_layernorm_1p",
        "--disable-bias-linear": "add_bias_linear",
    }.get(option, option.removeprefix("--").replace("-", "_"))


def rows(options: Iterable[Option]) -> dict[str, tuple[str, str]]:
    """Verdict and text of each option, by its name."""
    return {option.name: verdict(option) for option in options}


def document(releases: dict[str, dict[str, Option]]) -> str:
    """docs/options.md.

    Args:
        releases: The options of each Megatron-Core, by its version, oldest first.
    """
    lines = [_HEAD.format(releases=", ".join(releases))]
    newest: dict[str, Option] = {}
    for options in releases.values():
        newest |= options
    known = rows(newest[name] for name in sorted(newest))
    for kind, heading in _HEADINGS.items():
        lines += [heading, "", "| option | | releases | Megatron's default | |", "| --- " * 5 + "|"]
        for name, (found, text) in known.items():
            if found == kind:
                lines.append(_line(name, text, releases))
        lines.append("")
    return "\n".join(lines)


def _line(name: str, text: str, releases: dict[str, dict[str, Option]]) -> str:
    having = {version: options[name] for version, options in releases.items() if name in options}
    option = list(having.values())[-1]
    kinds = ["field"] * option.is_field + ["argument"] * (option.group is not None)
    versions = "all" if len(having) == len(releases) else ", ".join(_minor(v) for v in having)
    defaults = {version: it.default for version, it in having.items()}
    if len(set(defaults.values())) == 1:
        default = f"`{option.default}`"
    else:
        default = ", ".join(f"{_minor(v)}: `{it}`" for v, it in defaults.items())
    cells = (f"`{name}`", " and ".join(kinds), versions, default, text)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


_HEAD = """# Megatron-Core's options and Step-3.5

Written by `python tools/options.py`; do not edit. Megatron-Core {releases}.
A *field* is one of `TransformerConfig` (and of `Step35ModelProvider`), an *argument* one of
Megatron's parser, by the name of its parsed value. Where both have a name, the default is the
field's.
"""

_HEADINGS = {
    FIXED: "## Fixed by the model\n\nAnother value is refused, before anything is built.",
    NAMED: "## A choice that changes what is computed\n\nTaken, and named in one line at start: "
    '"differs from the published model: ...".',
    NEUTRAL: "## Without effect on what the model computes",
    UNDECIDED: "## Undecided",
}


def read_release(path: Path | None) -> tuple[str, dict[str, Option]]:
    """Version and options of the Megatron-Core in a folder, or of the installed one for None."""
    environment = os.environ | {"STEP35_PATCH": "0"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    code = (
        "import dataclasses, json, sys\n"
        "import options\n"
        "from megatron.core.package_info import __version__\n"
        "found = [dataclasses.astuple(it) for it in options.installed_options().values()]\n"
        "print(json.dumps([__version__.split('+')[0], found]))\n"
    )
    output = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=ROOT / "tools",
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    version, found = json.loads(output.splitlines()[-1])
    return version, {values[0]: Option(*values) for values in found}


def main() -> None:
    older = sorted((Path(sys.prefix)).glob("megatron-core-*"))
    releases = dict(read_release(path) for path in [*older, None])
    DOCUMENT.write_text(document(releases))
    undecided = {
        name: option
        for options in releases.values()
        for name, option in options.items()
        if verdict(option)[0] == UNDECIDED
    }
    for option in undecided.values():
        print(f"undecided: {option}")
    sys.exit(bool(undecided))


if __name__ == "__main__":
    main()
