"""Conditions of a script: true, false, or None where they depend on what is not known.

A variable that nothing sets counts as empty in a test. Whether a file is there depends on the
machine, and is never known.
"""

from __future__ import annotations

import fnmatch
import re
from typing import TYPE_CHECKING

from step35_patch.launch import arithmetic
from step35_patch.launch.syntax import text
from step35_patch.launch.values import unknowns

if TYPE_CHECKING:
    from tree_sitter import Node

    from step35_patch.launch.expansion import Expander

_NUMBERS = {"-eq": "==", "-ne": "!=", "-lt": "<", "-le": "<=", "-gt": ">", "-ge": ">="}


def of_test(node: Node, shell: Expander) -> bool | None:
    """Of `[ ... ]` or `[[ ... ]]`."""
    inner = [child for child in node.children if text(child) not in ("[", "]", "[[", "]]")]
    return _expression(inner[0], shell) if len(inner) == 1 else False if not inner else None


def _expression(node: Node, shell: Expander) -> bool | None:
    match node.type:
        case "parenthesized_expression":
            return _expression(node.named_children[0], shell)
        case "unary_expression":
            return _unary(node, shell)
        case "binary_expression":
            return _binary(node, shell)
    value = _text(node, shell)
    return None if unknowns(value) else value != ""


def _unary(node: Node, shell: Expander) -> bool | None:
    sign, operand = text(node.children[0]), node.children[-1]
    if sign == "!":
        result = _expression(operand, shell)
        return None if result is None else not result
    if sign == "-v":
        return shell.scope.find(shell.value(operand)) is not None
    if sign not in ("-z", "-n"):
        return None
    value = _text(operand, shell)
    return None if unknowns(value) else (value == "") == (sign == "-z")


def _binary(node: Node, shell: Expander) -> bool | None:
    first, sign, second = node.children[0], text(node.children[1]), node.children[-1]
    if sign in ("&&", "-a", "||", "-o"):
        decisive = sign in ("||", "-o")
        results = [_expression(first, shell), _expression(second, shell)]
        if decisive in results:
            return decisive
        return None if None in results else not decisive
    left, right = _text(first, shell), _text(second, shell)
    if unknowns(left) or unknowns(right):
        return None
    match sign:
        case "=" | "==":
            return _fits(left, right, second)
        case "!=":
            return not _fits(left, right, second)
        case "=~":
            try:
                return re.search(right, left) is not None
            except re.error:
                return None
        case "<":
            return left < right
        case ">":
            return left > right
    if sign in _NUMBERS:
        try:
            return arithmetic.compared(int(left or "0"), _NUMBERS[sign], int(right or "0"))
        except ValueError:
            return None
    return None


def _fits(value: str, pattern: str, node: Node) -> bool:
    """A pattern is one where it is not quoted."""
    if node.type in ("string", "raw_string"):
        return value == pattern
    return fnmatch.fnmatchcase(value, pattern)


def _text(node: Node, shell: Expander) -> str:
    """An operand; a variable that nothing sets is empty."""
    if node.type in ("simple_expansion", "string"):
        names = [node] if node.type == "simple_expansion" else node.named_children
        if len(names) == 1 and names[0].type == "simple_expansion":
            name = text(names[0])[1:]
            whole = node.type == "simple_expansion" or text(node) == f'"${name}"'
            if whole and shell.scope.find(name) is None:
                return ""
    return shell.value(node)
