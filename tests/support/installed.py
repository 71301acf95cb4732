"""The package as a user has it: a wheel in a virtual environment of its own, run in subprocesses.

The environment borrows the heavy dependencies (torch, Megatron-Core, ...) from the interpreter that
runs the tests, and nothing else: not the checkout, and not that interpreter's installed package.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from support.once import once

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "step35_patch" / "data" / "step-3.5-flash.json"


def copy_sources(folder: Path) -> Path:
    """What a build needs, copied out of the checkout, so that builds leave nothing in it."""
    sources = folder / "sources"
    sources.mkdir()
    for name in ("setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, sources)
    for name in ("startup", "step35_patch", "examples"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    return sources


def check_call(*command: object, **variables: object) -> str:
    """The standard output of a command, with variables set. The test fails if the command does."""
    done = subprocess.run(
        [str(word) for word in command],
        capture_output=True,
        text=True,
        env=environment(**variables),
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def environment(**variables: object) -> dict[str, str]:
    """This process's environment without what would reach into the tested one, plus `variables`.

    What lets a Megatron-Core be tested that is none of the tested ones (`./run canary`) stays.
    """
    kept = {
        name: value
        for name, value in os.environ.items()
        if not (name.startswith(("STEP35_", "PYTHON")) or name in ("RANK", "VIRTUAL_ENV"))
        or name == "STEP35_ALLOW_UNTESTED"
    }
    return kept | {name: str(value) for name, value in variables.items()}


def dependency_folders() -> list[str]:
    """The sys.path entries that hold the dependencies, in order of precedence."""
    roots = {}
    for name in ("megatron.core", "torch", "wrapt", "pydantic", "setuptools"):
        package = Path(importlib.util.find_spec(name).origin).parent
        roots[str(package.parents[name.count(".")])] = None
    return sorted(roots, key=sys.path.index)


class Installed:
    """A virtual environment; `run` starts its interpreter."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.python = folder / "bin" / "python"
        version = f"python{sysconfig.get_python_version()}"
        self.site_packages = folder / "lib" / version / "site-packages"

    def run(
        self, *arguments: object, cwd: Path | None = None, **variables: object
    ) -> subprocess.CompletedProcess:
        """The interpreter with `arguments`, in `cwd` or its own folder, with variables set."""
        return subprocess.run(
            [str(self.python), *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=cwd or self.folder,
            env=environment(**variables),
            stdin=subprocess.DEVNULL,
            timeout=900,
        )

    def check(self, *arguments: object, **variables: object) -> str:
        """`run`; its standard output. The test fails if it does."""
        done = self.run(*arguments, **variables)
        assert done.returncode == 0, f"status {done.returncode}:\n{done.stdout}\n{done.stderr}"
        return done.stdout


def new_environment(folder: Path) -> Installed:
    """A virtual environment with the dependencies and without the package."""
    check_call(sys.executable, "-m", "venv", "--without-pip", folder)
    installed = Installed(folder)
    # After a1_step35_patch.pth, as the system's packages come after those of an environment.
    paths = "".join(f"{path}\n" for path in dependency_folders())
    (installed.site_packages / "zz_dependencies.pth").write_text(paths)
    return installed


def pip(installed: Installed, *arguments: object) -> str:
    return check_call(sys.executable, "-m", "pip", "--python", installed.python, *arguments)


def build_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the source distribution, built from the checkout; once a test run."""

    def make(folder: Path) -> None:
        build = (sys.executable, "-m", "build", "--no-isolation", "--outdir", folder / "dist")
        check_call(*build, copy_sources(folder))

    (wheel,) = (once(tmp_path_factory, "wheel", make) / "dist").glob("*.whl")
    return wheel


def wheel_environment(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A virtual environment with the wheel, put there by pip; once a test run."""
    wheel = build_wheel(tmp_path_factory)

    def make(folder: Path) -> None:
        installed = new_environment(folder / "environment")
        pip(installed, "install", "--quiet", "--no-deps", "--no-index", wheel)

    return Installed(once(tmp_path_factory, "environment", make) / "environment")
