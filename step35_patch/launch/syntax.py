"""Bash parsed by tree-sitter: nodes, their text, and where they stand."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from step35_patch.launch.errors import UnreadableLaunch

if TYPE_CHECKING:
    from tree_sitter import Node, Parser


@cache
def _parser() -> Parser:
    try:
        import tree_sitter
        import tree_sitter_bash
    except ImportError as error:
        raise UnreadableLaunch(
            f"reading a launch script needs tree-sitter and tree-sitter-bash ({error}): pip "
            "install 'step35-patch[launch]'; or give the arguments themselves, behind --"
        ) from error
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_bash.language()))


def parse(source: str, name: str) -> Node:
    """The tree of a script.

    Args:
        source: its text.
        name: what an error calls it.

    Raises:
        UnreadableLaunch: it is no bash, or tree-sitter is not installed.
    """
    root = _parser().parse(source.encode()).root_node
    if root.has_error:
        wrong = _first_error(root)
        raise UnreadableLaunch(
            f"{name}, line {line(wrong)}: this is no bash that could be read: "
            f"{text(wrong).strip()[:60]!r}"
        )
    return root


def _first_error(node: Node) -> Node:
    for child in node.children:
        if child.is_error or child.is_missing:
            return child
        if child.has_error:
            return _first_error(child)
    return node


def text(node: Node) -> str:
    """What stands in the script."""
    return (node.text or b"").decode()


def line(node: Node) -> int:
    """Of its first character, from 1."""
    return int(node.start_point[0]) + 1
