"""What each way of installing puts in place, that it can be removed, and ./run without a Python."""

import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest
from support.installed import (
    ROOT,
    build_wheel,
    check_call,
    copy_sources,
    environment,
    new_environment,
    pip,
)

STARTUP = {
    *("a1_step35_patch.pth", "a1_step35_patch.start"),
    *("step35_patch_startup.py", "step35_patch_verl.py"),
}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    return build_wheel(tmp_path_factory)


def test_wheel_contents(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        metadata = Parser().parsestr(archive.read(metadata).decode())
    assert names >= STARTUP
    assert {
        "step35_patch/py.typed",
        "step35_patch/data/step-3.5-flash.json",
        "step35_patch/examples/pretrain_step35.py",
    } <= names
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    top = {name.split("/")[0] for name in names}
    assert top == STARTUP | {"step35_patch", f"step35_patch-{metadata['Version']}.dist-info"}
    assert metadata["Name"] == "step35-patch"
    assert metadata["License"] == "Apache-2.0" or metadata["License-Expression"] == "Apache-2.0"
    extras = {"training", "te", "bridge", "muon", "reference", "launch", "plot", "dev", "audit"}
    assert set(metadata.get_all("Provides-Extra")) == extras


@pytest.mark.slow
@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize("editable", [False, True], ids=["wheel", "editable"])
def test_install_and_uninstall(installer, editable, wheel, tmp_path):
    installed = new_environment(tmp_path / "environment")

    def install(*arguments):
        if installer == "pip":
            return pip(installed, *arguments)
        uv = (sys.executable, "-m", "uv", "--offline", "pip")
        return check_call(*uv, *arguments, "--python", installed.python)

    before = set(installed.site_packages.iterdir())
    if editable:
        source = ("--no-build-isolation", "--editable", copy_sources(tmp_path))
    else:
        source = (wheel,)
    install("install", "--no-deps", *source)
    files = {path.name for path in set(installed.site_packages.iterdir()) - before}
    assert files >= STARTUP

    started = "import sys; print('step35_patch' in sys.modules)"
    assert installed.check("-c", started, STEP35_PATCH="1") == "True\n"
    assert installed.check("-c", started) == "False\n"
    example = "from importlib.resources import files; print(files('step35_patch.examples'))"
    assert "examples" in installed.check("-c", example)
    assert (installed.folder / "bin" / "step35-patch").exists()

    install("uninstall", *(["--yes"] if installer == "pip" else []), "step35-patch")
    left = {path.name for path in set(installed.site_packages.iterdir()) - before}
    assert left <= {"__pycache__"}
    assert installed.run("-c", "print('ran')", STEP35_PATCH="1").stdout == "ran\n"


def test_start_file_names_a_callable(wheel, tmp_path):
    """What Python 3.15 does with the .start file (PEP 829), done by hand."""
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read("a1_step35_patch.start").decode().splitlines()
        archive.extract("step35_patch_startup.py", tmp_path)
    (entry,) = [line for line in lines if not line.startswith("#")]
    code = f"import pkgutil, sys; pkgutil.resolve_name({entry!r})(); print(*sys.modules)"
    start = [sys.executable, "-P", "-S", "-c", code]
    loaded = check_call(*start, PYTHONPATH=tmp_path)
    assert "step35_patch_startup" in loaded.split()
    assert "step35_patch" not in loaded.split()
    done = subprocess.run(
        start, capture_output=True, text=True, env=environment(PYTHONPATH=tmp_path, STEP35_PATCH=1)
    )
    assert done.returncode == 1
    assert "No module named 'step35_patch'" in done.stderr


def test_run_without_a_python_says_so(tmp_path):
    # A folder with the tools that the script needs, and no Python.
    for tool in ("dirname", "sh"):
        (tmp_path / tool).symlink_to(f"/usr/bin/{tool}")
    done = subprocess.run(
        ["/bin/sh", ROOT / "run", "test"],
        capture_output=True,
        text=True,
        env=environment(PATH=tmp_path, HOME=tmp_path, PYENV_ROOT=tmp_path),
    )
    assert done.returncode == 1
    assert "no Python 3.12 or 3.13 found" in done.stderr
    assert "pyenv install 3.12" in done.stderr
