"""Run a program with the patch active: the launcher.

    python -m step35_patch SCRIPT ARGS...
    python -m step35_patch -m MODULE ARGS...
    torchrun ... -m step35_patch pretrain_gpt.py ARGS...

The program is ``__main__``, as if Python had started it, so what it pickles or spawns finds it by
the same names. STEP35_PATCH=1 is set for the processes that it starts.
"""

import importlib.util
import os
import runpy
import sys
from typing import NoReturn

from step35_patch.patch import activation, notices

USAGE = "usage: python -m step35_patch (SCRIPT | -m MODULE) ARGS..."


def main() -> None:
    """Run the program that sys.argv names, with the rest of it as its arguments.

    Raises:
        SystemExit: Status 2 for a script that cannot be found, or none named; else the program's.
    """
    is_module = sys.argv[1:2] == ["-m"]
    program, *arguments = sys.argv[1 + is_module :] or [""]
    if program in ("-h", "--help"):
        print(USAGE)
        return
    if not program or program.startswith("-"):
        _fail(USAGE)
    if not is_module and not os.path.exists(program):
        _fail(f"step35_patch: can't open {program!r}: no such file\n{USAGE}")
    os.environ["STEP35_PATCH"] = "1"
    if sys.flags.no_site or importlib.util.find_spec(activation.STARTUP_MODULE) is None:
        notices.warn(
            "a1_step35_patch.pth is not in effect (python -S, or a package that is not installed): "
            "this process is patched, processes that it starts are not, unless they import "
            "step35_patch themselves."
        )
    sys.argv[1:] = arguments
    if is_module:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
        return
    if not sys.flags.safe_path:  # else there is no entry for the script's folder
        working_folder, sys.path[0] = sys.path[0], os.path.dirname(os.path.realpath(program))
        if working_folder == os.path.dirname(os.path.dirname(os.path.abspath(__file__))):
            # A checkout that is not installed: spawned processes, too, have to find the package.
            sys.path.append(working_folder)
    runpy.run_path(program, run_name="__main__")


def _fail(message: str) -> NoReturn:
    print(message, file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
