"""Where the package lies, what its files and folders are called, and what the terminal can show."""

import os
import shutil
import subprocess
import sys
import zipfile

import pytest
from support.installed import ROOT, environment
from support.reference import random_weights, tiny_config, write_hf_folder

IGNORED = shutil.ignore_patterns("__pycache__")


def python(*arguments: object, **variables: object) -> subprocess.CompletedProcess:
    """The tests' own interpreter, in whose environment the package is installed too."""
    return subprocess.run(
        [sys.executable, "-P", "-W", "ignore", *map(str, arguments)],
        capture_output=True,
        env=environment(OMP_NUM_THREADS=1, **variables),
    )


@pytest.mark.parametrize("module", ["step35_patch", "step35_patch.settings"])
def test_a_copy_inside_another_package_is_refused(tmp_path, module):
    """Half of it would come from the installed one."""
    (tmp_path / "vendored").mkdir()
    shutil.copytree(ROOT / "step35_patch", tmp_path / "vendored" / "step35_patch", ignore=IGNORED)
    done = python("-c", f"import vendored.{module}", PYTHONPATH=tmp_path)
    assert done.returncode == 1
    reason = done.stderr.decode().splitlines()[-1]
    assert reason.startswith("ImportError: vendored.step35_patch: expected the package to be ")
    assert "pip install step35-patch" in reason
    assert f"put {tmp_path / 'vendored'} on PYTHONPATH" in reason


@pytest.mark.parametrize("start", [["-c", "import step35_patch"], ["-m", "step35_patch", "x.py"]])
def test_an_archive_is_refused(tmp_path, start):
    archive = tmp_path / "step35_patch.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted((ROOT / "step35_patch").rglob("*.py")):
            opened.write(path, path.relative_to(ROOT))
    done = python(*start, PYTHONPATH=archive)
    assert done.returncode == 1
    reason = done.stderr.decode().splitlines()[-1]
    assert "expected the package in a folder, found" in reason
    assert str(archive) in reason and "unpack the archive" in reason


# Spaces, a line's end, quotes, a variable, and letters that ASCII lacks.
NAME = "wé ird\n'\"$HOME ✓"

COMMANDS = """
import sys
from step35_patch.cli import main
hf, there, back = sys.argv[1:]
for argv in (
    ["convert", "to-megatron", hf, there],
    ["convert", "to-hf", there, back, "--hf-dir", hf],
    ["verify", back, "--checkpoint", there],
    ["inspect", back],
    ["args", back],
):
    status = main(argv)
    assert status == 0, (argv, status)
"""


@pytest.mark.parametrize(
    "variables",
    [
        {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        pytest.param({"LC_ALL": "C.UTF-8"}, marks=pytest.mark.slow),
    ],
    ids=["C locale", "UTF-8"],
)
def test_files_of_any_name(tmp_path, variables):
    """In a process that knows neither its user's home nor an encoding for the names."""
    config = tiny_config()
    hf = write_hf_folder(tmp_path / NAME / "h f", config, random_weights(config, 3))
    there, back = tmp_path / NAME / "there", tmp_path / NAME / "back"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMANDS, hf, there, back],
        capture_output=True,
        env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", **variables},
    )
    assert done.returncode == 0, done.stderr
    assert (back / "model.safetensors.index.json").exists()


def test_a_name_that_standard_output_cannot_hold(tmp_path):
    """It is shown as Python writes it, and the command goes on."""
    config = tiny_config()
    hf = write_hf_folder(tmp_path / "hf", config, random_weights(config, 3))
    (hf / "model.safetensors").unlink()
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"x": "✓.safetensors"}}')
    done = python("-m", "step35_patch.cli", "inspect", hf, PYTHONIOENCODING="ascii")
    assert done.returncode == 1, done.stderr
    assert b"\\u2713.safetensors: not readable as safetensors" in done.stdout


@pytest.mark.parametrize("value", ["fifo", "/dev/zero", "/dev/stdin"])
def test_a_config_that_is_no_file_is_refused(tmp_path, value):
    """By STEP35_CONFIG: no process waits for somebody who writes, or reads for ever."""
    os.mkfifo(tmp_path / "fifo")
    path = tmp_path / value  # of an absolute one, itself
    code = "from step35_patch import settings; settings.active()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        env=environment(STEP35_PATCH=1, STEP35_CONFIG=path),
        timeout=120,
    )
    assert done.returncode == 1
    assert f"{path}: 1 problem" in done.stderr
    assert "expected a config.json or a folder with one, found no regular file" in done.stderr


@pytest.mark.parametrize(
    "value", ["2", " 1", "true", "1;import os", "step35_patch_startup", "\n0", "0\x0b"]
)
def test_the_start_up_file_runs_nothing_that_the_variable_says(value):
    """Anything but 0 and 1 ends the program, whatever it looks like."""
    done = python("-c", "print('went on')", STEP35_PATCH=value)
    assert done.returncode != 0
    assert done.stdout == b""
    assert f"STEP35_PATCH: expected '0' or '1', found {value!r}" in done.stderr.decode()
