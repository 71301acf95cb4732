"""Launch scripts and command lines that were mutated: refused or checked, never a traceback."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from pathlib import Path

import pytest
from support.installed import PUBLISHED

from step35_patch import Step35Config
from step35_patch.launch.check import check
from step35_patch.launch.command import chosen
from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.parsing import megatron_parser
from step35_patch.launch.rehearsal import plan
from step35_patch.launch.shell import read_script
from step35_patch.launch.values import unknown

SCRIPTS = Path(__file__).parent / "scripts"
SOURCES = [path.read_bytes() for path in sorted(SCRIPTS.glob("*.sh"))]
PIECES = (
    *(b'"', b"'", b"$", b"${", b"}", b"(", b")", b"\\", b"\n", b" ", b"=", b"+=(", b";", b"&&"),
    *(b"|", b"#", b"[[", b"]]", b"if ", b"fi", b"done", b"${A[@]}", b"$((1+", b"))", b"{1..3}"),
    *(b'"$@"', b"<<EOF\n", b"`", b"*", b"!", b"%", b"/", b"[-1]", b"local x", b"export "),
)
VALUES = (
    *("0", "-1", "1", "2", "3", "7", "1e-3", "x", "", "[1,2]", "none", "full", "a2a", "p2p"),
    *("1" + "0" * 20, unknown("A"), "--", "local", "1,2", "{}"),
)


def mutated(source: bytes, chance: random.Random) -> bytes:
    result = bytearray(source)
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(result))
        match chance.randrange(4):
            case 0:
                del result[at : at + chance.randint(1, 12)]
            case 1:
                result[at:at] = chance.choice(PIECES)
            case 2:
                other = chance.randrange(len(result))
                result[at : at + 10] = result[other : other + chance.randint(1, 30)]
            case _:
                result[at] = chance.randrange(256)
    return bytes(result)


@pytest.mark.parametrize("seed", [1, 2])
def test_scripts(tmp_path, seed):
    chance, path, read = random.Random(seed), tmp_path / "script.sh", 0
    for _ in range(300):
        path.write_bytes(mutated(chance.choice(SOURCES), chance))
        with contextlib.suppress(UnreadableLaunch):
            chosen(read_script(path, ["a"], {"MODEL": "/m"})[0], "script.sh", None)
            read += 1
    assert 50 < read < 290


@pytest.mark.slow
def test_command_lines():
    chance = random.Random(5)
    config = Step35Config.from_pretrained(PUBLISHED)
    names = [name for action in megatron_parser()._actions for name in action.option_strings]
    commands = []
    for script in ("arrays.sh", "slurm_container.sh", "strings.sh"):
        commands.append(chosen(read_script(SCRIPTS / script, ["a", "b"])[0], script, None))
    right = 0
    for _ in range(40):
        command = chance.choice(commands)
        words = list(command.arguments)
        for _ in range(chance.randint(1, 3)):
            at = chance.randrange(len(words))
            match chance.randrange(4):
                case 0:
                    del words[at]
                case 1:
                    words[at:at] = [chance.choice(names), chance.choice(VALUES)]
                case 2:
                    words[at] = chance.choice(VALUES)
                case _:
                    options = [n for n, word in enumerate(words) if word.startswith("--")]
                    words[chance.choice(options)] = chance.choice(names)
        changed = dataclasses.replace(command, arguments=tuple(words))
        report = check(config, changed, gpus=chance.choice([None, 1, 7, 8, 64]))
        if report.launch is not None:
            plan(config, report.launch, words, chance.choice([1, 2, 4, 8]))
            right += 1
    assert right < 40
