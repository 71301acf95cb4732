"""Conditions, loops and lists of a script, followed without running a command of it."""

from __future__ import annotations

import fnmatch
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from step35_patch.launch import arithmetic, conditions
from step35_patch.launch.expansion import REDIRECTIONS, Expander, arguments_of
from step35_patch.launch.scope import Scope
from step35_patch.launch.syntax import line, text
from step35_patch.launch.values import unknowns

if TYPE_CHECKING:
    from tree_sitter import Node

# What a part that is left out may hold without a word: it decides nothing of the launch.
_HARMLESS = ("echo", "printf", "mkdir", "exit", "return", "rm", "ls", "sleep", "wait", "true", ":")


class Leave(Exception):
    """Ends what is being followed: `kind` is exit, return, break or continue."""

    def __init__(self, kind: str):
        self.kind = kind


class ControlFlow(ABC):
    """Follows what holds commands; a subclass follows the commands themselves.

    Attributes:
        notes: what was not followed, and where.
    """

    def __init__(self) -> None:
        self.notes: list[str] = []

    @abstractmethod
    def one(self, node: Node, scope: Scope) -> bool | None:
        """Follow a command; whether it succeeds, None if that is not known."""

    def all(self, nodes: Sequence[Node], scope: Scope) -> bool | None:
        """Follow one after the other; how the last one ends."""
        status: bool | None = True
        for node in nodes:
            if node.type != "comment":
                status = self.one(node, scope)
        return status

    def note(self, node: Node, scope: Scope, what: str) -> None:
        """Keep what was not followed."""
        self.notes.append(f"{place(node, scope)}: {what}")

    def left_out(self, node: Node, scope: Scope) -> None:
        """Note a part whose condition is not known, if it decides something of the launch."""
        if _decides(node):
            first = text(node).strip().splitlines()[0]
            self.note(node, scope, f"its condition is not known; taken as not met: {first[:60]}")

    def _list(self, node: Node, scope: Scope) -> bool | None:
        """A && b, a || b."""
        first, sign, second = node.children[0], text(node.children[1]), node.children[-1]
        status = self.one(first, scope)
        if status is None:
            self.left_out(second, scope)
            return None
        return self.one(second, scope) if status == (sign == "&&") else status

    def _negated(self, node: Node, scope: Scope) -> bool | None:
        status = self.one(node.named_children[-1], scope)
        return None if status is None else not status

    def _pipeline(self, node: Node, scope: Scope) -> bool | None:
        commands = [child for child in node.named_children if child.type != "comment"]
        statuses = [self._inside(child, scope.subshell()) for child in commands]
        return statuses[-1]

    def _inside(self, node: Node, scope: Scope) -> bool | None:
        try:
            return self.one(node, scope)
        except Leave as leave:
            if leave.kind != "exit":
                raise
            return True

    def _subshell(self, node: Node, scope: Scope) -> bool | None:
        inner = scope.subshell()
        try:
            return self.all(node.named_children, inner)
        except Leave as leave:
            if leave.kind != "exit":
                raise
            return True

    def _compound(self, node: Node, scope: Scope) -> bool | None:
        if text(node.children[0]) == "((":
            value = arithmetic.of_children(node, Expander(scope, place(node, scope)))
            return None if value is None else value != 0
        return self.all(node.named_children, scope)

    def _redirected(self, node: Node, scope: Scope) -> bool | None:
        inner = [child for child in node.named_children if child.type not in REDIRECTIONS]
        return self.all(inner, scope)

    def _test(self, node: Node, scope: Scope) -> bool | None:
        return conditions.of_test(node, Expander(scope, place(node, scope)))

    def _if(self, node: Node, scope: Scope) -> bool | None:
        """If and elif; a condition that is not known leads to neither branch of its own."""
        parts = [child for child in node.children if child.type != "comment"]
        then = next(i for i, child in enumerate(parts) if child.type == "then")
        condition = self.all([child for child in parts[1:then] if child.is_named], scope)
        clauses = [child for child in parts if child.type in ("elif_clause", "else_clause")]
        body = [c for c in parts[then + 1 :] if c.is_named and c not in clauses]
        if condition:
            return self.all(body, scope)
        if condition is None:
            for child in body:
                self.left_out(child, scope)
        for clause in clauses:
            if clause.type == "else_clause":
                return self.all(clause.named_children, scope)
            met = self._if(clause, scope)
            if met is not False:
                return met
        return condition is None or node.type != "elif_clause"

    def _case(self, node: Node, scope: Scope) -> bool | None:
        shell = Expander(scope, place(node, scope))
        value = shell.value(node.named_children[0])
        for item in (child for child in node.named_children if child.type == "case_item"):
            close = next(i for i, child in enumerate(item.children) if text(child) == ")")
            patterns = [shell.value(c) for c in item.children[:close] if c.is_named]
            if not unknowns(value) and any(fnmatch.fnmatchcase(value, p) for p in patterns):
                return self.all(
                    [child for child in item.children[close + 1 :] if child.is_named], scope
                )
        if unknowns(value):
            self.left_out(node, scope)
            return None
        return True

    def _for(self, node: Node, scope: Scope) -> bool | None:
        shell = Expander(scope, place(node, scope))
        body = node.named_children[-1]
        name, *values = node.named_children[:-1]
        words = shell.words(values) if values else list(scope.arguments)
        for word in words:
            scope.set(text(name), word)
            if not self._round(body, scope):
                break
        return True

    def _c_style_for(self, node: Node, scope: Scope) -> bool | None:
        shell = Expander(scope, place(node, scope))
        semicolons = [i for i, child in enumerate(node.children) if text(child) == ";"]
        close = next(i for i, child in enumerate(node.children) if text(child) == "))")
        start, end, step = (
            [child for child in node.children[first:last] if child.is_named]
            for first, last in (
                (2, semicolons[0]),
                (semicolons[0], semicolons[1]),
                (semicolons[1], close),
            )
        )
        for child in start:
            arithmetic.evaluate(child, shell)
        while (met := [arithmetic.evaluate(child, shell) for child in end] or [1])[-1]:
            if not self._round(node.named_children[-1], scope):
                return True
            for child in step:
                arithmetic.evaluate(child, shell)
        return None if met[-1] is None else True

    def _while(self, node: Node, scope: Scope) -> bool | None:
        until = text(node.children[0]) == "until"
        conditions_, body = node.named_children[:-1], node.named_children[-1]
        while (met := self.all(conditions_, scope)) is (not until):
            if not self._round(body, scope):
                return True
        if met is None:
            self.left_out(body, scope)
        return True

    def _round(self, body: Node, scope: Scope) -> bool:
        """One round of a loop; whether there is another."""
        try:
            self.all(body.named_children, scope)
        except Leave as leave:
            if leave.kind not in ("break", "continue"):
                raise
            return leave.kind == "continue"
        return True

    KINDS: ClassVar[Mapping[str, Callable[..., bool | None]]] = {
        "list": _list,
        "negated_command": _negated,
        "pipeline": _pipeline,
        "subshell": _subshell,
        "compound_statement": _compound,
        "redirected_statement": _redirected,
        "test_command": _test,
        "if_statement": _if,
        "case_statement": _case,
        "for_statement": _for,
        "c_style_for_statement": _c_style_for,
        "while_statement": _while,
    }


def place(node: Node, scope: Scope) -> str:
    """File and line, for a message."""
    return f"{os.path.basename(scope.script)}, line {line(node)}"


def _decides(node: Node) -> bool:
    """Whether a part assigns something or starts a program that is not harmless."""
    if node.type in ("variable_assignment", "declaration_command", "function_definition"):
        return True
    if node.type == "command":
        words = arguments_of(node)
        return bool(words) and text(words[0]) not in _HARMLESS
    return any(_decides(child) for child in node.named_children)
