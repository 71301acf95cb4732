"""The words of a script: variables, arrays, arithmetic and quotes, as bash expands them.

What the script cannot know stays in the words under its name (`step35_patch.launch.values`). Of
commands in `$(...)` only those are known that compute with paths and text; none is run.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from step35_patch.launch import arithmetic
from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.scope import MOST_ENTRIES, Scope, Value
from step35_patch.launch.syntax import line, text
from step35_patch.launch.values import split, unknown, unknowns

if TYPE_CHECKING:
    from tree_sitter import Node

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
REDIRECTIONS = ("file_redirect", "heredoc_redirect", "herestring_redirect")


class _Words(list[str]):
    """Words that have been split already."""


class _Fields:
    """The words that come of a node, while they are put together."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self._current: str | None = None

    def quoted(self, piece: str) -> None:
        self._current = (self._current or "") + piece

    def unquoted(self, piece: str) -> None:
        first, *others = split(piece)
        if first:
            self.quoted(first)
        for part in others:
            self.end()
            if part:
                self.quoted(part)

    def entries(self, pieces: list[str], *, quoted: bool) -> None:
        """Of an array: a word each, the first and the last with what stands beside them."""
        for number, piece in enumerate(pieces):
            if number:
                self.end()
            (self.quoted if quoted else self.unquoted)(piece)

    def end(self) -> None:
        if self._current is not None:
            self.done.append(self._current)
        self._current = None


class Expander:
    """Expands words in a scope, which `${X:=...}` and arithmetic change."""

    def __init__(self, scope: Scope, where: str):
        self.scope = scope
        self._where = where

    # --- Words ------------------------------------------------------------------------------

    def words(self, nodes: list[Node]) -> list[str]:
        """All words of nodes that stand side by side, such as a command's."""
        found: list[str] = []
        for group in _side_by_side(nodes):
            for alternative in _alternatives(group):
                fields = _Fields()
                self._add_all(alternative, fields)
                fields.end()
                found += fields.done
        return found

    def value(self, node: Node) -> str:
        """One text, not split into words: the right side of an assignment, a quoted word."""
        fields = _Fields()
        self._add(node, fields, quoted=True)
        fields.end()
        return " ".join(fields.done)

    def _add_all(self, nodes: Sequence[Node | str], fields: _Fields) -> None:
        after_dollar = False
        for node in nodes:
            if isinstance(node, str):
                fields.quoted(node)
                continue
            if after_dollar and node.type == "word" and (name := _NAME.match(text(node))):
                # tree-sitter-bash cuts $B.py behind another part of a word into "$" and "B.py".
                self._add_expansion(self._plain(name.group()), fields, quoted=False)
                fields.quoted(_unescaped(text(node)[name.end() :]))
                after_dollar = False
                continue
            if after_dollar:
                fields.quoted("$")
            if after_dollar := node.type == "$":
                continue
            self._add(node, fields, quoted=False)
        if after_dollar:
            fields.quoted("$")

    def _add(self, node: Node, fields: _Fields, *, quoted: bool) -> None:
        match node.type:
            case "word" | "number" | "regex" | "extglob_pattern" | "variable_name":
                if node.named_children and node.type == "number":  # such as 16#ff
                    fields.quoted(unknown(text(node)))
                elif not quoted and re.search(r"(?<!\\)\s", text(node)):  # within ${X:-a b}
                    fields.unquoted(text(node))
                else:
                    fields.quoted(self._home(_unescaped(text(node))))
            case "raw_string":
                fields.quoted(text(node)[1:-1])
            case "ansi_c_string":
                fields.quoted(_ansi(text(node)[2:-1]))
            case "string" | "translated_string":
                self._add_string(node, fields)
            case "concatenation":
                at = node.start_byte
                for group in _side_by_side(node.children):
                    if group[0].start_byte > at:  # within ${X:-a "b"}
                        fields.quoted(" ") if quoted else fields.end()
                    if quoted:
                        for child in group:
                            self._add(child, fields, quoted=True)
                    else:
                        self._add_all(group, fields)
                    at = group[-1].end_byte
            case "simple_expansion":
                self._add_expansion(self._plain(text(node)[1:]), fields, quoted=quoted)
            case "expansion":
                self._add_expansion(self._braced(node), fields, quoted=quoted)
            case "arithmetic_expansion":
                fields.quoted(self.arithmetic(node))
            case "command_substitution":
                found = self._substituted(node)
                (fields.quoted if quoted else fields.unquoted)(found)
            case "process_substitution":
                fields.quoted(unknown(text(node)))
            case _:
                fields.quoted(_unescaped(text(node)))

    def _add_string(self, node: Node, fields: _Fields) -> None:
        """Of "...": what stands between its parts is text, line ends among it."""
        source, base = node.text or b"", node.start_byte
        at = 2 if source.startswith(b"$") else 1
        if not node.named_children:
            fields.quoted("")  # which is a word; all entries of an empty array are none
        for child in node.named_children:
            begin, end = child.start_byte - base, child.end_byte - base
            if between := _in_quotes(source[at:begin].decode()):
                fields.quoted(between)
            if child.type == "string_content":
                fields.quoted(_in_quotes(text(child)))
            else:
                self._add(child, fields, quoted=True)
            at = end
        if rest := _in_quotes(source[at:-1].decode()):
            fields.quoted(rest)

    def _add_expansion(self, value: str | list[str], fields: _Fields, *, quoted: bool) -> None:
        if isinstance(value, _Words):
            fields.entries([" ".join(value)] if quoted else value, quoted=True)
        elif isinstance(value, list):
            fields.entries(value, quoted=quoted)
        elif quoted:
            fields.quoted(value)
        else:
            fields.unquoted(value)

    def _home(self, word: str) -> str:
        if word == "~" or word.startswith("~/"):
            return self._text_of(self.scope.find("HOME"), "HOME") + word[1:]
        return word

    # --- $X and ${X} ------------------------------------------------------------------------

    def _plain(self, name: str) -> str | list[str]:
        value = self.scope.find(name)
        if name == "*":
            return " ".join(self.scope.arguments)
        if name == "@":
            return list(self.scope.arguments)
        return self._text_of(value, name)

    @staticmethod
    def _text_of(value: Value | None, name: str) -> str:
        """A variable without an index: an array's first entry."""
        if value is None:
            return unknown(name)
        if isinstance(value, dict):
            return value.get("0", "")
        if isinstance(value, list):
            return value[0] if value else ""
        return value

    def _braced(self, node: Node) -> str | list[str]:
        parts = node.children[1:-1]
        prefix = text(parts[0]) if parts[0].type in ("#", "!") and len(parts) > 1 else ""
        subject, *rest = parts[1:] if prefix else parts
        value, name = self._subject(subject)
        if prefix == "#":
            if value is None:
                return unknown(f"#{name}")
            return str(len(value))
        if prefix == "!":
            return self._indirect(value, name)
        if not rest:
            if value is None:
                return unknown(name)
            return value
        return self._operated(value, name, text(rest[0]), rest[1:], node)

    def _subject(self, node: Node) -> tuple[str | list[str] | None, str]:
        """What `${...}` is about, with a list for all entries of an array, and its name."""
        if node.type != "subscript":
            name = text(node)
            if name in ("@", "*"):
                return self._plain(name), name
            value = self.scope.find(name)
            return None if value is None else self._text_of(value, name), name
        name, index = text(node.children[0]), node.children[2]
        array = self.scope.find(name)
        if array is None:
            return ([] if text(index) in ("@", "*") else None), name
        if text(index) in ("@", "*"):
            entries = [array] if isinstance(array, str) else list(array)
            if isinstance(array, dict):
                entries = list(array.values())
            return (" ".join(entries) if text(index) == "*" else entries), name
        if isinstance(array, dict):
            return array.get(self.value(index)), name
        entries = [array] if isinstance(array, str) else array
        number = arithmetic.evaluate(index, self)
        if number is None:
            return unknown(f"{name}[{text(index)}]"), name
        return (entries[number] if -len(entries) <= number < len(entries) else None), name

    def _indirect(self, value: str | list[str] | None, name: str) -> str | list[str]:
        if not isinstance(value, str) or unknowns(value):
            return unknown(f"!{name}")
        return self._text_of(self.scope.find(value), value)

    def _operated(
        self,
        value: str | list[str] | None,
        name: str,
        operator: str,
        operands: list[Node],
        node: Node,
    ) -> str | list[str]:
        """`${X operator operands}`. What nobody sets counts as unset where the script asks."""
        empty = value is None or (operator.startswith(":") and value in ("", []))
        bare = operator.removeprefix(":")
        if bare in ("-", "=", "+", "?"):
            word = "".join(self.value(operand) for operand in operands)
            if bare == "+":
                return "" if empty else self._splittable(operands)
            if value is not None and not empty:
                return value
            if bare == "?":
                return unknown(name)
            if bare == "=":
                self.scope.set(name, word)
                return word
            return self._splittable(operands)
        if value is None:
            return unknown(name)
        if operator == ":":
            return self._cut(value, operands, node)
        pattern = self.value(operands[0]) if operands else ""
        others = [self.value(part) for part in operands[1:] if text(part) not in ("/", "//")]
        change = _changes(operator, pattern, others[0] if others else "")
        if change is None:
            raise UnreadableLaunch(
                f"{self._where}, line {line(node)}: {text(node)} is not read; give its value by "
                "--set of the variable that it goes into, or write it otherwise"
            )
        if isinstance(value, list):
            return [change(entry) for entry in value]
        return unknown(text(node)[1:]) if unknowns(value) else change(value)

    def _splittable(self, operands: list[Node]) -> _Words:
        """The word of ${X:-word}, whose quoted parts stay whole."""
        return _Words(self.words(operands))

    def _cut(self, value: str | list[str], operands: list[Node], node: Node) -> str | list[str]:
        numbers = [arithmetic.evaluate(part, self) for part in operands if text(part) != ":"]
        if not numbers or None in numbers or (isinstance(value, str) and unknowns(value)):
            return unknown(text(node)[1:])
        start, *length = (number for number in numbers if number is not None)
        if isinstance(value, list) and text(node.children[1]) in ("@", "*"):
            value, start = [self.scope.script, *value], start  # $0 is number 0
            if start == 0:
                return value[: length[0]] if length else value
        stop = None if not length else length[0] if length[0] < 0 else start + length[0]
        return value[start:stop]

    # --- Arithmetic and commands ------------------------------------------------------------

    def arithmetic(self, node: Node) -> str:
        """The value of `$((...))`."""
        result = arithmetic.of_children(node, self)
        return unknown(text(node)[1:]) if result is None else str(result)

    def _substituted(self, node: Node) -> str:
        found = self._computed([child for child in node.named_children if child.type != "comment"])
        return unknown(text(node).removeprefix("$")) if found is None else found

    def _computed(self, commands: list[Node]) -> str | None:
        """What commands that only compute with text print; None of all others."""
        if len(commands) != 1:
            return None
        [command] = commands
        if command.type == "redirected_statement":  # such as 2>/dev/null
            command = command.named_children[0]
        if command.type == "list" and text(command.children[1]) == "&&":
            first, second = command.named_children
            if _is_call(first, "cd") and _is_call(second, "pwd"):
                [_, *target] = self.words(arguments_of(first))
                return self._path(target[-1]) if target else None
            return None
        if command.type != "command":
            return None
        words = self.words(arguments_of(command))
        match words:
            case ["pwd", *_]:
                return self.scope.folder
            case ["echo", *rest]:
                return " ".join(rest)
            case ["printf", "%s" | "%s\n", one]:
                return one
            case ["dirname", one]:
                return None if unknowns(os.path.basename(one)) else _dirname(one)
            case ["basename", one, *suffix]:
                base = os.path.basename(one.rstrip("/"))
                if unknowns(base):
                    return None
                return base.removesuffix(suffix[0]) if suffix else base
            case ["realpath", *_, one] | ["readlink", "-f" | "-m" | "-e", one]:
                return self._path(one)
            case ["seq", *bounds] if all(bound.isdigit() for bound in bounds) and bounds:
                numbers = [int(bound) for bound in bounds]
                begin = 1 if len(numbers) == 1 else numbers[0]
                step = numbers[1] if len(numbers) == 3 else 1
                counted = range(begin, numbers[-1] + 1, step or 1)
                return "\n".join(map(str, counted)) if len(counted) < MOST_ENTRIES else None
        return None

    def _path(self, path: str) -> str:
        return os.path.normpath(os.path.join(self.scope.folder, path))


def _side_by_side(nodes: list[Node]) -> Iterator[list[Node]]:
    """Nodes that touch each other are one word."""
    group: list[Node] = []
    for node in nodes:
        for part in node.children if node.type == "concatenation" else [node]:
            if group and part.start_byte != group[-1].end_byte:
                yield group
                group = []
            group.append(part)
    if group:
        yield group


def _alternatives(nodes: Sequence[Node | str]) -> Iterator[Sequence[Node | str]]:
    """The words that {1..3} and {a,b} make of one; tree-sitter-bash has {a,b} as three words."""
    for at, node in enumerate(nodes):
        if isinstance(node, str):
            continue
        inside, end = None, at + 1
        if node.type == "brace_expression":
            inside = _range(node)
        elif node.type == "word" and text(node) == "{" and len(nodes) > at + 2:
            middle, last = nodes[at + 1], nodes[at + 2]
            words = [n if isinstance(n, str) else text(n) for n in (middle, last)]
            if "," in words[0] and words[1] == "}":
                inside, end = words[0].split(","), at + 3
        if inside is not None:
            for choice in inside:
                yield from _alternatives([*nodes[:at], choice, *nodes[end:]])
            return
    yield nodes


def arguments_of(command: Node) -> list[Node]:
    """A command's name and words, without assignments before them and redirections."""
    return [
        child.children[0] if child.type == "command_name" else child
        for child in command.children
        if child.type not in ("variable_assignment", *REDIRECTIONS) and child.type not in "<>|&"
    ]


def _is_call(node: Node, name: str) -> bool:
    return node.type == "command" and bool(words := arguments_of(node)) and text(words[0]) == name


def _dirname(path: str) -> str:
    return os.path.dirname(path.rstrip("/")) or ("/" if path.startswith("/") else ".")


def _unescaped(word: str) -> str:
    return re.sub(r"\\(\n)?(.?)", r"\2", word, flags=re.DOTALL) if "\\" in word else word


def _in_quotes(content: str) -> str:
    """Within double quotes a backslash is one, but before these."""
    return re.sub(r'\\([$`"\\])', r"\1", content.replace("\\\n", ""))


def _ansi(content: str) -> str:
    names = {"n": "\n", "t": "\t", "r": "\r"}
    return re.sub(r"\\(.)", lambda match: names.get(match[1], match[1]), content)


def _range(node: Node) -> list[str]:
    """Of {1..3}."""
    first, last = (text(child) for child in node.named_children[:2])
    if not (first.lstrip("-").isdigit() and last.lstrip("-").isdigit()):
        return [unknown(text(node))]
    begin, end = int(first), int(last)
    if abs(end - begin) > MOST_ENTRIES:
        return [unknown(text(node))]
    step = 1 if end >= begin else -1
    return [str(number) for number in range(begin, end + step, step)]


def _changes(operator: str, pattern: str, replacement: str) -> Callable[[str], str] | None:
    """What `${X operator pattern}` does to a text; None for operators that are not known."""
    match operator:
        case "#" | "##" | "%" | "%%":
            return lambda value: _trimmed(value, operator, pattern)
        case "/" | "//":
            regex = re.compile(fnmatch.translate(pattern).removesuffix("\\z").removesuffix("\\Z"))
            return lambda value: regex.sub(
                lambda _: replacement, value, count=0 if operator == "//" else 1
            )
        case "^^":
            return str.upper
        case ",,":
            return str.lower
        case "^":
            return lambda value: value[:1].upper() + value[1:]
        case ",":
            return lambda value: value[:1].lower() + value[1:]
    return None


def _trimmed(value: str, operator: str, pattern: str) -> str:
    """Without the shortest or longest beginning (#, ##) or end (%, %%) that fits a pattern."""
    lengths = range(len(value) + 1)
    for length in lengths if len(operator) == 1 else reversed(lengths):
        if operator[0] == "#" and fnmatch.fnmatchcase(value[:length], pattern):
            return value[length:]
        if operator[0] == "%" and fnmatch.fnmatchcase(value[len(value) - length :], pattern):
            return value[: len(value) - length]
    return value
