"""`./run bench`: all benchmarks one after the other, then the tables and plots of README.md.

A benchmark is a script in this folder with a command line of its own, other than this one and
`render.py`: with `--quick` it runs a small version of itself and writes nothing; without arguments
it writes results/NAME.csv. What it shares with others lies in modules without a command line.

    ./run bench                      # an hour or two, 50 GB of disk
    ./run bench --quick              # minutes; writes nothing
    ./run bench headwise start_up    # these
    ./run bench --render             # the tables and plots alone

A script that is run by itself has more options: `python benchmarks/headwise.py --help`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import render

HERE = Path(__file__).resolve().parent
OTHER = ("all", "render")


def scripts() -> dict[str, Path]:
    """By name."""
    return {
        path.stem: path
        for path in sorted(HERE.glob("*.py"))
        if path.stem not in OTHER and '\nif __name__ == "__main__":' in path.read_text()
    }


def main(arguments: Sequence[str] | None = None) -> int:
    known = scripts()
    parser = argparse.ArgumentParser(prog="./run bench", description="Run the benchmarks.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"default all: {', '.join(known)}")
    parser.add_argument("--quick", action="store_true", help="small versions; writes nothing")
    parser.add_argument("--render", action="store_true", help="README.md's tables and plots only")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - set(known)):
        parser.error(f"no such benchmark: {', '.join(unknown)}; there are {', '.join(known)}")
    failed = []
    for name in [] if options.render else options.names or known:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        command = [sys.executable, str(known[name]), *["--quick"] * options.quick]
        if subprocess.run(command, cwd=HERE.parent).returncode:
            failed.append(name)
        print(f"[{name}: {time.monotonic() - started:.0f} s]", flush=True)
    if not options.quick:
        render.main([])
    if failed:
        print(f"failed: {', '.join(failed)}")
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
