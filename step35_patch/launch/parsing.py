"""A training program's arguments, read by the parser of the Megatron-Core that is installed.

Megatron ends at the first word that it cannot read; here each such word is one problem, it is left
out, and the rest is read.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from step35_patch.config.problem import Problem
from step35_patch.launch.values import shown, unknowns
from step35_patch.patch.parse_args import add_arguments

_EMPTY = Problem(
    "''",
    "an argument that begins with --",
    "an empty word",
    "take it away; it comes of quotes around an empty variable",
)


class _Parser(argparse.ArgumentParser):
    """Raises where argparse would end the process."""

    def error(self, message: str) -> NoReturn:
        raise argparse.ArgumentError(None, message)


@dataclass
class Parsed:
    """What the arguments say.

    Attributes:
        parser: Megatron's, with this package's arguments.
        args: all of them, with Megatron's defaults.
        words: those that could be read.
        problems: those that could not.
        notes: what is legal, and worth a look.
    """

    parser: argparse.ArgumentParser
    args: Any
    words: list[str]
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def megatron_parser() -> argparse.ArgumentParser:
    """Megatron's parser, with this package's arguments, that raises `argparse.ArgumentError`."""
    from megatron.training.arguments import add_megatron_arguments

    parser = _Parser(allow_abbrev=False, exit_on_error=False, add_help=False)
    return add_arguments(add_megatron_arguments(parser))


def read_arguments(words: Sequence[str]) -> Parsed:
    """Read all that can be read.

    Args:
        words: the program's arguments; what is not known of them is marked
            (`step35_patch.launch.values`).
    """
    parser = megatron_parser()
    known = {name: action for action in parser._actions for name in action.option_strings}
    parsed = Parsed(parser, None, [])
    groups = list(argument_groups(words))
    for name, values in groups:
        action = known.get(name.partition("=")[0]) if name.startswith("-") else None
        if action is None:
            parsed.problems += _unknown_words(name, values, list(known))
        elif (problem := _unreadable(parser, action, name, values)) is not None:
            parsed.problems.append(problem)
        else:
            parsed.words += [name, *values]
    parsed.args = parser.parse_args(parsed.words)
    parsed.notes += _given_twice(groups, known)
    return parsed


def without_options(parsed: Parsed, options: Collection[str]) -> Parsed:
    """The same without some options, and with Megatron's defaults in their place."""
    words = [
        word
        for name, values in argument_groups(parsed.words)
        if name.partition("=")[0] not in options
        for word in (name, *values)
    ]
    return dataclasses.replace(parsed, args=parsed.parser.parse_args(words), words=words)


def argument_groups(words: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each option with the words up to the next one; first, words that no option stands before."""
    name, values = "", list[str]()
    for word in words:
        if word.startswith("--") and len(word) > 2:
            if name or values:
                yield name, values
            name, values = word, []
        else:
            values.append(word)
    if name or values:
        yield name, values


def _unknown_words(name: str, values: list[str], known: Sequence[str]) -> list[Problem]:
    if not name.startswith("-"):
        return [
            _not_known(shown(value), value)
            if unknowns(value)
            else Problem(
                shown(value),
                "an argument that begins with --",
                "a word that belongs to none",
                "take it away",
            )
            if value
            else _EMPTY
            for value in values
        ]
    option = name.partition("=")[0]
    if unknowns(option):
        return [_not_known(shown(option), option)]
    as_megatron_writes = option.replace("_", "-")
    near = [as_megatron_writes] if as_megatron_writes in known else []
    near = near or difflib.get_close_matches(option, known, n=1, cutoff=0.6)
    return [
        Problem(
            option,
            "an argument that the installed Megatron-Core's parser has",
            "an unknown one",
            f"did you mean {near[0]}?" if near else "take it away",
        )
    ]


def _unreadable(
    parser: argparse.ArgumentParser, action: argparse.Action, name: str, values: list[str]
) -> Problem | None:
    """What is wrong with one option and its values, by Megatron's own parser."""
    option = name.partition("=")[0]
    try:
        _, rest = parser.parse_known_args([name, *values])
    except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
        doubtful = next((value for value in [name, *values] if unknowns(value)), None)
        if doubtful is not None:
            return _not_known(option, doubtful)
        message = error.message if isinstance(error, argparse.ArgumentError) else str(error)
        return Problem(
            option, _form(action), " ".join(values) or "no value", f"Megatron's parser: {message}"
        )
    except Exception as error:  # of a type's own function, such as for --moe-layer-freq
        return Problem(
            option, _form(action), " ".join(values), f"Megatron's parser: {error!r:.200}"
        )
    if not rest:
        return None
    if "" in rest:
        return _EMPTY
    if any(unknowns(value) for value in rest):
        return _not_known(option, next(value for value in rest if unknowns(value)))
    return Problem(
        option,
        _form(action),
        " ".join(values),
        f"take away {' '.join(map(repr, rest))}, or put what is one value in quotes",
    )


def _form(action: argparse.Action) -> str:
    """The values that an option takes, in words."""
    if action.nargs == 0:
        return "no value, it is a flag"
    if action.choices is not None:
        return f"one of {', '.join(map(str, action.choices))}"
    kind = {int: "a whole number", float: "a number"}.get(action.type, "a value")  # type: ignore[call-overload]  # a type may be any function
    return kind if action.nargs is None else f"{kind} or more of them"


def _not_known(argument: str, word: str) -> Problem:
    names = list(dict.fromkeys(unknowns(word)))
    plain = [name for name in names if name.isidentifier()]
    return Problem(
        argument,
        "a value that is known",
        shown(word),
        "give "
        + (
            " ".join(f"--set {name}=VALUE" for name in plain)
            if plain
            else "--set NAME=VALUE for the variable that it goes into"
        ),
    )


def _given_twice(
    groups: Sequence[tuple[str, list[str]]], known: dict[str, argparse.Action]
) -> Iterator[str]:
    seen: dict[str, list[str]] = {}
    for name, values in groups:
        option, _, value = name.partition("=")
        if option not in known:
            continue
        words = [value, *values] if value else values
        before = seen.get(known[option].dest)
        if before is not None and before != words:
            yield (
                f"{option} is given twice, as {shown(' '.join(before))} and "
                f"{shown(' '.join(words))}: the last one counts"
            )
        seen[known[option].dest] = words
