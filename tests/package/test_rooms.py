"""The package keeps to its rooms and their order, and `tools/rooms.py` notices when it does not."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "rooms.py"


def _load_script():
    spec = importlib.util.spec_from_file_location("rooms", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rooms = _load_script()


@pytest.fixture
def package(tmp_path):
    """A copy of the package, to be spoilt."""
    copy = tmp_path / "step35_patch"
    shutil.copytree(ROOT / "step35_patch", copy, ignore=shutil.ignore_patterns("__pycache__"))
    return copy


def append(file: Path, text: str) -> None:
    file.write_text(f"{file.read_text()}\n{text}\n")


def new_problems(package: Path) -> list[str]:
    before = problems_of_the_package()
    return [line for line in rooms.problems(rooms.read(package)) if line not in before]


@cache
def problems_of_the_package() -> list[str]:
    return rooms.problems(rooms.read(rooms.PACKAGE))


def test_the_package_keeps_to_its_rooms():
    assert problems_of_the_package() == []


def test_the_committed_picture_is_the_packages():
    drawn = rooms.picture(rooms.read(rooms.PACKAGE))
    assert (ROOT / "docs" / "rooms.svg").read_text() == drawn, (
        "python tools/rooms.py --svg docs/rooms.svg"
    )


def test_a_faithful_copy_has_no_new_problem(package):
    assert new_problems(package) == []


def test_every_room_has_a_floor_and_every_floor_has_rooms_that_exist():
    there = {rooms.room_of(module) for module in rooms.read(rooms.PACKAGE).modules}
    assert set(rooms.FLOOR_OF) == there


@pytest.mark.parametrize("file", ["lounge.py", "lounge/sofa.py"])
def test_a_file_in_no_known_room_is_reported(package, file):
    (package / file).parent.mkdir(exist_ok=True)
    (package / file).write_text("")
    [problem] = new_problems(package)
    assert problem.startswith(f"unknown room: {file};")


def test_a_module_in_the_wrong_room_is_reported(package):
    (package / "patch" / "hooks.py").rename(package / "config" / "hooks.py")
    problems = new_problems(package)
    assert any(
        problem.startswith("wrong direction: config.hooks:") and "model is above config" in problem
        for problem in problems
    )


@pytest.mark.parametrize(
    "statement",
    [
        "import step35_patch.patch.hooks",
        "from step35_patch.patch import hooks",
        "from step35_patch.patch.hooks import parse_args",
        "from ..patch.hooks import parse_args",
        "from .. import patch",
        "def lazily():\n    from step35_patch.patch import hooks",
        "import typing\nif typing.TYPE_CHECKING:\n    from step35_patch.patch import hooks",
        "import importlib\nimportlib.import_module('step35_patch.patch.hooks')",
        "import importlib\nimportlib.import_module(f'step35_patch.patch.{__name__}')",
        "_MODULE_OF = {'parse_args': 'step35_patch.patch.hooks'}",
    ],
)
def test_an_import_upwards_is_reported(package, statement):
    append(package / "tensors" / "qkv.py", statement)
    problems = new_problems(package)
    [wrong] = [line for line in problems if line.startswith("wrong direction")]
    assert wrong.startswith("wrong direction: tensors.qkv:")
    assert wrong.endswith("; patch is above tensors")
    assert "-> patch" in wrong


@pytest.mark.parametrize(
    "statement",
    [
        "from step35_patch import activate",
        "import step35_patch",
        "from importlib import import_module\nimport_module('step35_patch')",
    ],
)
def test_an_import_of_the_packages_own_names_is_reported(package, statement):
    append(package / "commands" / "inspect.py", statement)
    problems = new_problems(package)
    assert any("-> __init__; __init__ is above commands" in problem for problem in problems)


def test_an_import_from_a_neighbour_is_reported(package):
    append(package / "storage" / "errors.py", "from step35_patch.model import rope")
    [problem] = new_problems(package)
    assert problem.endswith("-> model.rope; model and storage are on one floor")


def test_a_circle_within_a_room_is_reported(package):
    append(package / "config" / "layer_plan.py", "from step35_patch.config import model")
    [problem] = new_problems(package)
    assert problem.startswith("circle of modules: ")
    assert "config.layer_plan" in problem
    assert "config.model" in problem


def test_a_circle_of_rooms_is_reported_even_if_no_modules_go_round(package):
    (package / "settings.py").unlink()
    (package / "settings").mkdir()
    (package / "settings" / "one.py").write_text("from step35_patch.tensors import two\n")
    (package / "tensors" / "three.py").write_text("import step35_patch.settings.one\n")
    (package / "tensors" / "two.py").write_text("")
    problems = rooms.problems(rooms.read(package))
    assert any(p.startswith("circle of rooms: ") and "settings, tensors" in p for p in problems)
    assert not any(p.startswith("circle of modules: ") and "settings.one" in p for p in problems)


def test_an_eleventh_file_at_the_top_is_reported(package):
    there = len(list(package.glob("*.py")))
    for number in range(there, rooms.MOST_FILES_AT_THE_TOP):
        (package / f"more{number}.py").write_text("")
    assert not any(line.startswith("too many files") for line in new_problems(package))
    (package / "eleventh.py").write_text("")
    [line] = [line for line in new_problems(package) if line.startswith("too many files")]
    assert "found 11: " in line
    assert "eleventh.py" in line


def test_other_strings_and_other_packages_are_no_arrows(package):
    text = '"""See step35_patch.patch.hooks."""\nNAME = "step35_patch"\nimport step35_patchwork\n'
    (package / "tensors" / "words.py").write_text(text)
    arrows = rooms.read(package).arrows
    assert not [arrow for arrow in arrows if arrow.source == "tensors.words"]


def test_lazy_names_and_hooks_are_arrows():
    arrows = {(arrow.source, arrow.target) for arrow in rooms.read(rooms.PACKAGE).arrows}
    assert ("__init__", "model.provider") in arrows
    assert ("patch.activation", "patch.hooks") in arrows


def test_an_import_for_types_only_is_drawn_hollow(package):
    append(
        package / "tensors" / "qkv.py",
        "import typing\nif typing.TYPE_CHECKING:\n    from step35_patch import _version",
    )
    drawn = rooms.picture(rooms.read(package))
    assert "tensors imports _version (for types only)" in drawn


def test_the_script_prints_a_summary_and_fails_on_a_problem(package):
    good = subprocess.run(
        [sys.executable, SCRIPT, package], capture_output=True, text=True, check=False
    )
    assert (good.returncode, good.stdout.count("\n")) == (0, 1)
    assert good.stdout.endswith(" 0 problem(s)\n")
    append(package / "tensors" / "qkv.py", "import step35_patch.patch.hooks")
    bad = subprocess.run(
        [sys.executable, SCRIPT, package], capture_output=True, text=True, check=False
    )
    assert bad.returncode == 1
    assert "wrong direction: tensors.qkv" in bad.stdout
