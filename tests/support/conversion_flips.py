"""Conversions of a file with one bit flipped."""

from __future__ import annotations

import json
from pathlib import Path

from support.conversion_world import ONE, Direction

SEED = 20250731


def flip(path: Path, at: int, mask: int = 1) -> None:
    """Flip bits of a byte in place; a negative `at` counts from the end."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


# Runs conversions of a file with one byte changed, in one process: prints for each the status
# and whether the output is as it should be, and what was said of the first of each bad kind.
_FLIPS = """
import contextlib, io, json, resource, shutil, traceback
from pathlib import Path

resource.setrlimit(resource.RLIMIT_AS, (2**33, 2**33))
ask = json.loads({ask!r})
path, out = Path(ask["path"]), Path(ask["out"])
whole, counts, bad = path.read_bytes(), {{}}, []
for at, mask in ask["flips"]:
    path.write_bytes(whole[:at] + bytes([whole[at] ^ mask]) + whole[at + 1:])
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            status = main(ask["argv"])
    except BaseException:
        status = "raised"
        traceback.print_exc(file=said)
    if status == 0:
        names = sorted(p for p in out.rglob("*") if p.is_file())
        found = {{str(p.relative_to(out)): p.read_bytes() for p in names}}
        wanted = {{n: (Path(ask["wanted"]) / n).read_bytes() for n in found}}
        right = found == wanted
        shutil.rmtree(out)
    else:
        right = status == 1 and ask["name"] in said.getvalue() and not out.exists()
    shutil.rmtree(out.parent / f".{{out.name}}.converting", ignore_errors=True)
    counts[str(status)] = counts.get(str(status), 0) + 1
    if not right:
        bad.append((at, mask, status, said.getvalue()[-400:]))
path.write_bytes(whole)
print("RESULT", json.dumps((counts, bad)))
"""


def flip_each(direction: Direction, source: Path, file: Path, flips: list, out: Path) -> dict:
    """Convert with each byte flipped; how often which status. Any bad end is an error."""
    wanted = out.with_name("wanted")
    assert direction.convert(wanted, size=ONE, source=source).status == 0
    argv = [str(word) for word in direction.argv(out, size=ONE, source=source)]
    ask = {
        "path": str(file),
        "out": str(out),
        "wanted": str(wanted),
        "argv": argv,
        "flips": flips,
        "name": str(source),
    }
    ended = direction.server.run([], _FLIPS.format(ask=json.dumps(ask)))
    assert "RESULT" in ended.text, ended
    counts, bad = json.loads(ended.text.split("RESULT")[1])
    shown = "\n".join(f"byte {at}, mask {mask}: {end}: {said}" for at, mask, end, said in bad[:5])
    assert not bad, f"seed {SEED}: {len(bad)} of {len(flips)} went wrong; {counts}\n{shown}"
    return counts
