"""The course of a launch script: which programs it would start, with which words and variables.

Bash is followed as far as launch scripts need it: assignments, arrays, functions, conditions,
loops, `source`, scripts that start scripts. Nothing is executed, and no file is read but the
scripts themselves. A condition that is not known, such as whether a file is there, counts as not
met, whichever way round it is put; where that leaves out something that counts, it is noted.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from step35_patch.launch import arithmetic, conditions
from step35_patch.launch.control_flow import ControlFlow, Leave, place
from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.expansion import Expander, arguments_of
from step35_patch.launch.scope import MOST_ENTRIES, Scope
from step35_patch.launch.sources import batch_variables, read_source
from step35_patch.launch.syntax import parse, text
from step35_patch.launch.values import shown, unknown, unknowns

if TYPE_CHECKING:
    from tree_sitter import Node

# More than a script that only starts something comes to.
_MOST_COMMANDS = 20_000
_MOST_NESTED = 40
_SHELLS = ("bash", "sh", "dash", "zsh")
# What starts the program that stands among its words.
_WRAPPERS = (
    *("srun", "mpirun", "mpiexec", "env", "nohup", "time", "timeout", "nice", "numactl", "sudo"),
    *("docker", "podman", "singularity", "apptainer", "enroot", "setsid", "stdbuf", "nsys", "ncu"),
    *("ssh", "pdsh"),
)


@dataclass(frozen=True)
class Call:
    """A program that the script would start.

    Attributes:
        words: it and its arguments.
        environment: the variables that the script exports to it, as far as they are known.
        place: file and line.
    """

    words: tuple[str, ...]
    environment: Mapping[str, str]
    place: str


def read_script(
    path: Path, arguments: Sequence[str] = (), given: Mapping[str, str] | None = None
) -> tuple[list[Call], list[str]]:
    """All programs that a script would start, in order, and what was not followed.

    Args:
        path: the script.
        arguments: its own, $1 and so on.
        given: variables that the script does not set itself.

    Raises:
        UnreadableLaunch: no such file, not text, or no bash.
    """
    source = read_source(path)
    scope = Scope(str(path), list(arguments), given or {}, os.getcwd())
    for name, value in batch_variables(source).items():
        scope.variables.setdefault(name, value)
    reader = _Reader()
    reader.run(source, scope)
    return reader.calls, reader.notes


class _Reader(ControlFlow):
    """Follows scripts, each in a scope, and keeps what they would start."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self._functions: dict[str, Node] = {}
        self._commands = 0
        self._depth = 0

    def run(self, source: str, scope: Scope) -> None:
        """Follow a script to its end, in a scope that it changes."""
        root = parse(source, os.path.basename(scope.script))
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise UnreadableLaunch(f"{scope.script}: it starts itself, over and over")
        try:
            self.all(root.named_children, scope)
        except Leave as leave:
            if leave.kind == "exit" and self._depth > 1:
                raise
        finally:
            self._depth -= 1

    # --- Commands -----------------------------------------------------------------------------

    def one(self, node: Node, scope: Scope) -> bool | None:
        self._commands += 1
        if self._commands > _MOST_COMMANDS:
            raise UnreadableLaunch(
                f"{place(node, scope)}: a loop without an end that is known; start the training "
                "program outside of it, or give its arguments behind --"
            )
        follow = self._KINDS.get(node.type)
        if follow is None:
            self.note(node, scope, f"{node.type.replace('_', ' ')} is not followed")
            return None
        return follow(self, node, scope)

    def _assignment(self, node: Node, scope: Scope) -> bool:
        shell = Expander(scope, place(node, scope))
        target, sign = node.children[0], text(node.children[1])
        value = node.children[2] if len(node.children) > 2 else None
        append = sign == "+="
        if target.type == "subscript":
            name, index = text(target.children[0]), target.children[2]
            found = "" if value is None else shell.value(value)
            if isinstance(scope.find(name), dict):
                scope.set_entry(name, shell.value(index), found, append=append)
            elif (number := arithmetic.evaluate(index, shell)) in range(MOST_ENTRIES):
                scope.set_entry(name, str(number), found, append=append)
            else:
                self.note(node, scope, "an index that is not known, or too large")
            return True
        name = text(target)
        if value is not None and value.type == "array":
            self._array(name, shell, value, append=append)
        else:
            scope.set(name, "" if value is None else shell.value(value), append=append)
        return True

    @staticmethod
    def _array(name: str, shell: Expander, node: Node, *, append: bool) -> None:
        words = shell.words([child for child in node.named_children if child.type != "comment"])
        if isinstance(shell.scope.variables.get(name), dict):
            pairs = [re.fullmatch(r"\[(.*?)\]=(.*)", word, re.DOTALL) for word in words]
            shell.scope.set(name, {p[1]: p[2] for p in pairs if p}, append=append)
        else:
            shell.scope.set(name, words, append=append)

    def _assignments(self, node: Node, scope: Scope) -> bool:
        for child in node.named_children:
            self._assignment(child, scope)
        return True

    def _declaration(self, node: Node, scope: Scope) -> bool:
        """export, declare, local, readonly, typeset."""
        shell = Expander(scope, place(node, scope))
        options = [text(child) for child in node.children[1:] if text(child).startswith("-")]
        exports = text(node.children[0]) == "export" or any("x" in option for option in options)
        for child in node.children[1:]:
            if child.type == "variable_assignment":
                if any("A" in option for option in options):
                    scope.variables.setdefault(text(child.children[0]), {})
                self._assignment(child, scope)
                names = [text(child.children[0])]
            elif text(child).startswith("-"):
                continue
            else:
                names = []
                for word in shell.words([child]):
                    name, equals, value = word.partition("=")
                    if equals:
                        scope.set(name, value)
                    elif any("A" in option for option in options):
                        scope.variables.setdefault(name, {})
                    names.append(name)
            if exports:
                scope.exported.update(names)
        return True

    def _unset(self, node: Node, scope: Scope) -> bool:
        for child in node.named_children:
            scope.variables.pop(text(child), None)
        return True

    def _command(self, node: Node, scope: Scope) -> bool | None:
        shell = Expander(scope, place(node, scope))
        before = scope.subshell()  # X=1 program: of that program alone
        for child in node.children:
            if child.type == "variable_assignment":
                self._assignment(child, before)
                before.exported.add(text(child.children[0]))
        words = shell.words(arguments_of(node))
        if not words:
            return True
        name, *rest = words
        if name in self._functions:
            return self._function(name, rest, scope)
        if name == "test":
            tested = parse(text(node).replace("test", "[", 1) + " ]", place(node, scope))
            return conditions.of_test(tested.named_children[0], shell)
        if (builtin := self._BUILTINS.get(name)) is not None:
            return builtin(self, rest, node, scope)
        self._program(words, node, before)
        return True

    def _program(self, words: list[str], node: Node, scope: Scope) -> None:
        """A program, or a shell that starts others."""
        start = os.path.basename(words[0])
        reach = len(words) if start in _WRAPPERS else 1
        where = next((i for i, w in enumerate(words[:reach]) if _is_shell(w)), None)
        environment = scope.environment() | _assigned_by(words[:where])
        if where is not None:
            rest = words[where + 1 :]
            options = [word for word in rest if word.startswith("-")]
            if rest and any(re.fullmatch(r"-\w*c", option) for option in options):
                at = next(i for i, w in enumerate(rest) if re.fullmatch(r"-\w*c", w))
                inner = scope.program(scope.script, rest[at + 2 :], environment)
                self._apart(rest[at + 1] if at + 1 < len(rest) else "", inner)
                return
            files = [i for i, word in enumerate(rest) if not word.startswith(("-", "+"))]
            if files:
                self._start(rest[files[0]], rest[files[0] + 1 :], node, scope, environment)
            return
        for number, word in enumerate(words[:reach]):
            if word.endswith(".sh"):
                self._start(word, words[number + 1 :], node, scope, environment)
                return
            if word.endswith(".py"):
                break
        self.calls.append(Call(tuple(words), environment, place(node, scope)))

    def _apart(self, source: str, scope: Scope) -> None:
        """What another shell runs; its exit ends it alone."""
        try:
            self.run(source, scope)
        except Leave as leave:
            if leave.kind != "exit":
                raise

    def _start(
        self,
        path: str,
        arguments: list[str],
        node: Node,
        scope: Scope,
        environment: Mapping[str, str],
    ) -> None:
        if (source := self._file(path, node, scope)) is not None:
            self._apart(source[0], scope.program(source[1], arguments, environment))

    def _file(self, path: str, node: Node, scope: Scope) -> tuple[str, str] | None:
        """A script that a script names, and its path; None, with a note, if it is not there."""
        full = os.path.join(scope.folder, path)
        if unknowns(full):
            self.note(node, scope, f"{shown(path)} is not known, and so not read")
            return None
        try:
            return read_source(Path(full)), full
        except UnreadableLaunch as error:
            self.note(node, scope, f"not read: {error}")
            return None

    def _function(self, name: str, arguments: list[str], scope: Scope) -> bool | None:
        outer, scope.arguments = scope.arguments, arguments
        self._depth += 1
        if self._depth > _MOST_NESTED:
            raise UnreadableLaunch(f"{scope.script}: the function {name} calls itself")
        try:
            return self.one(self._functions[name], scope)
        except Leave as leave:
            if leave.kind != "return":
                raise
            return True
        finally:
            self._depth -= 1
            scope.arguments = outer

    def _define(self, node: Node, scope: Scope) -> bool:
        self._functions[text(node.named_children[0])] = node.named_children[-1]
        return True

    # --- Builtins: what they do with the words behind their name ---------------------------------

    def _source(self, words: list[str], node: Node, scope: Scope) -> bool | None:
        if not words or (found := self._file(words[0], node, scope)) is None:
            return None
        outer = scope.script, scope.arguments
        scope.script, scope.arguments = found[1], words[1:] or scope.arguments
        try:
            self.run(found[0], scope)
        except Leave as leave:
            if leave.kind != "return":
                raise
        finally:
            scope.script, scope.arguments = outer
        return True

    def _eval(self, words: list[str], node: Node, scope: Scope) -> bool:
        self.run(" ".join(words), scope)
        return True

    def _exec(self, words: list[str], node: Node, scope: Scope) -> bool:
        if not words:
            return True
        self._program(words, node, scope)
        raise Leave("exit")

    def _set(self, words: list[str], node: Node, scope: Scope) -> bool:
        if "--" in words:
            scope.arguments = words[words.index("--") + 1 :]
        return True

    def _shift(self, words: list[str], node: Node, scope: Scope) -> bool:
        count = int(words[0]) if words and words[0].isdigit() else 1
        enough = len(scope.arguments) >= count
        scope.arguments = scope.arguments[count:]
        return enough

    def _cd(self, words: list[str], node: Node, scope: Scope) -> bool:
        if words:
            scope.folder = os.path.normpath(os.path.join(scope.folder, words[-1]))
        return True

    def _read(self, words: list[str], node: Node, scope: Scope) -> bool | None:
        """read, mapfile and readarray: what they read is not known."""
        for name in (word for word in words if re.fullmatch(r"[A-Za-z_]\w*", word)):
            value = unknown(name)
            scope.set(name, value if text(node).startswith("read ") else [value])
        return None

    def _let(self, words: list[str], node: Node, scope: Scope) -> bool | None:
        tree = parse(f"(( {', '.join(words)} ))", place(node, scope))
        value = arithmetic.of_children(tree.named_children[0], Expander(scope, ""))
        return None if value is None else value != 0

    def _leave(self, words: list[str], node: Node, scope: Scope) -> bool:
        raise Leave(text(node).split()[0])

    def _nothing(self, words: list[str], node: Node, scope: Scope) -> bool:
        return True

    def _fails(self, words: list[str], node: Node, scope: Scope) -> bool:
        return False

    def _not_known(self, words: list[str], node: Node, scope: Scope) -> None:
        return None

    def _wrapped(self, words: list[str], node: Node, scope: Scope) -> bool | None:
        """Command and builtin: what stands behind them, or with -v whether it is there."""
        if words[:1] == ["-v"]:
            return None
        if words:
            self._program(words, node, scope)
        return True

    _KINDS: Mapping[str, Callable[[_Reader, Node, Scope], bool | None]] = {
        "variable_assignment": _assignment,
        "variable_assignments": _assignments,
        "declaration_command": _declaration,
        "unset_command": _unset,
        "command": _command,
        "function_definition": _define,
        **ControlFlow.KINDS,
    }
    _BUILTINS: Mapping[str, Callable[[_Reader, list[str], Node, Scope], bool | None]] = {
        "source": _source,
        ".": _source,
        "eval": _eval,
        "exec": _exec,
        "set": _set,
        "shift": _shift,
        "cd": _cd,
        "pushd": _cd,
        "read": _read,
        "mapfile": _read,
        "readarray": _read,
        "let": _let,
        "exit": _leave,
        "return": _leave,
        "break": _leave,
        "continue": _leave,
        "command": _wrapped,
        "builtin": _wrapped,
        "false": _fails,
        "type": _not_known,
        "which": _not_known,
        "hash": _not_known,
        "grep": _not_known,
        "getopts": _not_known,
        **dict.fromkeys(
            (
                "echo",
                "printf",
                "true",
                ":",
                "trap",
                "shopt",
                "ulimit",
                "wait",
                "mkdir",
                "umask",
                "popd",
                "sleep",
                "rm",
                "ls",
                "cat",
                "module",
                "date",
                "hostname",
                "ln",
                "cp",
                "tee",
            ),
            _nothing,
        ),
    }


def _is_shell(word: str) -> bool:
    return os.path.basename(word) in _SHELLS


def _assigned_by(words: Sequence[str]) -> dict[str, str]:
    """Variables that a wrapper sets for what it starts: env A=1, srun --export=ALL,A=1, -e A=1."""
    pairs: list[str] = []
    for number, word in enumerate(words):
        if word.startswith("--export="):
            pairs += word.removeprefix("--export=").split(",")
        elif word.startswith("--env="):
            pairs.append(word.removeprefix("--env="))
        elif number and (words[number - 1] in ("-e", "--env", "env") or "=" in words[number - 1]):
            pairs.append(word)
    found = (re.fullmatch(r"([A-Za-z_]\w*)=(.*)", pair, re.DOTALL) for pair in pairs)
    return {match[1]: match[2] for match in found if match}
