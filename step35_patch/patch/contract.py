"""Whether the Megatron-Core that is there has what `step35_patch.patch.targets` says it must have.

A release is known by its version; a copy, a fork or a development branch may say any. What is
wrapped is looked at itself: a parameter that a wrapper binds and that is gone, a field of
TransformerConfig that layers read, or one by which Megatron-Core does by itself what is patched
here.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import NamedTuple

from step35_patch.patch.patcher import find
from step35_patch.patch.targets import (
    CONFIG_FIELDS,
    NATIVE_FIELDS,
    SEES_CONFIG,
    Target,
)

_CONFIG_MODULE = "megatron.core.transformer.transformer_config"


class Drift(NamedTuple):
    """One thing that is otherwise than this package knows it.

    Attributes:
        what: the target or field, with what was expected and what is there.
        reports: whether nothing but what Megatron prints depends on it.
    """

    what: str
    reports: bool


def drifts(module: ModuleType, targets: Iterable[Target]) -> list[Drift]:
    """All that is otherwise in a module with targets; empty if it is what this package knows.

    A target that is not there at all is not among them (`step35_patch.patch.patcher.missing`).
    """
    found = [drift for target in targets for drift in _of_target(module, target)]
    return found + list(_of_config()) if module.__name__ == SEES_CONFIG else found


def _of_target(module: ModuleType, target: Target) -> Iterator[Drift]:
    wrapped = find(module, target.attribute)
    if wrapped is None:
        return
    parameters = inspect.signature(wrapped).parameters
    gone = [name for name in target.parameters if name not in parameters]
    if not gone:
        return
    hint = ""
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        hint = (
            f" of {wrapped.__module__}.{wrapped.__qualname__}, somebody's wrapper that does not "
            "say what it hands on; give it functools.wraps, or put it there after step35_patch"
        )
    yield Drift(
        f"{target.attribute}: expected the parameter{'s' * (len(gone) > 1)} {', '.join(gone)}, "
        f"found ({', '.join(parameters)}){hint}",
        target.reports,
    )


def _of_config() -> Iterator[Drift]:
    config = vars(sys.modules[_CONFIG_MODULE])["TransformerConfig"]
    there = {field.name for field in dataclasses.fields(config)}
    if gone := [name for name in CONFIG_FIELDS if name not in there]:
        yield Drift(f"TransformerConfig: expected the fields {', '.join(gone)}, found none", False)
    for name, what in NATIVE_FIELDS.items():
        if name in there:
            yield Drift(
                f"TransformerConfig.{name}: expected no such field, found {what} in Megatron-Core "
                "itself, which this package would do a second time",
                False,
            )
