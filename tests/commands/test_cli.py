"""What all commands have: light help, words completed in a shell, exit statuses that are told."""

import json
import os
import subprocess
import sys

import pytest

from step35_patch import cli

COMMANDS = [[name] for name in cli._COMMANDS] + [["convert", "to-hf"], ["convert", "to-megatron"]]
HEAVY = ("torch", "rich", "pydantic", "numpy", "megatron", "transformers", "matplotlib", "wrapt")


def test_help_loads_little_and_tells_the_exit_status():
    """Of all commands one after the other: what one loads, none may."""
    program = f"""
import contextlib, io, json, sys
from step35_patch.cli import main
told = {{}}
for command in [[], *json.loads(sys.argv[1])]:
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    loaded = {{name.partition(".")[0] for name in sys.modules}} & {{*{HEAVY!r}, "argcomplete"}}
    told[" ".join(command)] = [" ".join(text.getvalue().split()), sorted(loaded)]
print(json.dumps(told))
"""
    done = subprocess.run(
        [sys.executable, "-c", program, json.dumps(COMMANDS)], capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    assert len(told) == len(COMMANDS) + 1
    for command, (text, loaded) in told.items():
        assert loaded == [], command
        assert f"usage: step35-patch {command}".rstrip() in text
        assert "Exit status: 0 fine; " in text and "; 2 the input can't be read" in text, command
    assert "1 something is wrong" in told["doctor"][0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("step35-patch ", set(cli._COMMANDS) | {"-h", "--help"}),
        ("step35-patch ins", {"inspect"}),
        ("step35-patch args step-3.5-flash --format ", {"bash", "yaml", "json"}),
        ("step35-patch convert to-hf a b --hf", {"--hf-dir"}),
        ("step35-patch verify --dtype fl", {"float32"}),
        ("step35-patch demo --ver", {"--verbose"}),
    ],
)
def test_words_are_completed_without_torch(line, words, tmp_path):
    answer = tmp_path / "answer"
    shell = {
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "_ARGCOMPLETE_STDOUT_FILENAME": str(answer),
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
    }
    command = [sys.executable, "-X", "importtime", "-m", "step35_patch.cli"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | shell)
    assert {word.strip() for word in answer.read_text().split("\n")} == words, done.stderr[-2000:]
    loaded = {row.split("|")[-1].strip().partition(".")[0] for row in done.stderr.splitlines()}
    assert "argcomplete" in loaded and not loaded & set(HEAVY)
    assert done.stdout == ""


def test_without_argcomplete_a_shell_gets_nothing(tmp_path):
    (tmp_path / "argcomplete.py").write_text("raise ImportError('not here')")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    shell = {"_ARGCOMPLETE": "1", "COMP_LINE": "step35-patch ", "COMP_POINT": "13"}
    done = subprocess.run(
        [sys.executable, "-m", "step35_patch.cli"],
        capture_output=True,
        text=True,
        env=os.environ | shell | {"PYTHONPATH": search},
    )
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_the_marker_of_argcomplete_is_where_it_looks_for_it():
    """Within the first 1024 bytes of the module that the installed command starts."""
    with open(cli.__file__, "rb") as file:
        assert b"PYTHON_ARGCOMPLETE_OK" in file.read(1024)
