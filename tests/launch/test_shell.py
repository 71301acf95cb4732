"""Scripts as bash expands them: the same programs with the same words, without running anything."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from step35_patch.launch.errors import UnreadableLaunch
from step35_patch.launch.shell import read_script
from step35_patch.launch.values import shown, unknowns

SCRIPTS = Path(__file__).parent / "scripts"
EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = ("torchrun", "python", "srun")
GIVEN = {
    **{"MODEL": "/m", "OUT": "/out", "MEGATRON_LM": "/lm", "START": "/s", "DATA": "/d.jsonl"},
    **{"HEAD": "node0", "NODE_RANK": "0", "SLURM_JOB_ID": "7", "ITERATIONS": "4"},
}


def by_bash(path: Path, arguments: list[str], folder: Path) -> list[list[str]]:
    """What bash starts, by programs that write down their words."""
    folder.mkdir()
    stub = '#!/bin/bash\n{ printf "%s\\0" "${0##*/}" "$@"; printf "\\1"; } >> "$LOG"\n'
    for name in PROGRAMS:
        (folder / name).write_text(stub)
        (folder / name).chmod(0o755)
    log = folder / "log"
    ended = subprocess.run(
        [shutil.which("bash") or "bash", path, *arguments],
        env=GIVEN | {"LOG": str(log), "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return [call.split("\0")[:-1] for call in log.read_text().split("\1")[:-1]]


def by_us(path: Path, arguments: list[str]) -> list[list[str]]:
    calls, notes = read_script(path, arguments, GIVEN)
    assert notes == []
    return [list(call.words) for call in calls if os.path.basename(call.words[0]) in PROGRAMS]


@pytest.mark.parametrize(
    "path",
    [
        SCRIPTS / "every_construct.sh",
        EXAMPLES / "sft_torchrun.sh",
        EXAMPLES / "pretrain_64_gpus.sh",
        SCRIPTS / "arrays.sh",
    ],
    ids=lambda path: path.name,
)
def test_words_are_those_of_bash(path, tmp_path):
    arguments = ["a b", "c"]
    assert by_us(path, arguments) == by_bash(path, arguments, tmp_path / "programs")


def read(tmp_path: Path, source: str, **given: str):
    path = tmp_path / "script.sh"
    path.write_text(source)
    return read_script(path, (), given)


def test_a_shell_in_a_command_is_followed(tmp_path):
    [call], _ = read(
        tmp_path,
        "export STEP35_PATCH=1; A=(1 2); N='it is'\n"
        "srun --export=ALL,X=3 bash -c \"torchrun t.py ${A[*]} '$N' \\$X\"\n",
    )
    assert call.words == ("torchrun", "t.py", "1", "2", "it is", "3")
    assert call.environment == {"STEP35_PATCH": "1", "X": "3"}


def test_a_script_that_a_script_starts_is_followed(tmp_path):
    (tmp_path / "inner.sh").write_text('torchrun t.py "$1" "$NOT" "$YES"\nexit 1\n')
    (tmp_path / "values.sh").write_text("FROM=source\n")
    [first, second], notes = read(
        tmp_path,
        'HERE=$(dirname "$0")\nsource "$HERE/values.sh"\nNOT=1; export YES=2\n'
        'docker run -e A=1 image bash "$HERE/inner.sh" "$FROM"\npython last.py\n',
    )
    assert [shown(word) for word in first.words] == ["torchrun", "t.py", "source", "$NOT", "2"]
    assert first.environment == {"YES": "2", "A": "1"}
    assert second.words == ("python", "last.py")
    assert notes == []


def test_what_is_not_known_stays_and_can_be_given(tmp_path):
    source = 'HEAD=$(scontrol show | head -n1)\ntorchrun --addr "$HEAD:$PORT" "$N"/x ${M:-2}\n'
    [call], _ = read(tmp_path, source)
    assert [shown(word) for word in call.words] == [
        *("torchrun", "--addr", "$(scontrol show | head -n1):$PORT", "$N/x", "2"),
    ]
    assert unknowns(call.words[2]) == ["(scontrol show | head -n1)", "PORT"]
    [call], _ = read(tmp_path, source, HEAD="node0", PORT="1", N="n", M="3")
    assert call.words == ("torchrun", "--addr", "node0:1", "n/x", "3")


def test_conditions_that_are_not_known_are_noted_if_they_decide(tmp_path):
    [call], notes = read(
        tmp_path,
        'if [ ! -d "$OUT" ]; then mkdir -p "$OUT"; fi\n'
        "if [[ -f /data/x ]]; then ARGS=1; fi\n"
        "[ -e y ] || exit 1\n"
        "[ -e y ] && OTHER=2\n"
        "source /nowhere/env.sh\n"
        "torchrun $ARGS\n",
    )
    assert [shown(word) for word in call.words] == ["torchrun", "$ARGS"]
    assert [note.partition(":")[0] for note in notes] == [
        f"script.sh, line {line}" for line in (2, 4, 5)
    ]


def test_slurm_sets_what_its_lines_say(tmp_path):
    source = "#!/bin/bash\n#SBATCH --nodes=4\n#SBATCH --gpus-per-node h100:8\n#SBATCH -t 1:00\n"
    [call], _ = read(tmp_path, source + "torchrun $SLURM_NNODES $SLURM_GPUS_ON_NODE\n")
    assert call.words == ("torchrun", "4", "8")


def test_nothing_is_run(tmp_path):
    """Not even where a script would, while its words are expanded."""
    mark = tmp_path / "mark"
    read(
        tmp_path,
        f'A=$(touch {mark})\n`touch {mark}`\ntouch {mark}\neval "touch {mark}"\n'
        f"B[$(touch {mark})]=1\necho $((a[$(touch {mark})]))\ncat < <(touch {mark})\n"
        f"echo > {mark}\ntrap 'touch {mark}' EXIT\n",
    )
    assert not mark.exists()


def test_what_would_take_all_memory_is_not_computed(tmp_path):
    [call], notes = read(
        tmp_path,
        "A[1000000000]=1; B=$((2**1000000000)); C=$((1<<400)); D=$(seq 1000000000)\n"
        'python {1..1000000000} "$B" "$C" "$D" $((9223372036854775807*4))\n',
    )
    assert all(unknowns(word) for word in call.words[1:])
    assert len(notes) == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("A=xxxxxxxx; for i in {1..60}; do A=$A$A; done", "the variable A grows beyond"),
        ("A=(1 2); while true; do A+=(${A[@]}); done", "the variable A grows beyond"),
        ("while :; do :; done", "a loop without an end"),
        ("a() { a; }; a", "the function a calls itself"),
        ('bash "$0"', "it starts itself"),
        ("echo ${A@Q}${B:=x}${A/x", "no bash that could be read"),
    ],
)
def test_scripts_that_never_end_are_refused(tmp_path, source, message):
    with pytest.raises(UnreadableLaunch, match=message):
        read(tmp_path, source)
