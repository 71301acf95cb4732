"""What the documents name exists: modules, what is in them, files, links and headings."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").glob("*.md")),
    ROOT / "examples" / "README.md",
    ROOT / "benchmarks" / "README.md",
]
FOLDERS = ("step35_patch", "tests", "tools", "docs", "examples", "startup", "benchmarks", ".ci")


def code_of(text: str) -> list[str]:
    """What stands between backquotes in the running text, and each line of the code blocks."""
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [*re.findall(r"`([^`\n]+)`", text), *"\n".join(blocks).splitlines()]


def names(text: str) -> set[str]:
    return {
        name
        for code in code_of(text)
        for name in re.findall(r"(?<![\w./-])step35_patch(?:\.[A-Za-z_]\w*)+", code)
    }


def paths(text: str) -> set[str]:
    """Paths from the repository's root, in code."""
    pattern = rf"(?<![\w./-])(?:\./)?(?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]*[\w/]"
    return {path for code in code_of(text) for path in re.findall(pattern, code)}


def links(text: str) -> set[str]:
    return {link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link}


def headings(text: str) -> set[str]:
    """The anchors that GitHub gives the headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


def is_there(name: str) -> bool:
    """Whether a dotted name is a module, or is something in one."""
    found, *rest = name.split(".")
    thing = importlib.import_module(found)
    for part in rest:
        found += f".{part}"
        if hasattr(thing, part):
            thing = getattr(thing, part)
        elif part in getattr(thing, "__annotations__", {}):
            return True
        else:
            try:
                thing = importlib.import_module(found)
            except ModuleNotFoundError as error:
                # Megatron-Bridge and mbridge are not where these tests run.
                return (error.name or "").startswith(("megatron.bridge", "mbridge")) and is_written(
                    name
                )
    return True


def is_written(name: str) -> bool:
    """`is_there` of what can't be imported here: by files, and the names at their top level."""
    place = ROOT
    for number, part in enumerate(parts := name.split(".")):
        place /= part
        if not place.is_dir():
            file = place.with_suffix(".py")
            file, rest = (
                (file, parts[number + 1 :])
                if file.exists()
                else (place.with_name("__init__.py"), parts[number:])
            )
            return file.exists() and (not rest or rest[0] in _top_level(file))
    return True


def _top_level(file: Path) -> set[str]:
    nodes = ast.parse(file.read_text()).body
    imported = (node for node in nodes if isinstance(node, ast.ImportFrom))
    defined = (node for node in nodes if isinstance(node, ast.ClassDef | ast.FunctionDef))
    names = {alias.name for node in imported for alias in node.names}
    return names | {node.name for node in defined}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_a_document_names_exists(document):
    text = document.read_text()
    wrong = [name for name in sorted(names(text)) if not is_there(name)]
    wrong += [path for path in sorted(paths(text)) if not (ROOT / path).exists()]
    for link in sorted(links(text)):
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in headings(target.read_text())):
            wrong.append(link)
    assert wrong == []


def test_every_room_is_in_the_architecture():
    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("From the ground up:") : text.index("## I want to ...")]
    rooms = {
        path.stem if path.is_file() else path.name
        for path in (ROOT / "step35_patch").iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    named = re.findall(r"^\| (`[^|]+`) \|", table, re.MULTILINE)
    assert {name for cell in named for name in re.findall(r"`(\w+)`", cell)} == rooms


def test_every_wrapped_function_is_in_the_architecture():
    from step35_patch.patch.targets import TARGETS

    text = (ROOT / "docs" / "architecture.md").read_text()
    table = text[text.index("## What is wrapped") : text.index("## Traps")]
    rows = [line for line in table.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w.]+)`", row.split("|")[1])}
    assert named == {target.attribute for target in TARGETS}


def test_every_command_is_in_the_readme():
    from step35_patch import cli

    text = (ROOT / "README.md").read_text()
    sections = headings((ROOT / "docs" / "commands.md").read_text())
    for command in cli._COMMANDS:
        assert f"`step35-patch {command}" in text
        assert command in sections


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("`step35_patch.model.nowhere`", "step35_patch.model.nowhere"),
        ("```python\nfrom step35_patch.model.layer.Nothing import x\n```", "Nothing"),
        ("`step35_patch.bridge.provider.Nothing`", "step35_patch.bridge.provider.Nothing"),
        ("`step35_patch.bridge.Nothing`", "step35_patch.bridge.Nothing"),
        ("see `tests/nowhere.py`", "tests/nowhere.py"),
    ],
)
def test_a_wrong_name_would_be_found(text, wrong):
    found = [name for name in names(text) if not is_there(name)]
    found += [path for path in paths(text) if not (ROOT / path).exists()]
    assert len(found) == 1
    assert wrong in found[0]


def test_what_docstrings_comments_and_messages_name_exists():
    wrong = []
    for path in sorted((ROOT / "step35_patch").rglob("*.py")):
        found = set(re.findall(r"(?<![\w./-])step35_patch(?:\.[A-Za-z_]\w*)+", path.read_text()))
        wrong += [f"{path.name}: {name}" for name in sorted(found) if not is_there(name)]
    assert wrong == []
