"""The demo as a user runs it, and the CUDA stand-in that it trains on.

Nothing here installs the stand-in in pytest's own process: it cannot be taken back.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from step35_patch.commands import demo
from step35_patch.config import Step35Config, packaged_config_path


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=900, env=environment
    )


def run_demo(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
    code = "import sys; from step35_patch.cli import main; sys.exit(main(['demo', *sys.argv[1:]]))"
    return run("-c", code, *arguments, **variables)


# --- The demo -----------------------------------------------------------------------------------


def test_tiny_config_has_the_published_layers():
    published = Step35Config.from_pretrained(packaged_config_path()).layers[-12:]
    tiny = Step35Config.from_dict(demo.tiny_config()).layers
    assert len(tiny) == 12
    for ours, theirs in zip(tiny, published, strict=True):
        for name in ("attention_type", "is_mtp", "rotary_base", "rotary_percent"):
            assert getattr(ours, name) == getattr(theirs, name), (ours.index, name)
        for name in ("window_size", "rope_scaling", "swiglu_limit", "swiglu_limit_shared"):
            is_set = getattr(ours, name) is not None
            assert is_set == (getattr(theirs, name) is not None), (ours.index, name)
        # 64 and 96 heads there.
        assert ours.num_attention_heads * 16 == theirs.num_attention_heads
    assert [plan.is_moe for plan in tiny] == [False] * 3 + [True] * 6 + [False] * 3


@pytest.fixture(scope="module")
def short_demo(tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    folder = tmp_path_factory.mktemp("demo") / "kept here"  # a blank, for the printed command
    return run_demo("--iterations", "8", "--keep", str(folder)), folder


@pytest.mark.slow
def test_demo_trains_resumes_and_says_what_it_did(short_demo):
    result, _ = short_demo
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\] +8/8 +loss \d\.\d+ +MTP \d\.\d+ \d\.\d+ \d\.\d+\n", result.stdout)
    fell = re.search(r"The loss fell from (\d\.\d+) to (\d\.\d+)", result.stdout)
    assert 5 < float(fell[1]) < 6 and float(fell[2]) < float(fell[1]) - 0.3
    assert "wrapped   megatron.core.models.gpt.gpt_model.GPTModel.__init__" in result.stdout
    assert "3 full + 6 sliding layers, 6 MoE, 3 MTP" in result.stdout
    resumed = re.search(r"largest\s+difference ([^)]+)\)", result.stdout)
    assert float(resumed[1]) <= demo.RESUME_TOLERANCE


@pytest.mark.slow
def test_demo_keeps_what_it_made(short_demo):
    folder = short_demo[1]
    assert Step35Config.from_pretrained(folder / "config.json").num_hidden_layers == 9
    assert sorted(p.name for p in (folder / "checkpoints").glob("iter_*")) == [
        "iter_0000005",
        "iter_0000008",
    ]
    log = (folder / "megatron.log").read_text()
    assert "successfully saved checkpoint from iteration       5" in log
    assert re.search(r"successfully loaded checkpoint from .* at iteration 5", log)


@pytest.mark.slow
def test_printed_command_is_the_one_that_ran(short_demo, tmp_path):
    """Pasted into a shell it trains; here only as far as its first loss."""
    result, folder = short_demo
    printed = result.stdout.split("Training on the CPU with\n\n")[1].split("\n\n")[0]
    # A long path puts what is behind it into the next line.
    saving = r"--save '[^']+'(?: \\\n)?\s+--save-interval \d+"
    command, changed = re.subn(saving, "--exit-interval 1", printed)
    assert changed == 1, printed
    run = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=900)
    loss = re.compile(r"iteration +1/.*lm loss: (\S+)")
    assert loss.search(run.stdout), run.stdout[-2000:] + run.stderr[-2000:]
    log = (folder / "megatron.log").read_text()
    assert loss.search(run.stdout)[1] == loss.search(log)[1]


@pytest.mark.megatron
def test_demo_shows_the_end_of_the_log_when_training_fails(tmp_path):
    (tmp_path / "yaml.py").write_text("raise RuntimeError('broken on purpose')\n")
    search = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    result = run_demo("--keep", str(tmp_path / "kept"), PYTHONPATH=search)
    assert result.returncode == 1
    assert "RuntimeError: broken on purpose" in result.stderr
    log = tmp_path / "kept" / "megatron.log"
    assert str(log) in result.stderr
    assert "broken on purpose" in log.read_text()


def test_keep_refuses_a_folder_with_files(tmp_path):
    (tmp_path / "config.json").write_text("mine")
    result = run_demo("--keep", str(tmp_path))
    assert result.returncode == 2
    assert "empty folder" in result.stderr
    assert (tmp_path / "config.json").read_text() == "mine"


def test_too_few_iterations_are_refused():
    result = run_demo("--iterations", "5")
    assert result.returncode == 2
    assert "at least 6, found 5" in result.stderr


def test_a_loss_that_rises_fails():
    with pytest.raises(demo.DemoError, match="expected the loss to fall"):
        demo.check_loss_fell({i: 5.0 + 0.01 * i for i in range(1, 11)}, 10)


def test_a_run_that_stops_early_fails():
    with pytest.raises(demo.DemoError, match=r"each of 10 iterations.*found 9"):
        demo.check_loss_fell({i: 5.0 - 0.1 * i for i in range(1, 10)}, 10)


def test_a_resumed_run_with_other_losses_fails():
    first = {i: 5.0 - 0.1 * i for i in range(1, 11)}
    # Megatron logs the mean of the first two losses after a start, in place of the second.
    second = {7: 4.3, 8: 4.25, 9: 4.1, 10: 4.0}
    assert demo.check_same_losses(first, second, 6) == (3, pytest.approx(0, abs=1e-12))
    with pytest.raises(demo.DemoError, match="did not bring everything back"):
        demo.check_same_losses(first, second | {9: 4.1002}, 6)
    with pytest.raises(demo.DemoError, match="did not continue from the checkpoint"):
        demo.check_same_losses(first, {i: first[i] for i in range(1, 11)}, 6)


@pytest.mark.megatron
def test_examples_labels_are_the_next_bytes_of_the_text():
    code = """
import sys
sys.path.insert(0, sys.argv[1])
from pretrain_step35 import Bytes
text = bytes(range(256))
samples = Bytes(text, num_samples=100, seq_length=16)
for i in range(len(samples)):
    sample = samples[i]
    assert bytes(sample["tokens"]) in text and bytes(sample["labels"]) in text
    assert sample["labels"].tolist() == [token + 1 for token in sample["tokens"].tolist()]
    assert sample["tokens"].tolist() == Bytes(text, 1000, 16)[i]["tokens"].tolist()
assert len({bytes(samples[i]["tokens"]) for i in range(100)}) > 70
"""
    script = demo.example_script()
    result = run("-c", code, str(script.parent))
    assert result.returncode == 0, result.stderr


# --- The stand-in -------------------------------------------------------------------------------

INSTALL = "import torch; from step35_patch import cpu; cpu.install(); cpu.install(); "


def in_stand_in(code: str) -> str:
    result = run("-c", INSTALL + code)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_every_spelling_of_a_cuda_device_is_the_cpu():
    code = """
x = torch.zeros(2, device="cuda")
same = torch.nn.Linear(2, 2).cuda().weight
moved = x.cuda(), x.to("cuda:0"), x.to(0), x.to(device=torch.device("cuda", 1)), x.pin_memory()
made = x.new_ones(2, device=0), torch.tensor([1.0], device=torch.cuda.current_device())
for y in (x, same, *moved, *made):
    print(y.device, y.is_cuda, y.type())
print(x.to(torch.float64).type(), x.type(torch.int32).dtype, x.type("torch.cuda.IntTensor").dtype)
"""
    lines = in_stand_in(code).splitlines()
    assert set(lines[:-1]) == {"cpu True torch.cuda.FloatTensor"} and len(lines) == 10
    assert lines[-1] == "torch.cuda.DoubleTensor torch.int32 torch.int32"


def test_a_device_that_is_set_around_code_counts():
    code = """
with torch.device("meta"):
    print(torch.zeros(2).device, torch.zeros(2, device="cuda").device)
"""
    assert in_stand_in(code) == "meta cpu\n"


def test_devices_are_redirected_within_backward():
    code = """
class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, gradient):
        assert gradient.is_cuda
        return gradient * torch.full((3,), 2.0, device="cuda")
x = torch.ones(3, device="cuda", requires_grad=True)
Double.apply(x).sum().backward()
print(x.grad.tolist())
"""
    assert in_stand_in(code) == "[2.0, 2.0, 2.0]\n"


def test_gpu_draws_leave_the_cpus_generator_alone():
    """Else weights drawn on the CPU would depend on the batch and on the parallel layout."""
    code = """
torch.manual_seed(1); torch.cuda.manual_seed(2)
expected = torch.randn(3)
torch.manual_seed(1); torch.cuda.manual_seed(2)
ones = torch.ones(50, device="cuda")
first = torch.rand(4, device="cuda"), torch.nn.functional.dropout(ones)
assert torch.equal(torch.randn(3), expected)
torch.cuda.manual_seed(2)
again = torch.rand(4, device="cuda"), torch.nn.functional.dropout(ones)
assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
state = torch.cuda.get_rng_state()
third = torch.nn.functional.dropout(ones)
assert not torch.equal(third, first[1])
torch.cuda.set_rng_state(state)
assert torch.equal(torch.nn.functional.dropout(ones), third)
"""
    in_stand_in(code)


def test_stand_in_refuses_a_machine_with_a_gpu():
    code = """
import torch
torch.cuda.is_available, torch.cuda.get_device_name = lambda: True, lambda: "Some GPU"
from step35_patch import cpu
cpu.install()
"""
    result = run("-c", code)
    assert result.returncode == 1
    assert "Some GPU" in result.stderr and "CUDA_VISIBLE_DEVICES=" in result.stderr


@pytest.mark.megatron
def test_stand_in_refuses_to_come_after_megatron():
    result = run("-c", "import megatron.core; from step35_patch import cpu; cpu.install()")
    assert result.returncode == 1
    assert "before Megatron-Core is imported" in result.stderr


def test_nccl_is_gloo_between_two_processes(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(
        "import sys, torch\n"
        "import torch.distributed as dist\n"
        "from step35_patch import cpu\n"
        "cpu.install()\n"
        "rank = int(sys.argv[1])\n"
        "device = torch.device('cuda', rank)\n"
        "dist.init_process_group('nccl', init_method=f'file://{sys.argv[2]}', rank=rank,\n"
        "                        world_size=2, device_id=device)\n"
        "group = dist.new_group([0, 1], backend='nccl')\n"
        "dist.barrier(group=group, device_ids=[rank])\n"
        "x = torch.full((2,), rank + 1.0, device=device)\n"
        "dist.all_reduce(x, group=group)\n"
        "print(dist.get_backend(group), x.tolist())\n"
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(2)
    ]
    assert [rank.communicate(timeout=600)[0] for rank in ranks] == ["gloo [3.0, 3.0]\n"] * 2
