"""What the package adds to the start of a Python process.

- `absent`: site-packages without the package's files for the start of the interpreter.
- `unset`: with them, and STEP35_PATCH unset.
- `set`: with STEP35_PATCH=1 and STEP35_CONFIG, that is, patched.

Each process runs one program (the column `program`) from an interpreter without site-packages, to
which `site.addsitedir` adds a folder with or without the files, as `site` would. Times are CPU
seconds of the process with all that it does until it has ended.

Not covered: reading the files from a network file system, cold caches.

    python benchmarks/start_up.py            # some 10 minutes
    python benchmarks/start_up.py --quick    # the first two, seconds; writes no file
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import paired

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = {
    "nothing": "pass",
    "import of step35_patch": "import step35_patch",
    "import of Megatron-Core's GPT model": "import megatron.core.models.gpt.gpt_model",
}


@functools.cache
def folder(name: str) -> Path:
    """One with what lies in site-packages at its top; removed when the worker ends."""
    made = tempfile.TemporaryDirectory()
    keep.append(made)
    if name != "absent":
        shutil.copytree(ROOT / "startup", made.name, dirs_exist_ok=True)
    return Path(made.name)


keep: list[tempfile.TemporaryDirectory] = []


def measure(implementation: str, case: paired.Case) -> paired.Result:
    variables = {k: v for k, v in os.environ.items() if not k.startswith("STEP35_")}
    variables["PYTHONPATH"] = os.pathsep.join([str(ROOT), sysconfig.get_path("purelib")])
    if implementation == "set":
        config = ROOT / "step35_patch" / "data" / "step-3.5-flash.json"
        variables |= {"STEP35_PATCH": "1", "STEP35_CONFIG": str(config)}
    program = f"import site; site.addsitedir({str(folder(implementation))!r})\n"
    program += PROGRAMS[case["program"]]
    command = [sys.executable, "-S", "-W", "ignore", "-c", program]
    process = subprocess.Popen(command, env=variables, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{case}, {implementation}: status {status}")
    return {"total_s": usage.ru_utime + usage.ru_stime}


BENCHMARK = paired.Benchmark(
    script=__file__,
    implementations=("absent", "unset", "set"),
    measure=measure,
    cases=[{"program": name} for name in PROGRAMS],
    quick=[{"program": name} for name in list(PROGRAMS)[:2]],
    rounds=11,
)

if __name__ == "__main__":
    paired.main(BENCHMARK)
