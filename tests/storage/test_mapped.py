"""Mapped files give back the memory of what was read of them, however little is read at a time."""

import pytest

from step35_patch.storage import mapped
from step35_patch.storage.mapped import MappedFile, MappedFiles


@pytest.mark.parametrize(
    ("reads", "times"), [([4, 4], 0), ([4, 4, 4], 1), ([9], 1), ([9, 4, 4], 1), ([9, 4, 4, 4], 2)]
)
def test_pages_are_released_whenever_so_much_was_read(tmp_path, monkeypatch, reads, times):
    (tmp_path / "weights").write_bytes(bytes(8192))
    released = []
    monkeypatch.setattr(mapped, "_KEPT", 9)
    monkeypatch.setattr(MappedFile, "release", lambda file: released.append(file))
    files = MappedFiles(tmp_path)
    file = files.get("weights")
    for number in reads:
        files.used(number)
    assert released == [file] * times
