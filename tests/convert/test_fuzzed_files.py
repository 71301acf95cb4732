"""Files of weights that were changed: the same bits, or a named error. See support.fuzzing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
from support.file_mutations import OF_MEGATRON, OF_PUBLISHED
from support.fuzzing import IS_LONG, count

TESTS = Path(__file__).parents[1]
SEED = random.randrange(2**32) if IS_LONG else 7


@pytest.mark.parametrize("kind", [*OF_PUBLISHED, *OF_MEGATRON])
def test_a_changed_file_is_refused_or_read_right(world, tmp_path, record_property, kind):
    direction = world.directions["to-megatron" if kind in OF_PUBLISHED else "to-hf"]
    folder = shutil.copytree(direction.source, tmp_path / "source")
    examples = count(1 / len(OF_PUBLISHED | OF_MEGATRON))
    ask = {
        "kind": kind,
        "folder": str(folder),
        "hf": str(world.hf),
        "out": str(tmp_path / "out"),
        "seed": SEED,
        "first": 0,
        "count": examples,
    }
    code = f"""
import json, sys
sys.path.insert(0, {str(TESTS)!r})
from support import file_mutations
file_mutations.main(json.loads({json.dumps(ask)!r}))
"""
    ended = direction.server.run([], code)
    assert "RESULT" in ended.text, ended
    ends, bad = json.loads(ended.text.rpartition("RESULT")[2])
    record_property("examples", examples)
    shown = "\n".join(f"example {number}: {end}" for number, end in bad[:5])
    assert not bad, f"seed {SEED}: {len(bad)} of {examples} went wrong; {ends}\n{shown}"
    assert sum(ends.values()) == examples
