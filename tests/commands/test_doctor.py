"""`step35-patch doctor` as a user starts it, installed, where all is well and where it is not.

Each run starts interpreters of its own, so that one run shows many things at once.
"""

import json
import os
import pwd
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.config_samples import tiny
from support.installed import (
    PUBLISHED,
    ROOT,
    Installed,
    environment,
    new_environment,
    wheel_environment,
)

USER, HOST = "marguerite", socket.gethostname()


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Installed:
    return wheel_environment(tmp_path_factory)


@pytest.fixture
def home(tmp_path) -> Path:
    """A home folder with a config."""
    home = tmp_path / "homes" / USER
    home.mkdir(parents=True)
    (home / "config.json").write_bytes(PUBLISHED.read_bytes())
    return home


def doctor(installed: Installed, home: Path, *options: str, **variables: object):
    """The installed command, in a home that is told by every usual variable."""
    return subprocess.run(
        [str(installed.folder / "bin" / "step35-patch"), "doctor", *options],
        capture_output=True,
        text=True,
        cwd=home,
        env=environment(HOME=home, USER=USER, LOGNAME=USER, HOSTNAME=HOST, **variables),
        timeout=900,
    )


def megatron_core(folder: Path, version: str) -> Path:
    """A Megatron-Core of this version with one module that has targets, and none of them."""
    package = folder / "megatron" / "core"
    module = package / "models" / "gpt" / "gpt_layer_specs.py"
    module.parent.mkdir(parents=True)
    for path in (package, package / "models", module.parent):
        (path / "__init__.py").touch()
    module.touch()
    major, minor, patch = version.split(".")
    (package / "package_info.py").write_text(
        f"MAJOR = {major}\nMINOR = {minor}\nPATCH = {patch}\nPRE_RELEASE = ''\n"
        f"__version__ = {version!r}\n"
    )
    return folder


def holds_no_private_word(text: str, home: Path) -> None:
    account = pwd.getpwuid(os.getuid())
    for word in (str(home), USER, account.pw_dir + "/"):
        assert word not in text
    assert not re.search(rf"[/-]{re.escape(HOST)}(?![A-Za-z0-9])", text)


@pytest.mark.slow
def test_nothing_is_wrong(installed, home):
    """With an older Megatron-Core before the newest, as a checkout on PYTHONPATH is."""
    older = Path(sys.prefix, "megatron-core-0.17")
    if not older.exists():
        pytest.skip("./run setup puts older Megatron-Cores there")
    done = doctor(
        installed,
        home,
        "--json",
        PYTHONPATH=older,
        STEP35_PATCH="1",
        STEP35_CONFIG=home / "config.json",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ok"] is True and found["problems"] == []
    states = {(t["module"], t["attribute"]): t["state"] for t in found["targets"]}
    assert states["megatron.core.models.gpt.gpt_model", "GPTModel.__init__"] == "wrapped"
    assert states["megatron.training.arguments", "parse_args"] == "wrapped"
    # 0.17 alone has the first, later ones alone the second.
    assert states["megatron.core.utils", "get_thd_batch_on_this_cp_rank"] == "wrapped"
    module = "megatron.core.transformer.moe.moe_logging"
    assert states[module, "MoEMetricsTracker.report"] == "missing"
    assert {t["state"] for t in found["targets"] if t["required"]} == {"wrapped"}
    assert found["versions"]["megatron-core"].startswith("0.17.")
    assert found["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["versions"]["torch"] and found["versions"]["wrapt"]
    first, second = found["megatron"]
    assert re.match(r"0\.17\.\d+, package in .*: megatron.core and megatron.training from", first)
    assert re.match(r"0\.1[89]\.\d+, package in .*: not used", second)
    assert any("of different versions are on the path (0.17." in n for n in found["notices"])
    assert found["startup"].endswith("a1_step35_patch.pth; runs with STEP35_PATCH=1")
    assert found["variables"] == {"STEP35_CONFIG": "~/config.json", "STEP35_PATCH": "1"}
    assert found["config"].startswith("45 layers and 3 MTP layers, bfloat16")
    holds_no_private_word(done.stdout, home)


def test_all_that_is_wrong_comes_at_once(installed, home):
    path = megatron_core(home / "Megatron-LM", "0.99.0")
    (path / "pretrain_gpt.py").touch()
    done = doctor(
        installed,
        home,
        "--report",
        PYTHONPATH=path,
        STEP35_PATCH="1",  # with which no other program starts here
        STEP35_CONFIG=home / f"{HOST}-models" / f"of_{USER}",
        STEP35_WINDOW="513",
        STEP35_GATE_LAYOUTS="headwise",
        STEP35_ACCEPT_CHANGED="hidden_size",
    )
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("```text\n") and done.stdout.endswith("\n```\n")
    problems = [line for line in done.stdout.splitlines() if line.startswith("!! ")]
    for part in (
        "Megatron-Core: expected a version >=0.17,<0.20, found 0.99.0",
        "STEP35_WINDOW: expected 'hf' or 'steptron', found '513'",
        "STEP35_GATE_LAYOUTS: expected STEP35_GATE_LAYOUT",
        "STEP35_ACCEPT_CHANGED: expected some of",
        "STEP35_CONFIG: expected the path of a config.json or of a folder with one, found '~/",
    ):
        assert any(part in line for line in problems), (part, done.stdout)
    refused = [line for line in done.stdout.splitlines() if line.startswith("!! refused")]
    assert len(refused) == 1 and "core.models.gpt.gpt_layer_specs" in refused[0]
    assert "0.99.0, checkout in ~/Megatron-LM: megatron.core from here" in done.stdout
    # The tested one behind it has megatron.training, which the first has not.
    assert "expected megatron.core and megatron.training of one version" in done.stdout
    holds_no_private_word(done.stdout, home)


@pytest.fixture(scope="module")
def without_package(tmp_path_factory) -> Installed:
    return new_environment(tmp_path_factory.mktemp("without_package") / "environment")


@pytest.mark.slow
def test_a_copy_of_the_package_and_an_untested_version_that_is_allowed(without_package, home):
    """On PYTHONPATH, without metadata or a .pth: STEP35_PATCH=1 would train unpatched.

    Of the Megatron-Core it is told what it lacks, and of the config every problem.
    """
    path = megatron_core(home / "lib", "0.99.0")
    (home / "config.json").write_text(json.dumps(tiny(hidden_size=0, head_dim=-3)))
    done = without_package.run(
        *("-m", "step35_patch.cli", "doctor", "--json"),
        cwd=home,
        HOME=home,
        USER=USER,
        PYTHONPATH=f"{path}:{ROOT}",
        STEP35_PATCH="1",
        STEP35_CONFIG=home,
        STEP35_ALLOW_UNTESTED="1",
    )
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    problems = {problem["field"]: problem for problem in found["problems"]}
    assert "does not run it" in problems["STEP35_PATCH=1"]["found"]
    assert found["startup"].startswith("no a1_step35_patch.pth") or "not run" in found["startup"]
    assert {"~/config.json: hidden_size", "~/config.json: head_dim"} <= problems.keys()
    lacking = problems["megatron.core.models.gpt.gpt_layer_specs"]
    assert "get_gpt_decoder_block_spec" in lacking["expected"]
    assert "Megatron-Core 0.99.0" in lacking["found"]
    module = problems["megatron.core.models.gpt.gpt_model"]
    assert module["found"].startswith("no such module")
    assert any("0.99.0 is not tested" in notice for notice in found["notices"])
    assert "Megatron-Core" not in problems
    holds_no_private_word(done.stdout, home)


def test_it_starts_where_nothing_is_installed(without_package, home):
    dependencies = without_package.site_packages / "zz_dependencies.pth"
    text = dependencies.read_text()
    dependencies.unlink()
    try:
        command = ("-m", "step35_patch.cli", "doctor")
        variables = {"HOME": home, "PYTHONPATH": ROOT, "STEP35_CONFIG": home}
        done = without_package.run(*command, cwd=home, **variables)
    finally:
        dependencies.write_text(text)
    assert done.returncode == 1, done.stderr
    assert "!! packaging: expected any version, found nothing" in done.stdout
    assert "!! reading configs: expected to be possible, found No module named" in done.stdout
    assert "so that STEP35_PATCH=1 would do nothing" in done.stdout
    assert "STEP35_CONFIG without STEP35_PATCH=1: only programs are patched" in done.stdout
