"""Arithmetic of a script, on whole numbers; None where a part of it is not known."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from step35_patch.launch.scope import Scope
from step35_patch.launch.syntax import text
from step35_patch.launch.values import unknowns

if TYPE_CHECKING:
    from tree_sitter import Node


class Shell(Protocol):
    """What arithmetic needs of the shell that it stands in."""

    scope: Scope

    def value(self, node: Node) -> str:
        """A word's text."""


# Of bash's numbers.
_BITS = 64


def _quotient(left: int, right: int) -> int:
    """Towards zero, as in C."""
    return abs(left) // abs(right) * (1 if (left < 0) == (right < 0) else -1)


def _remainder(left: int, right: int) -> int:
    return left - right * _quotient(left, right)


_BINARY: dict[str, Callable[[int, int], int]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": _quotient,
    "%": _remainder,
    "**": operator.pow,
    "<<": operator.lshift,
    ">>": operator.rshift,
    "&": operator.and_,
    "|": operator.or_,
    "^": operator.xor,
    "<": operator.lt,
    ">": operator.gt,
    "<=": operator.le,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "&&": lambda left, right: bool(left) and bool(right),
    "||": lambda left, right: bool(left) or bool(right),
}
_UNARY: dict[str, Callable[[int], int]] = {
    "-": operator.neg,
    "+": operator.pos,
    "!": operator.not_,
    "~": operator.invert,
}


def of_children(node: Node, shell: Shell) -> int | None:
    """The value of `$((...))` or `((...))`: that of the last of its expressions."""
    result: int | None = None
    for child in node.named_children:
        result = evaluate(child, shell)
    return result


def evaluate(node: Node, shell: Shell) -> int | None:
    """The value of an expression, or None; assignments in it are made."""
    match node.type:
        case "number":
            return _number(text(node))
        case "word" | "variable_name":
            return _variable(text(node), shell)
        case "parenthesized_expression":
            return of_children(node, shell)
        case "unary_expression":
            value = evaluate(node.named_children[-1], shell)
            sign = text(node.children[0])
            if sign in ("++", "--"):
                return _stepped(node.named_children[-1], sign, shell)
            return None if value is None else int(_UNARY[sign](value))
        case "postfix_expression":
            before = evaluate(node.named_children[0], shell)
            _stepped(node.named_children[0], text(node.children[-1]), shell)
            return before
        case "binary_expression":
            return _binary(node, shell)
        case "ternary_expression":
            condition, first, second = node.named_children
            value = evaluate(condition, shell)
            return None if value is None else evaluate(first if value else second, shell)
        case "variable_assignment":
            name, sign = text(node.children[0]), text(node.children[1])
            return _assigned(name, sign, evaluate(node.children[-1], shell), shell)
    return _number(shell.value(node))


def _binary(node: Node, shell: Shell) -> int | None:
    first, sign, second = node.children[0], text(node.children[1]), node.children[-1]
    right = evaluate(second, shell)
    if sign == "=" or (sign.endswith("=") and sign[:-1] in _BINARY and sign not in _BINARY):
        return _assigned(text(first), sign, right, shell)
    left = evaluate(first, shell)
    if left is None or right is None or (sign in "/%" and right == 0):
        return None
    if sign in ("**", "<<", ">>") and not 0 <= right < _BITS:
        return None
    result = int(_BINARY[sign](left, right))
    return result if result.bit_length() < _BITS else None  # bash's would run over


def _assigned(name: str, sign: str, value: int | None, shell: Shell) -> int | None:
    if sign != "=" and value is not None:
        old = _variable(name, shell)
        value = None if old is None else int(_BINARY[sign[:-1]](old, value))
    if value is None:
        shell.scope.variables.pop(name, None)
    else:
        shell.scope.set(name, str(value))
    return value


def _stepped(node: Node, sign: str, shell: Shell) -> int | None:
    return _assigned(text(node), f"{sign[0]}=", 1, shell)


def _variable(name: str, shell: Shell) -> int | None:
    value = shell.scope.find(name)
    return _number(value) if isinstance(value, str) else None


def _number(value: str) -> int | None:
    value = value.strip()
    if unknowns(value):
        return None
    try:
        return int(value, 0) if not value.isdigit() or value == "0" else int(value)
    except ValueError:
        return None


def compared(left: int, sign: str, right: int) -> bool:
    """Two numbers by an operator such as `<=`."""
    return bool(_BINARY[sign](left, right))
