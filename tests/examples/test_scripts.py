"""The launch scripts of examples/: bash expands them, Megatron's parser and checks take the rest.

`torchrun`, `srun` and `scontrol` are stubs that print their arguments. The world size is made up.
Megatron's own checks run with the stand-in for CUDA.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.layout_runs import iterations, write_config

import step35_patch
from step35_patch.patch.parse_args import Step35ArgumentError

EXAMPLES = Path(__file__).parents[2] / "examples"
PUBLISHED = Path(step35_patch.__file__).parent / "data" / "step-3.5-flash.json"
# Name: (processes, Megatron-Cores whose arguments it needs)
SCRIPTS = {
    "sft_slurm.sh": (64, ("0.18", "0.19")),
    "sft_torchrun.sh": (64, ("0.18", "0.19")),
    "pretrain_64_gpus.sh": (64, ("0.17", "0.18", "0.19")),
    "toy_two_gpus.sh": (2, ("0.17", "0.18", "0.19")),
}
# A TransformerConfig is refused with them where Transformer Engine is not installed.
WITHOUT_KERNELS = ("--no-rope-fusion", "--no-gradient-accumulation-fusion")
_BASH = shutil.which("bash")


def expand(name: str, model: Path, tmp_path: Path) -> list[str]:
    """The words that a script's training program gets."""
    for stub in ("torchrun", "srun", "scontrol", "nvidia-smi"):
        (tmp_path / stub).write_text("#!/bin/bash\nprintf '%s\\0' \"$@\"\n")
        (tmp_path / stub).chmod(0o755)
    variables = {"MEGATRON_LM": "/lm", "START": "/start", "DATA": "/data.jsonl", "OUT": "/out"}
    variables |= {"HEAD": "node0", "NODE_RANK": "0"}
    variables |= {"SLURM_JOB_NODELIST": "node[0-7]", "SLURM_JOB_ID": "1"}
    ended = subprocess.run(
        [_BASH, EXAMPLES / name],
        env=variables
        | {"MODEL": str(model), "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr.decode()
    words = ended.stdout.decode().split("\0")[:-1]
    [script] = [number for number, word in enumerate(words) if word.endswith(".py")]
    return words[script + 1 :]


@pytest.fixture
def check(monkeypatch):
    """Parses words, runs the package's checks and Megatron's, makes the TransformerConfig."""
    from megatron.core import __version__
    from megatron.training import arguments

    def check(name: str, words: list[str], model: Path):
        processes, versions = SCRIPTS[name]
        if not __version__.startswith(versions):
            pytest.skip(f"{name} needs Megatron-Core {' or '.join(versions)}")
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *words, *WITHOUT_KERNELS])
        step35_patch.activate(str(model))
        args = arguments.parse_args()
        arguments.validate_args(args)
        return args, arguments.core_transformer_config_from_args(args)

    yield check
    step35_patch.activate()


@pytest.mark.megatron
@pytest.mark.parametrize("name", SCRIPTS)
def test_arguments_are_accepted(check, tmp_path, name):
    model = write_config(tmp_path / "model") if name.startswith("toy") else PUBLISHED
    args, config = check(name, expand(name, model, tmp_path), model)
    assert args.data_parallel_size == {"sft": 1, "pretrain": 8, "toy": 2}[name.split("_")[0]]
    if name.startswith("sft"):
        layers = config.step35.layers
        kinds = {config.cp_comm_type[plan.index] for plan in layers[:45] if plan.window_size}
        assert kinds == {"a2a"}
        assert config.cp_comm_type.count("p2p") == 12
        assert config.pipeline_model_parallel_layout.layout[7][2][-1].name == "loss"
        assert args.muon_nesterov
        assert args.step35_decay_1d


@pytest.mark.megatron
def test_scripts_are_checked(check, tmp_path):
    """A ring where there is a window is found in the script's own arguments."""
    words = expand("sft_torchrun.sh", PUBLISHED, tmp_path)
    words[words.index("a2a")] = "p2p"
    with pytest.raises(Step35ArgumentError, match=r"--cp-comm-type: .* found p2p in 1; give"):
        check("sft_torchrun.sh", words, PUBLISHED)


@pytest.mark.slow
def test_toy_trains(tmp_path):
    """For real, on two processes of the CPU."""
    environment = {n: v for n, v in os.environ.items() if not n.startswith("STEP35_")}
    environment |= {
        "MODEL": str(write_config(tmp_path)),
        "ITERATIONS": "4",
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": f"{EXAMPLES.parent}{os.pathsep}{os.environ.get('PYTHONPATH', '')}",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    ended = subprocess.run(
        [_BASH, EXAMPLES / "toy_two_gpus.sh"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]
    logged = iterations(ended.stdout)
    assert sorted(logged) == [1, 2, 3, 4]
    assert logged[4].loss < logged[1].loss
