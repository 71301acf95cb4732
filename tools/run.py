"""What ./run does once it has a Python: set up .venv, then run in it what is asked for.

Standard library only. The set-up is skipped while what it depends on is unchanged, so that a
second run needs no network; one that was interrupted is started afresh.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
# The digest of what .venv was made from; else what the next run has to do: begin afresh, or only
# install again, which pip can do over a half-done change.
STATE = VENV / "step35-setup"
INCOMPLETE, OUTDATED = "incomplete", "outdated"
# The newest tested Megatron-Core is in .venv itself; these lie in folders for PYTHONPATH.
OLDER_MEGATRON_CORES = ("0.18", "0.17")
# Transformer Engine's Python, for PYTHONPATH too, so that only the tests that are meant to have it
# do. tests/support/te_on_cpu stands in for its compiled part, and says for which version. All that
# is imported of it is named, because with its dependencies it would bring a PyTorch of its own.
TRANSFORMER_ENGINE = VENV / "transformer-engine"
TRANSFORMER_ENGINE_NEEDS = (
    *("transformer-engine==2.20.2", "einops", "ml_dtypes", "nvdlfw-inspect"),
    *("onnx", "onnx_ir", "onnxscript", "protobuf"),
)
# Megatron-Bridge in the same way, with what it needs in other versions than the tests: it does not
# import with the transformers that has the reference. See tests/support/bridge_on_cpu.py.
MEGATRON_BRIDGE = VENV / "megatron-bridge"
MEGATRON_BRIDGE_NEEDS = (
    *("megatron-bridge==0.6.2", "transformers==5.12.1", "tokenizers==0.22.2"),
    *("huggingface_hub<2", "httpx", "httpcore", "anyio", "certifi", "idna", "h11"),
    *("hydra-core", "omegaconf", "antlr4-python3-runtime==4.9.3"),
    *("nvidia-resiliency-ext==0.4.1", "defusedxml", "tensorboard"),
)
# See tests/support/implementation.py.
IMPLEMENTATION = "STEP35_TEST_IMPLEMENTATION"
# Tests run side by side, one worker a core: most start processes of their own. A worker takes over
# tests of another when it has done its own.
WORKERS = ("-n", str(os.cpu_count() or 1), "--dist", "worksteal", "--durations", "20")


def main() -> int:
    parser = argparse.ArgumentParser(prog="./run", description="Set up .venv, then:")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("demo", help="train a tiny Step-3.5 (further arguments go to the demo)")
    test = commands.add_parser("test", help="run the tests (further arguments go to pytest)")
    test.add_argument(
        "--quick", action="store_true", help="the newest Megatron-Core only, without the slow tests"
    )
    test.add_argument(
        "--figures",
        action="store_true",
        help="write what the tests measure to benchmarks/results/verification.csv, and the card",
    )
    against = commands.add_parser(
        "canary", help="hold another Megatron-Core (a checkout, a branch) against the package"
    )
    against.add_argument("path", type=Path, help="a folder with a megatron in it")
    commands.add_parser(
        "verify-gpu", help="measure what only a GPU can show (--dry-run: say what that would be)"
    )
    commands.add_parser("bench", help="run the benchmarks (further arguments go to them)")
    commands.add_parser("lint", help="check style, types and security only: ruff, mypy, bandit")
    commands.add_parser("setup", help="nothing else")
    arguments, rest = parser.parse_known_args()

    started = time.monotonic()
    set_up()
    report("set-up", started)
    if arguments.command == "demo":
        return subprocess.run(
            [VENV / "bin" / "step35-patch", "demo", *rest], env=environment()
        ).returncode
    if arguments.command == "test":
        return test_all(rest, arguments.quick, arguments.figures)
    if arguments.command == "verify-gpu":
        return subprocess.run(
            [PYTHON, ROOT / "tools" / "verify_gpu.py", *rest], cwd=ROOT, env=environment()
        ).returncode
    if arguments.command == "canary":
        return canary(arguments.path.resolve(), rest)
    if arguments.command == "bench":
        return subprocess.run(
            [PYTHON, ROOT / "benchmarks" / "all.py", *rest], env=environment()
        ).returncode
    if arguments.command == "lint":
        return int(not lint())
    return 0


def report(stage: str, started: float) -> None:
    print(f"[{stage}: {time.monotonic() - started:.0f} s]", flush=True)


def environment(*python_path: Path) -> dict[str, str]:
    """The caller's environment with .venv active, and without what would change the results.

    STEP35_TEST_* stay: they say what else is to be tested.
    """
    variables = {
        name: value
        for name, value in os.environ.items()
        if name.startswith("STEP35_TEST_")
        or not (name.startswith("STEP35_") or name in ("PYTHONPATH", "PYTHONHOME"))
    }
    variables["VIRTUAL_ENV"] = str(VENV)
    variables["PATH"] = f"{VENV / 'bin'}{os.pathsep}{variables.get('PATH', os.defpath)}"
    if python_path:
        variables["PYTHONPATH"] = os.pathsep.join(map(str, python_path))
    return variables


def set_up() -> None:
    """Make .venv what setup.cfg asks for, unless it is."""
    with open(ROOT / ".venv.lock", "w") as lock:
        # A second ./run waits for the first one's set-up. The commands below inherit the lock, so
        # that it also waits for what a killed ./run left running.
        fcntl.flock(lock, fcntl.LOCK_EX)
        os.set_inheritable(lock.fileno(), True)
        wanted = digest()
        found = STATE.read_text() if STATE.exists() else None
        if found == wanted and PYTHON.exists():
            return
        if found is None and VENV.exists():
            sys.exit(
                f"run: {VENV} is there, but was not made by ./run. Move it away, then run again."
            )
        print("Setting up .venv. The first time takes minutes: PyTorch is a download of GBytes.")
        sys.stdout.flush()
        if found == INCOMPLETE or not PYTHON.exists():
            shutil.rmtree(VENV, ignore_errors=True)
            VENV.mkdir()
            STATE.write_text(INCOMPLETE)
            call(sys.executable, "-m", "venv", str(VENV))
        else:
            STATE.write_text(OUTDATED)
        pip("--editable", f"{ROOT}[training,muon,reference,launch,plot,dev]")
        for version in OLDER_MEGATRON_CORES:
            target = megatron_core(version)
            shutil.rmtree(target, ignore_errors=True)
            pip("--no-deps", "--target", str(target), f"megatron-core=={version}.*")
        shutil.rmtree(TRANSFORMER_ENGINE, ignore_errors=True)
        pip("--no-deps", "--target", str(TRANSFORMER_ENGINE), *TRANSFORMER_ENGINE_NEEDS)
        set_up_bridge()
        STATE.write_text(wanted)


def set_up_bridge() -> None:
    """Megatron-Bridge, if its wheels are to be had here; else its tests are skipped, and say so."""
    shutil.rmtree(MEGATRON_BRIDGE, ignore_errors=True)
    try:
        pip("--no-deps", "--target", str(MEGATRON_BRIDGE), *MEGATRON_BRIDGE_NEEDS)
    except SystemExit as error:
        shutil.rmtree(MEGATRON_BRIDGE, ignore_errors=True)
        print(f"{error}\nrun: going on without Megatron-Bridge; tests/bridge will be skipped")
        return
    # Megatron-Core 0.19 takes its presence for that of a newer release.
    shutil.rmtree(MEGATRON_BRIDGE / "nvidia_resiliency_ext" / "checkpointing")


def digest() -> str:
    """A digest of everything that decides what the set-up installs."""
    files = ["setup.cfg", "setup.py", "pyproject.toml", "tools/run.py"]
    files += sorted(str(path.relative_to(ROOT)) for path in (ROOT / "startup").iterdir())
    sums = hashlib.sha256(sys.version.encode())
    for file in files:
        sums.update(f"{file}\0".encode() + (ROOT / file).read_bytes())
    return sums.hexdigest()


def megatron_core(version: str) -> Path:
    return VENV / f"megatron-core-{version}"


def pip(*arguments: str) -> None:
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    call(str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", *quiet, *arguments)


def call(*command: str) -> None:
    # close_fds=False: see the lock in set_up.
    done = subprocess.run(command, env=environment(), cwd=ROOT, close_fds=False)
    if status := done.returncode:
        sys.exit(f"run: {' '.join(command)} failed with status {status}")


def test_all(arguments: list[str], quick: bool, figures: bool) -> int:
    """Style and types; all tests with the newest Megatron-Core, and those that depend on it with
    the others. With each, those that run on Transformer Engine once more on it.

    Quick: only those that are not slow, and with the newest only. Figures: see
    tests/support/figures.py; of a part of the tests, those of the others stay as they are.
    """
    clean = lint()
    speed = ["not slow"] if quick else []
    runs: list[tuple[str, list[Path], list[str]]] = [("newest Megatron-Core", [], speed)]
    for version in () if quick else OLDER_MEGATRON_CORES:
        runs.append((f"Megatron-Core {version}", [megatron_core(version)], ["megatron"]))
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    statuses = []
    folder = Path(tempfile.mkdtemp(prefix="step35-figures-")) if figures else None
    for name, path, only in runs:
        local = environment(*path) | {IMPLEMENTATION: "local"}
        statuses.append(run_tests(name, local, only, arguments, counts, folder))
        # Without a GPU that it would find: its compiled part is not there.
        engine = environment(TRANSFORMER_ENGINE, *path) | {
            IMPLEMENTATION: "transformer_engine",
            "CUDA_VISIBLE_DEVICES": "",
        }
        name, only = f"{name} on Transformer Engine", [*only, "transformer_engine"]
        statuses.append(run_tests(name, engine, only, arguments, counts, folder))
    failed = counts["failures"] + counts["errors"]
    passed = counts["tests"] - failed - counts["skipped"]
    print(f"{passed} passed, {failed} failed, {counts['skipped']} skipped")
    if folder is not None:
        if failed == 0:
            call(str(PYTHON), str(ROOT / "tools" / "card.py"), *map(str, folder.iterdir()))
        shutil.rmtree(folder)
    # 5: pytest selected no test. One part may be without any, the whole may not.
    broken = any(status not in (0, 5) for status in statuses)
    if not clean:
        print("run: the tests ran, but style or types are wrong: see the top, or ./run lint")
    return int(not clean or broken or failed > 0 or passed == 0)


def canary(path: Path, arguments: list[str]) -> int:
    """What an upgrade to another Megatron-Core would need: what changed of what the package stands
    on, and the quick tests that depend on Megatron-Core, on both implementations.
    """
    if not (path / "megatron" / "core").is_dir():
        sys.exit(f"run: {path}: expected a folder with a megatron/core in it")
    newest = next((VENV / "lib").glob("python*/site-packages"))
    changes = [str(PYTHON), str(ROOT / "tools" / "megatron_changes.py"), str(newest), str(path)]
    print("== changes of what is relied on, from the newest tested Megatron-Core", flush=True)
    subprocess.run(changes, env=environment(), check=True)
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    only = ["megatron", "not slow"]
    for implementation, folders in (
        ("local", [path]),
        ("transformer_engine", [TRANSFORMER_ENGINE, path]),
    ):
        variables = environment(*folders) | {
            IMPLEMENTATION: implementation,
            "STEP35_ALLOW_UNTESTED": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        marks = [*only, *([implementation] if implementation == "transformer_engine" else [])]
        run_tests(f"{path.name}, {implementation}", variables, marks, arguments, counts)
    failed = counts["failures"] + counts["errors"]
    print(f"{counts['tests'] - failed - counts['skipped']} passed, {failed} failed")
    return int(failed > 0)


def lint() -> bool:
    """Whether style and types are as they should be; what is not is printed."""
    started, clean = time.monotonic(), True
    commands = (
        ("ruff", "check"),
        ("ruff", "format", "--check"),
        ("mypy",),
        ("bandit", "--quiet", "--ini", "setup.cfg"),
    )
    for command in commands:
        print(f"== {' '.join(command)}", flush=True)
        tool = [str(VENV / "bin" / command[0]), *command[1:]]
        clean &= subprocess.run(tool, cwd=ROOT, env=environment()).returncode == 0
    report("style and types", started)
    return clean


def run_tests(
    name: str,
    variables: dict[str, str],
    only: list[str],
    arguments: list[str],
    counts: dict[str, int],
    keep: Path | None = None,
) -> int:
    """One run of pytest; its counts are added to `counts`, its status is returned.

    Its results, as JUnit's XML, stay in the folder `keep`, if there is one.
    """
    print(f"== tests with {name}", flush=True)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "result.xml")
        command = [str(PYTHON), "-m", "pytest", f"--junitxml={result}", *WORKERS, *arguments]
        if only:
            command += ["-m", " and ".join(only)]
        # One thread a process: threads of several processes would wait for each other.
        status = subprocess.run(
            command, cwd=ROOT, env=variables | {"OMP_NUM_THREADS": "1"}
        ).returncode
        if result.exists():
            for suite in xml.etree.ElementTree.parse(result).iter("testsuite"):
                for key in counts:
                    counts[key] += int(suite.get(key))
            if keep is not None:
                shutil.copy(result, keep / f"{len(list(keep.iterdir()))}.xml")
    report(f"tests with {name}", started)
    return status


if __name__ == "__main__":
    sys.exit(main())
