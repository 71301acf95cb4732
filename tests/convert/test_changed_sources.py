"""Sources that somebody writes to while they are read: refused by name, and never wrong weights."""

from __future__ import annotations

import shutil

import pytest
from support.conversion_faults import CHANGES, change_while_it_is_read, weights_of
from support.conversion_runs import assert_refused
from support.conversion_world import tree


@pytest.mark.parametrize("change", CHANGES)
def test_source_that_changes_while_it_is_read(direction, tmp_path, change):
    """The next run, of the source as it was, does not trust what the first one had finished."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(direction.source, source)
    ended = change_while_it_is_read(direction, source, out, CHANGES[change], 50)
    said = ("it was changed while it was read", str(weights_of(source)[0].parent), ": expected the")
    assert_refused(ended, *said)
    assert tree(out) is None
    shutil.rmtree(source)
    shutil.copytree(direction.source, source, copy_function=shutil.copyfile)
    ended = direction.convert(out, source=source)
    assert ended.status == 0 and "made of other inputs or options; removed" in ended.text
    direction.assert_whole(out)
