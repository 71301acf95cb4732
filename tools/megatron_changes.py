"""What changed between two Megatron-Cores of what this package stands on.

    python tools/megatron_changes.py OLD NEW

OLD and NEW are folders with a `megatron` in them: site-packages, a folder that pip installed into
with --target, or a checkout. Compared are

- the signatures of the functions that are wrapped (`step35_patch.patch.targets`) and of the
  functions and classes that the package imports, of a class those of the methods that one of the
  package's own classes has too;
- the fields of TransformerConfig, with their types and defaults: a new one may be an option that a
  Step-3.5 model cannot be built with.

Everything is read with `ast`; nothing is imported from either. Exit status 0, whatever is found.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
from collections.abc import Iterable, Iterator
from pathlib import Path

Signatures = dict[str, tuple[str, ...]]  # what can be called: its parameters

PACKAGE = Path(__file__).resolve().parent.parent / "step35_patch"
# Whose fields are compared, with the module of each.
CONFIGS = {
    "TransformerConfig": "megatron.core.transformer.transformer_config",
    "ModelParallelConfig": "megatron.core.model_parallel_config",
}


def wrapped() -> list[tuple[str, str]]:
    """(module, attribute) of each target."""
    path = PACKAGE / "patch" / "targets.py"
    spec = importlib.util.spec_from_file_location("targets", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [(target.module, target.attribute) for target in module.TARGETS]


def imported(package: Path) -> tuple[list[tuple[str, str]], set[str]]:
    """(module, name) of what the package imports from megatron, and its own methods' names."""
    found, methods = set(), set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("megatron."):
                found |= {(node.module, alias.name) for alias in node.names}
            elif isinstance(node, ast.ClassDef):
                methods |= {n.name for n in node.body if isinstance(n, ast.FunctionDef)}
    return sorted(found), methods


def signatures(root: Path, module: str, attribute: str, methods: Iterable[str]) -> Signatures:
    """What can be called under a name, with its parameters; empty if there is no such name.

    A name that a module imports is looked up where it comes from. What is no function and no class
    counts as it is, without parameters.
    """
    first, _, rest = attribute.partition(".")
    for node in _body(root, module):
        if isinstance(node, ast.FunctionDef) and node.name == first:
            return {attribute: _parameters(node)}
        if isinstance(node, ast.ClassDef) and node.name == first:
            wanted = {rest} if rest else {"__init__", *methods}
            return {first: ()} | {
                f"{first}.{inner.name}": _parameters(inner)
                for inner in node.body
                if isinstance(inner, ast.FunctionDef) and inner.name in wanted
            }
        if isinstance(node, ast.ImportFrom) and not node.level and node.module != module:
            for alias in node.names:
                if (alias.asname or alias.name) == first:
                    name = f"{alias.name}.{rest}" if rest else alias.name
                    return signatures(root, node.module or "", name, methods)
        if isinstance(node, ast.Assign) and first in map(ast.unparse, node.targets):
            return {attribute: ()}
    return {attribute: ()} if _body(root, f"{module}.{attribute}") else {}


def _parameters(function: ast.FunctionDef) -> tuple[str, ...]:
    """Each parameter with its default, without its type."""
    arguments = function.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [*zip(positional, defaults, strict=True)]
    pairs += zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    named = [
        arg.arg if value is None else f"{arg.arg}={ast.unparse(value)}" for arg, value in pairs
    ]
    stars = [("*", arguments.vararg), ("**", arguments.kwarg)]
    return (*named, *(f"{star}{arg.arg}" for star, arg in stars if arg is not None))


def _body(root: Path, module: str) -> list[ast.stmt]:
    """A module's statements, those inside `if` and `try` too; none if there is no such module."""
    place = root.joinpath(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.exists():
            return list(_statements(ast.parse(path.read_bytes()).body))
    return []


def _statements(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            yield from _statements(node.body)


def fields(root: Path) -> Signatures:
    """The fields of a TransformerConfig, each with its type and default."""
    return {
        ast.unparse(field.target): (ast.unparse(field).partition(": ")[2],)
        for name, module in CONFIGS.items()
        for node in _body(root, module)
        if isinstance(node, ast.ClassDef) and node.name == name
        for field in node.body
        if isinstance(field, ast.AnnAssign)
    }


def changes(old: Signatures, new: Signatures) -> Iterator[str]:
    """A line for each name that is gone, new or different."""
    for name in sorted({*old, *new}):
        if name not in new:
            yield f"gone     {name}"
        elif name not in old:
            yield f"new      {name}: {', '.join(new[name])}"
        elif old[name] != new[name]:
            gone = [f"-{part}" for part in old[name] if part not in new[name]]
            added = [f"+{part}" for part in new[name] if part not in old[name]]
            yield f"changed  {name}: {', '.join(gone + added) or 'another order'}"


def main() -> None:
    parser = argparse.ArgumentParser(description="What changed between two Megatron-Cores.")
    parser.add_argument("old", type=Path, help="a folder with a megatron in it")
    parser.add_argument("new", type=Path, help="another one")
    options = parser.parse_args()
    names, methods = imported(PACKAGE)
    for title, wanted in (("wrapped", wrapped()), ("imported", names)):
        print(f"== {title}")
        for module, attribute in wanted:
            old = signatures(options.old, module, attribute, methods)
            new = signatures(options.new, module, attribute, methods)
            for line in changes(old, new):
                print(line)
    print("== fields of TransformerConfig")
    for line in changes(fields(options.old), fields(options.new)):
        print(line)


if __name__ == "__main__":
    main()
