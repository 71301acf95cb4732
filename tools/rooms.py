"""The package's rooms, their order, and whether every import in the package keeps to it.

    python tools/rooms.py                       a summary; exit status 1 if a rule is broken
    python tools/rooms.py --svg docs/rooms.svg  also draws the picture

A room is a folder of the package, or a file at its top. `FLOORS` puts them in order: a module may
import from its own room and from the floors below, never upwards or from a neighbour on its floor.

What counts as an arrow from one module to another, wherever in the file it stands:

- `import` and `from ... import`, inside functions too;
- the same under `if TYPE_CHECKING:`. Such an arrow is drawn hollow, and obeys the same rules: it
  loads nothing, but who reads the one file still has to know the other;
- a string that is exactly a module's dotted name, such as the tables of lazy names have, or what
  `importlib.import_module` is given; of an f-string in its call, the part before the first brace.
  The bare name of the package counts in `import_module` only: elsewhere it is the program's name.

That importing a module also runs the `__init__` of its packages is no arrow.

Standard library only. Nothing of the package is imported: it is read with `ast`.
"""

from __future__ import annotations

import argparse
import ast
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

PACKAGE = Path(__file__).resolve().parent.parent / "step35_patch"

# From the ground up. Rooms of one floor do not import each other.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("_version", "terminal", "cpu", "config"),
    ("settings",),
    ("tensors",),
    ("storage", "model"),
    ("costs", "checkpoint", "arguments"),
    ("verify", "patch"),
    ("convert", "launch"),
    ("bridge", "frameworks"),
    ("commands",),
    ("cli",),
    ("__main__", "__init__"),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# More would be a heap again; what belongs together gets a room.
MOST_FILES_AT_THE_TOP = 10


class Arrow(NamedTuple):
    """One module needs another. Modules are named without the package: "patch.hooks"."""

    source: str
    target: str
    line: int
    for_types_only: bool

    def __str__(self) -> str:
        return f"{self.source}:{self.line} -> {self.target}"


class House(NamedTuple):
    """What was read: the modules with their files' places in the package, and the arrows."""

    modules: Mapping[str, str]
    arrows: tuple[Arrow, ...]


def room_of(module: str) -> str:
    """The room that a module stands in."""
    return module.split(".")[0]


# --- Reading ------------------------------------------------------------------------------------


def read(package: Path) -> House:
    """All modules of a package and the arrows between them.

    Args:
        package: The package's folder; its name is the package's.
    """
    paths = {_module_of(path.relative_to(package)): path for path in package.rglob("*.py")}
    paths = dict(sorted(paths.items()))
    arrows = {
        arrow
        for module, path in paths.items()
        for arrow in _arrows(package.name, module, path, paths)
    }
    modules = {module: path.relative_to(package).as_posix() for module, path in paths.items()}
    return House(modules, tuple(sorted(arrows)))


def _module_of(path: Path) -> str:
    parts = path.with_suffix("").parts
    if parts[-1] == "__init__" and len(parts) > 1:
        parts = parts[:-1]
    return ".".join(parts)


def _arrows(package: str, source: str, path: Path, modules: Iterable[str]) -> Iterator[Arrow]:
    tree = ast.parse(path.read_bytes(), str(path))
    type_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and _is_type_checking(node.test)
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        for name in _names(package, source, path, node):
            target = _target(package, name, modules)
            if target not in (None, source):
                line: int = getattr(node, "lineno", 0)
                yield Arrow(source, target, line, id(node) in type_only)


def _is_type_checking(test: ast.expr) -> bool:
    return _last_name(test) == "TYPE_CHECKING"


def _last_name(expression: ast.expr) -> str | None:
    """`name` of "name" and of "anything.name"."""
    if isinstance(expression, ast.Attribute):
        return expression.attr
    return expression.id if isinstance(expression, ast.Name) else None


def _names(package: str, source: str, path: Path, node: ast.AST) -> Iterator[str]:
    """The full dotted names, of modules or of what is in them, that a node asks for."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        origin = node.module or ""
        if node.level:
            # As Python does: from the package that the file is in, one dot; a dot more, one up.
            of_file = [package, *source.split(".")]
            if path.stem != "__init__" or source == "__init__":
                of_file.pop()
            above = of_file[: len(of_file) - node.level + 1]
            origin = ".".join([*above, *([node.module] if node.module else [])])
        yield from (f"{origin}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Call) and _last_name(node.func) == "import_module":
        for word in node.args:
            if isinstance(word, ast.JoinedStr):  # f"package.room.{name}"
                start = word.values[0] if word.values else word
                if isinstance(start, ast.Constant) and isinstance(start.value, str):
                    yield start.value.rpartition(".")[0]
            elif isinstance(word, ast.Constant) and word.value == package:
                yield package  # any other string is found below
    elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value != package:
        yield f"{node.value}:"


def _target(package: str, name: str, modules: Iterable[str]) -> str | None:
    """The module that a name is, or is in; None for one that is not of this package.

    A name that ends in a colon is a string's: it has to be a module's to the letter.
    """
    is_string, name = name.endswith(":"), name.removesuffix(":")
    if name != package and not name.startswith(f"{package}."):
        return None
    inner = name.removeprefix(package).lstrip(".")
    if is_string:
        return inner if inner in modules else None
    while inner and inner not in modules:
        inner = inner.rpartition(".")[0]
    return inner or "__init__"


# --- Judging ------------------------------------------------------------------------------------


def problems(house: House) -> list[str]:
    """A line for everything that breaks a rule, in a fixed order; none if the package obeys."""
    lines = [
        f"unknown room: {path}; move the file, or give its room a floor in tools/rooms.py"
        for module, path in house.modules.items()
        if room_of(module) not in FLOOR_OF
    ]
    at_top = sorted(path for path in house.modules.values() if "/" not in path)
    if len(at_top) > MOST_FILES_AT_THE_TOP:
        lines.append(
            f"too many files at the top: at most {MOST_FILES_AT_THE_TOP} Python files, found "
            f"{len(at_top)}: {', '.join(at_top)}"
        )
    lines += [
        f"wrong direction: {arrow}; {why}" for arrow in house.arrows if (why := _wrong(arrow))
    ]
    graph: dict[str, set[str]] = defaultdict(set)
    rooms: dict[str, set[str]] = defaultdict(set)
    for arrow in house.arrows:
        graph[arrow.source].add(arrow.target)
        if room_of(arrow.source) != room_of(arrow.target):
            rooms[room_of(arrow.source)].add(room_of(arrow.target))
    lines += [f"circle of modules: {', '.join(circle)}" for circle in circles(graph)]
    lines += [f"circle of rooms: {', '.join(circle)}" for circle in circles(rooms)]
    return lines


def _wrong(arrow: Arrow) -> str:
    """Why an arrow may not be, or nothing."""
    source, target = room_of(arrow.source), room_of(arrow.target)
    if source == target or source not in FLOOR_OF or target not in FLOOR_OF:
        return ""
    if FLOOR_OF[target] > FLOOR_OF[source]:
        return f"{target} is above {source}"
    if FLOOR_OF[target] == FLOOR_OF[source]:
        return f"{target} and {source} are on one floor"
    return ""


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The sets of nodes that all reach each other (strongly connected components), sorted."""
    nodes = sorted({*graph, *(target for targets in graph.values() for target in targets)})
    reach = {node: _reachable(graph, node) for node in nodes}
    found = {
        frozenset({node, *(other for other in reach[node] if node in reach[other])})
        for node in nodes
        if node in reach[node]
    }
    return sorted(sorted(circle) for circle in found)


def _reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    reached: set[str] = set()
    waiting = list(graph.get(start, ()))
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += graph.get(node, ())
    return reached


# --- Drawing ------------------------------------------------------------------------------------

# A room is a row, the highest floor first. An import leaves its room to the right, meets the lane
# of the room that is imported in a dot, and goes down the lane to that room. Because nothing is
# imported upwards, the lanes make stairs, and no line crosses an arrow's end.
_MARGIN, _HEAD = 28, 92
_BOX, _NAME, _ROW, _LINE, _GAP = 500, 118, 26, 17, 12
_LANE, _FIRST_LANE = 29, 46
_LETTER = 7.25  # width of a letter of the modules' names, which are in a monospaced font of 12 px
_HUES = (211, 24, 152, 280, 340, 186, 42, 250, 4, 118, 310, 84, 225, 160, 15, 270)


class _Row(NamedTuple):
    room: str
    lines: list[str]
    top: int
    height: int

    @property
    def middle(self) -> float:
        return self.top + self.height / 2


def picture(house: House) -> str:
    """The rooms with their modules, and the arrows between rooms, as SVG for light and dark."""
    rows, bottom = _rows(house)
    imports: dict[tuple[str, str], bool] = {}  # (room, imported room): only for types
    for arrow in house.arrows:
        pair = room_of(arrow.source), room_of(arrow.target)
        if pair[0] != pair[1] and pair[0] in rows and pair[1] in rows:
            imports[pair] = imports.get(pair, True) and arrow.for_types_only
    imported = [room for room in rows if any(room == target for _, target in imports)]
    lanes = {room: _MARGIN + _BOX + _FIRST_LANE + i * _LANE for i, room in enumerate(imported)}
    width = max(lanes.values(), default=0) + _MARGIN
    height = bottom + 50
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" role="img" aria-labelledby="title">',
        '<title id="title">The rooms of step35_patch in their order, with their modules; each '
        "imports only from rooms further down</title>",
        f"<style>{_style(len(imported))}</style>",
        f'<rect class="paper" width="{width}" height="{height}" rx="10"/>',
        f'<text class="title" x="{_MARGIN}" y="42">The rooms of step35_patch</text>',
        f'<text class="note" x="{_MARGIN}" y="66">A room imports from rooms below it, and from no '
        "other. Rooms that no dotted line parts share a floor.</text>",
    ]
    parts += _floors(rows, width - _MARGIN)
    # Lanes first: the dots and the boxes lie on them.
    for i, room in enumerate(imported):
        parts.append(_lane(rows, lanes[room], room, [s for s, t in imports if t == room], i))
    for row in rows.values():
        targets = [target for source, target in imports if source == row.room]
        parts += _exit(row, sorted(lanes[target] for target in targets))
    for (source, target), for_types_only in sorted(imports.items()):
        hollow = " types" if for_types_only else ""
        parts.append(
            f'<circle class="dot c{imported.index(target)}{hollow}" cx="{lanes[target]}" '
            f'cy="{_out(rows[source]):g}" r="4.5"><title>{source} imports {target}'
            f"{' (for types only)' if for_types_only else ''}</title></circle>"
        )
    for row in rows.values():
        parts += _box(row, imported)
    parts += _legend(bottom + 26, any(imports.values()))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _rows(house: House) -> tuple[dict[str, _Row], int]:
    """The rooms that there are, from the highest floor down, and where the last row ends."""
    rows, top = {}, _HEAD
    per_line = int((_BOX - _NAME - 16) / _LETTER)
    for floor in reversed(FLOORS):
        for room in reversed(floor):
            modules = [m for m in house.modules if room_of(m) == room]
            if not modules:
                continue
            lines = [""]
            for name in (m.partition(".")[2] for m in modules if m != room):
                longer = f"{lines[-1]}  {name}" if lines[-1] else name
                lines[-1:] = [longer] if len(longer) <= per_line else [lines[-1], name]
            rows[room] = _Row(room, lines, top, _ROW + _LINE * (len(lines) - 1) + 4)
            top += rows[room].height + 4
        top += _GAP
    return rows, top - _GAP


def _floors(rows: Mapping[str, _Row], end: int) -> Iterator[str]:
    """A line above each floor but the highest."""
    for lower, upper in pairwise(FLOORS):
        above = [rows[room] for room in upper if room in rows]
        below = [rows[room] for room in lower if room in rows]
        if above and below:
            y = (max(r.top + r.height for r in above) + min(r.top for r in below)) / 2
            yield f'<path class="floor" d="M{_MARGIN} {y:g}H{end}"/>'


def _out(row: _Row) -> float:
    """Where a room's own imports leave it; what imports the room comes in further up."""
    return row.middle + 5


def _lane(rows: Mapping[str, _Row], x: int, room: str, sources: list[str], hue: int) -> str:
    top = min(_out(rows[source]) for source in sources)
    edge, y = _MARGIN + _BOX, rows[room].middle - 5
    return (
        f'<path class="lane c{hue}" d="M{x} {top:g}V{y - 8:g}q0 8 -8 8H{edge + 9}"/>'
        f'<path class="head c{hue}" d="M{edge + 2} {y:g}l9 -4.5v9z"/>'
    )


def _exit(row: _Row, lanes: list[int]) -> Iterator[str]:
    if lanes:
        y = _out(row)
        yield f'<path class="exit" d="M{_MARGIN + _BOX} {y:g}H{lanes[-1]}"/>'


def _box(row: _Row, imported: list[str]) -> Iterator[str]:
    colour = f"c{imported.index(row.room)}" if row.room in imported else "plain"
    yield (
        f'<rect class="box" x="{_MARGIN}" y="{row.top}" width="{_BOX}" height="{row.height}" '
        'rx="6"/>'
    )
    yield (
        f'<rect class="mark {colour}" x="{_MARGIN}" y="{row.top}" width="5" '
        f'height="{row.height}" rx="2.5"/>'
    )
    yield f'<text class="room" x="{_MARGIN + 16}" y="{row.top + 20}">{escape(row.room)}</text>'
    for i, line in enumerate(row.lines):
        if line:
            yield (
                f'<text class="modules" x="{_MARGIN + _NAME}" y="{row.top + 19 + i * _LINE}" '
                f'xml:space="preserve">{escape(line)}</text>'
            )


def _legend(y: int, has_types: bool) -> Iterator[str]:
    x = _MARGIN + 5
    kinds = {"": "imports, at the file's top or inside a function", " types": "for types only"}
    for kind, text in list(kinds.items())[: 1 + has_types]:
        yield f'<circle class="dot c0{kind}" cx="{x}" cy="{y - 4}" r="4.5"/>'
        yield f'<text class="note" x="{x + 12}" y="{y}">{text}</text>'
        x += 330


def _style(colours: int) -> str:
    def rules(paper: str, box: str, edge: str, text: str, faint: str, tone: str) -> str:
        lines = [
            f".paper{{fill:{paper}}}.box{{fill:{box};stroke:{edge}}}.floor{{stroke:{edge}}}",
            f".title,.room{{fill:{text}}}.note,.modules{{fill:{faint}}}",
            f".exit{{stroke:{faint}}}.plain{{fill:{faint}}}.types{{fill:{paper}!important}}",
        ]
        for i in range(colours):
            colour = f"hsl({_HUES[i % len(_HUES)]},{tone})"
            lines.append(f".c{i}{{fill:{colour};stroke:{colour}}}")
        return "".join(lines)

    return (
        "text{font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}"
        ".title{font-size:21px;font-weight:600}.note{font-size:13px}"
        ".room{font-size:14px;font-weight:600}"
        ".modules{font-size:12px;font-family:ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',"
        "monospace}"
        + rules("#ffffff", "#f6f8fa", "#d0d7de", "#1f2328", "#59636e", "62%,42%")
        + ".lane{fill:none!important;stroke-width:2.2}.exit{fill:none;stroke-width:1}"
        ".floor{stroke-dasharray:2 5}.dot{stroke-width:2}.mark,.head{stroke:none}"
        "@media (prefers-color-scheme:dark){"
        + rules("#0d1117", "#161b22", "#30363d", "#e6edf3", "#9198a1", "58%,64%")
        + "}"
    )


# --- The command --------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Check the package's rooms and their order.")
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw the rooms into this file")
    parser.add_argument(
        "package", nargs="?", type=Path, default=PACKAGE, help="its folder (default: this package)"
    )
    options = parser.parse_args()
    house = read(options.package.resolve())
    if options.svg:
        options.svg.write_text(picture(house))
    found = problems(house)
    rooms = {(room_of(a.source), room_of(a.target)) for a in house.arrows} - {
        (room, room) for room in FLOOR_OF
    }
    pairs = {(arrow.source, arrow.target) for arrow in house.arrows}
    print(
        f"{len({room_of(module) for module in house.modules})} rooms, {len(rooms)} arrows between "
        f"them; {len(house.modules)} modules, {len(pairs)} arrows; {len(found)} problem(s)"
    )
    for line in found:
        print(f"  {line}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
