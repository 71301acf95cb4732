"""mutmut's mutants of one file, for tools/mutants.py: what each changes, and where it stands.

Left out: messages (a text with a space in it, or an argument that is one), because their words are
not what is tested; and annotations. Needs the extra `audit` of setup.cfg.
"""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import libcst as cst
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Mutant:
    file: str
    function: str
    line: int
    statement: range
    node: cst.CSTNode
    instead: cst.CSTNode
    tree: cst.Module

    @cached_property
    def source(self) -> str:
        return self.tree.deep_replace(self.node, self.instead).code  # type: ignore[union-attr]

    def diff(self) -> list[str]:
        old, new = (text.splitlines() for text in (self.tree.code, self.source))
        return list(difflib.unified_diff(old, new, self.file, self.file, lineterm="", n=0))

    @cached_property
    def change(self) -> str:
        """The lines before and after, with single spaces."""
        gone, come = ([line[1:] for line in self.diff()[2:] if line[0] == sign] for sign in "-+")
        return " => ".join(" ".join(" ".join(lines).split()) for lines in (gone, come))

    @property
    def name(self) -> str:
        """The same as long as the line's text is, wherever it moves."""
        digest = hashlib.sha256(f"{self.function} {self.change}".encode()).hexdigest()
        return f"{Path(self.file).stem}-{digest[:8]}"


class _Visitor(MutationVisitor):
    """mutmut's, of functions with decorators too."""

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        return not isinstance(node, cst.FunctionDef) and super()._skip_node_and_children(node)


def mutants_of(file: str) -> Iterator[Mutant]:
    """All of one file, messages left out."""
    code = (ROOT / file).read_text()
    wrapper = MetadataWrapper(cst.parse_module(code))
    visitor = _Visitor(mutation_operators, IgnoredCode(set(), set(), set()))
    wrapper.visit(visitor)
    positions = wrapper.resolve(PositionProvider)
    places = list(_places(ast.parse(code)))
    for mutation in visitor.mutations:
        node = mutation.original_node
        if node not in positions or _is_message(node, mutation.mutated_node):
            continue
        line = positions[node].start.line
        inside = [place for place in places if place[0] <= line <= place[1]]
        if not inside:  # the module's docstring and what else is no statement
            continue
        first, last, function = max(inside)
        yield Mutant(
            *(file, function, line, range(first, last + 1)),
            *(node, mutation.mutated_node, wrapper.module),
        )


def _places(tree: ast.Module) -> Iterator[tuple[int, int, str]]:
    """First and last line of each statement, without the statements in it, and its function."""

    def visit(node: ast.AST, scope: str) -> Iterator[tuple[int, int, str]]:
        for child in ast.iter_child_nodes(node):
            inner = scope
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inner = f"{scope}.{child.name}".strip(".")
            if isinstance(child, ast.stmt):
                body = getattr(child, "body", None)
                last = body[0].lineno - 1 if body else child.end_lineno
                yield child.lineno, max(child.lineno, last or 0), scope
            yield from visit(child, inner)

    return visit(tree, "")


def _is_message(node: cst.CSTNode, instead: cst.CSTNode) -> bool:
    """Whether only words for a reader change; of a name's spellings, one is enough."""
    if isinstance(node, cst.SimpleString) and isinstance(instead, cst.SimpleString):
        return " " in node.value or "XX" not in instead.value
    if isinstance(node, cst.Call) and isinstance(instead, cst.Call):
        kept = {id(argument) for argument in instead.args}
        gone = [argument.value for argument in node.args if id(argument) not in kept]
        return bool(gone) and all(_is_text(value) for value in gone)
    if isinstance(node, cst.Assign | cst.AnnAssign):
        return node.value is not None and _is_text(node.value)
    return False


def _is_text(value: cst.BaseExpression) -> bool:
    if isinstance(value, cst.SimpleString):
        return " " in value.value
    return isinstance(value, cst.FormattedString | cst.ConcatenatedString)
