"""The pictures of docs/screens.md: which there are, and that they tell nothing of who made them."""

import importlib.util
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def screens():
    spec = importlib.util.spec_from_file_location("screens", ROOT / "tools" / "screens.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_screen_has_its_pictures_and_no_picture_is_left_over():
    module = screens()
    pictures = {file for name in module.SCREENS for file in module.pictures(name)}
    assert pictures == set(module.FOLDER.iterdir())
    assert (ROOT / "docs" / "screens.md").read_text() == module.page()


def test_no_picture_holds_a_path_of_its_machine():
    for file in screens().FOLDER.iterdir():
        text = file.read_text().replace("&#160;", " ")
        # "~/", "https://" and closing tags are not paths from the root.
        found = re.findall(r"(?<![~\w<:/.-])/(?!>)[\w.-]+/[\w./-]*", text)
        assert found == [], file.name
