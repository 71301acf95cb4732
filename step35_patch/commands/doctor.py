"""`step35-patch doctor`: what a launch in this environment would meet, on one screen."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Callable
from typing import TYPE_CHECKING

from step35_patch.commands.private_words import without_private_words
from step35_patch.commands.screen import (
    GOOD,
    NOTICE,
    PLAIN,
    WRONG,
    Line,
    Section,
    as_text,
    show,
)

if TYPE_CHECKING:
    from step35_patch.patch.diagnosis import Diagnosis

_FENCE = "```"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch doctor`."""
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print everything as JSON")
    form.add_argument(
        "--report",
        action="store_true",
        help="print a block of Markdown for a bug report instead",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Look, and print what is found; returns the exit status: 0, or 1 if something is wrong."""
    from step35_patch.patch.diagnosis import diagnose

    found, hide = diagnose(), without_private_words()
    if options.json:
        print(as_json(found, hide))
    elif options.report:
        print(f"{_FENCE}text\n{as_text(sections(found, hide))}\n{_FENCE}")
    else:
        show(sections(found, hide))
        print("For a bug report: step35-patch doctor --report")
    return 0 if found.ok else 1


def as_json(found: Diagnosis, hide: Callable[[str], str]) -> str:
    """A diagnosis as one JSON object.

    Args:
        found: The diagnosis.
        hide: What every text of it goes through.
    """
    report = {
        "ok": found.ok,
        "versions": found.versions,
        "targets": found.targets,
        "problems": [
            {name: hide(value) for name, value in dataclasses.asdict(problem).items()}
            for problem in found.problems
        ],
        "notices": list(map(hide, found.notices)),
        "megatron": list(map(hide, found.megatron_folders)),
        "gpus": found.gpus,
        "startup": hide(found.startup),
        "variables": {name: hide(value) for name, value in found.variables.items()},
        "config": found.config or None,
        "extras": found.extras,
    }
    return json.dumps(report, indent=1)


def sections(found: Diagnosis, hide: Callable[[str], str]) -> list[Section]:
    """A diagnosis as rows; the arguments are those of `as_json`."""
    from step35_patch.patch.diagnosis import NEEDED_BY
    from step35_patch.patch.targets import TESTED

    megatron = found.versions["megatron-core"] or "not imported"
    versions = found.versions | {"megatron-core": f"{megatron} (tested: {TESTED})"}
    if found.gpus:
        counted = {name: found.gpus.count(name) for name in found.gpus}
        versions["cuda"] = f"{versions['cuda']}, " + ", ".join(
            f"{number} x {name}" for name, number in counted.items()
        )
    software = [Line(text or "-", label) for label, text in versions.items()]
    software += [Line(hide(line), "Megatron") for line in found.megatron_folders]
    start = [Line(hide(found.startup), "start-up file")]
    start += [Line(hide(value), name) for name, value in found.variables.items()]
    start += [Line(found.config, "the config")] if found.config else []
    extras = [
        Line(f"needs {missing}, for {NEEDED_BY[name]}", name, NOTICE)
        for name, missing in found.extras.items()
        if missing
    ]
    here = [name for name, missing in found.extras.items() if not missing]
    if here:
        extras.insert(0, Line(", ".join(here), "installed"))
    problems = [Line(hide(str(problem)), mark=WRONG) for problem in found.problems]
    end = f"{len(problems)} problem(s)" if problems else "Nothing is wrong"
    return [
        Section("Software", software),
        Section("Start", start),
        Section("Wrapped in Megatron (missing: not in this version)", _targets(found)),
        Section("Extras", extras),
        Section("To know", [Line(hide(notice), mark=NOTICE) for notice in found.notices]),
        Section(end, problems or [Line("Nothing would stop a launch", mark=GOOD)]),
    ]


def _targets(found: Diagnosis) -> list[Line]:
    """A row for each module, and in one with several states a row for each of them."""
    rows: dict[tuple[str, str, str], list[str]] = {}
    for target in found.targets:
        state = target["state"]
        if state == "wrapped":
            mark = GOOD
        elif target["required"] or state in ("refused", "replaced"):
            mark = WRONG
        else:
            mark = PLAIN if state == "missing" else NOTICE
        module = target["module"].removeprefix("megatron.")
        rows.setdefault((mark, state, module), []).append(target["attribute"])
    return [
        Line(f"{module}: {', '.join(names)}", state, mark)
        for (mark, state, module), names in rows.items()
    ]
