"""`step35-patch demo`: train a tiny Step-3.5 through Megatron's own loop, on this machine's CPU.

The demo writes a config with the published model's layer pattern, runs the example script
(`examples/pretrain_step35.py`) in a child process as a user would, shows its progress, and checks
three things: Megatron trained to the end, the loss fell, and a second run that starts from a
checkpoint of the first continues with the losses of the first.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import tempfile
import textwrap
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from step35_patch.commands.demo_training import DemoError, for_a_shell, train
from step35_patch.tensors.published import published_tensors

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

# How many of the published model's decoder layers are taken, from its last: their pattern begins
# and ends with a full-attention layer, and the last two have clamps.
DECODER_LAYERS = 9
SEQUENCE_LENGTH = 128
# The losses of the resumed run may differ from the first run's by this much (they are the same
# numbers in the same order, but Megatron logs seven digits, and threads may sum in another order).
RESUME_TOLERANCE = 1e-4

# What Megatron's loop imports, and the packages that bring it.
_PACKAGES = {
    "torch": "torch",
    "megatron.training": "megatron-core",
    "yaml": "pyyaml",
    "psutil": "psutil",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `step35-patch demo`."""
    parser.add_argument(
        "--iterations",
        type=_iterations,
        default=60,
        metavar="N",
        help="how many (%(default)s), at least 6; the last third runs again from a checkpoint",
    )
    parser.add_argument(
        "--keep",
        metavar="DIR",
        type=Path,
        help="write config, checkpoints and Megatron's log to this new folder and keep them",
    )
    parser.add_argument("--verbose", action="store_true", help="show Megatron's log as it comes")
    parser.set_defaults(run=run)


def _iterations(text: str) -> int:
    iterations = int(text)
    if iterations < 6:
        raise argparse.ArgumentTypeError(f"expected at least 6, found {iterations}")
    return iterations


def run(options: argparse.Namespace) -> int:
    """Run the demo.

    Returns:
        The exit status: 0 if all that is checked holds, 1 if not, 2 for a `--keep` that is no new
        folder, 130 if interrupted.
    """
    if problem := _make_folder(options.keep):
        print(problem, file=sys.stderr)
        return 2
    folder = options.keep or Path(tempfile.mkdtemp(prefix="step35-demo-"))
    try:
        _demo(folder, options.iterations, options.verbose)
        status = 0
    except DemoError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        status = 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        status = 130
    if options.keep or status == 1:
        print(f"Config, checkpoints and Megatron's log are in {folder}")
    else:
        shutil.rmtree(folder)
    return status


def _make_folder(folder: Path | None) -> str | None:
    """Make the folder that is kept, if there is one; returns why not."""
    if folder is None:
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--keep: {error}"
    if any(folder.iterdir()):
        return f"--keep: expected a new or an empty folder, found files in {folder}"
    return None


def _demo(folder: Path, iterations: int, verbose: bool) -> None:
    from step35_patch.config.model import Step35Config

    began = time.monotonic()
    _check_packages()
    document = tiny_config()
    config_path = folder / "config.json"
    config_path.write_text(json.dumps(document, indent=1) + "\n")
    config = Step35Config.from_pretrained(config_path)
    checkpoints = folder / "checkpoints"
    log = folder / "megatron.log"
    saved_at = iterations * 2 // 3
    command = _command(iterations)
    saving = [*command, "--save", str(checkpoints), "--save-interval", str(saved_at)]
    loading = [*command, "--load", str(checkpoints), "--ckpt-step", str(saved_at)]
    loading.append("--exit-on-missing-checkpoint")

    print(_describe(config))
    print(f"config: {config_path}\nMegatron's log: {log}\n\nTraining on the CPU with\n")
    print(for_a_shell(config_path, saving), end="\n\n")
    first = train(saving, config_path, log, "training", verbose)
    before, after = check_loss_fell(first.losses, iterations)
    print(f"\n{first.report}\n")
    print(f"The loss fell from {before:.3f} to {after:.3f} (mean of the last iterations).\n")

    print(f"Again from the checkpoint of iteration {saved_at}: the same command with\n")
    print(f"    {shlex.join(loading[len(command) :])}\n")
    second = train(loading, config_path, log, "resuming", verbose)
    compared, difference = check_same_losses(first.losses, second.losses, saved_at)
    print(
        f"\nThe losses after iteration {saved_at} are those of the run that was not interrupted\n"
        f"({compared} compared, largest difference {difference:.1g}): weights, optimizer, learning "
        "rate and place\nin the data came back."
    )
    print(f"\nDone in {time.monotonic() - began:.0f} s.")


# --- The model and its command ------------------------------------------------------------------


def tiny_config() -> dict[str, Any]:
    """A config.json with the layers of the published one's end, in a size for a CPU.

    Nine decoder layers (full attention at 0, 4 and 8, sliding elsewhere; the first three dense, the
    others MoE; clamps in the last two) and the three MTP layers, with the published relations:
    sliding layers have 1.5 times the heads, full ones rotate half a head and scale their RoPE.
    The clamps, the window and the length from which RoPE is scaled are small enough to matter.
    """
    from step35_patch.config.model import packaged_config_path

    published = json.loads(packaged_config_path().read_text())
    layers = published["num_hidden_layers"] + published["num_nextn_predict_layers"]
    first = published["num_hidden_layers"] - DECODER_LAYERS
    document: dict[str, Any] = {
        name: value[first:] if isinstance(value, list) and len(value) == layers else value
        for name, value in published.items()
    }
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 16}
    sliding = heads | {"num_attention_heads": 6, "true_head_dim": 16}
    limits = {7.0: 0.5, 16.0: 1.0, 0.0: 0.0}
    return (
        document
        | heads
        | {
            "torch_dtype": "float32",
            "num_hidden_layers": DECODER_LAYERS,
            "hidden_size": 64,
            "intermediate_size": 176,
            "vocab_size": 256,  # a byte
            "max_seq_len": SEQUENCE_LENGTH,
            "max_position_embeddings": SEQUENCE_LENGTH,
            "attention_other_setting": document["attention_other_setting"] | sliding,
            "sliding_window": 24,
            "rope_scaling": document["rope_scaling"] | {"original_max_position_embeddings": 64},
            "moe_layers_enum": list(range(3, DECODER_LAYERS)),
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "moe_intermediate_size": 32,
            "share_expert_dim": 32,
            "swiglu_limits": [limits[limit] for limit in document["swiglu_limits"]],
            "swiglu_limits_shared": [limits[limit] for limit in document["swiglu_limits_shared"]],
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
    )


def _describe(config: Step35Config) -> str:
    from step35_patch.config.model import Step35Config, packaged_config_path

    decoder = config.layers[: config.num_hidden_layers]
    full = sum(plan.window_size is None for plan in decoder)
    moe = sum(plan.is_moe for plan in decoder)
    published = Step35Config.from_pretrained(packaged_config_path())
    ours, theirs = (
        sum(tensor.num_elements for tensor in published_tensors(c)) for c in (config, published)
    )
    return textwrap.fill(
        f"A tiny Step-3.5 ({ours:,} parameters, the published one has {theirs:,}): {len(decoder)} "
        f"decoder layers, {full} with full attention and {len(decoder) - full} with a window of "
        f"{config.sliding_window} keys, {len(decoder) - moe} dense and {moe} MoE with "
        f"{config.moe_num_experts} experts; {config.num_nextn_predict_layers} MTP layers; clamped "
        "SwiGLU in the last two decoder layers. The text is Python's documentation, its tokens are "
        "bytes.",
        width=100,
    )


def _command(iterations: int) -> list[str]:
    from step35_patch.arguments import CPU_ARGUMENTS

    training = f"""
        --tokenizer-type NullTokenizer --seq-length {SEQUENCE_LENGTH}
        --micro-batch-size 8 --global-batch-size 8 --num-workers 0
        --train-iters {iterations} --lr 5e-3 --lr-decay-style constant --lr-warmup-iters 3
        --weight-decay 0.01 --clip-grad 1.0 --seed 1234
        --eval-iters 0 --eval-interval {iterations} --log-interval 1
        --moe-token-dispatcher-type alltoall --ckpt-format torch_dist
        --moe-router-bias-update-rate 1e-3
    """
    return [
        *(sys.executable, "-m", "step35_patch", str(example_script())),
        *CPU_ARGUMENTS,
        *training.split(),
    ]


def example_script() -> Path:
    """Where `pretrain_step35.py` is installed.

    Raises:
        DemoError: it is not there.
    """
    here = Path(__file__).parents[1]
    # In an installed wheel, and in a source tree (an editable installation is one too).
    for folder in (here / "examples", here.parent / "examples"):
        if (script := folder / "pretrain_step35.py").exists():
            return script
    raise DemoError(
        f"expected the example script pretrain_step35.py in {here / 'examples'}, found none. "
        "Install step35-patch again."
    )


def _check_packages() -> None:
    missing = []
    for module, package in _PACKAGES.items():
        try:
            found = importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the parent is missing
            found = False
        if not found:
            missing.append(package)
    if missing:
        raise DemoError(
            f"expected the packages that Megatron's training loop needs, found no "
            f"{', '.join(missing)}. Install them: pip install 'step35-patch[training]'"
        )


# --- What is checked ----------------------------------------------------------------------------


def check_loss_fell(losses: dict[int, float], iterations: int) -> tuple[float, float]:
    """The first loss, and the mean of the last tenth of them (three at least), in nats a token."""
    if sorted(losses) != list(range(1, iterations + 1)):
        raise DemoError(
            f"expected a loss for each of {iterations} iterations in Megatron's log, found "
            f"{len(losses)}: {sorted(losses)}"
        )
    last = [losses[i] for i in range(iterations - max(3, iterations // 10) + 1, iterations + 1)]
    before, after = losses[1], sum(last) / len(last)
    if not after < before:
        raise DemoError(f"expected the loss to fall, found {before:.4f}, and {after:.4f} at last")
    return before, after


def check_same_losses(
    first: dict[int, float], second: dict[int, float], saved_at: int
) -> tuple[int, float]:
    """The number of losses that can be compared, and the largest difference.

    Megatron's log has, for the second iteration after a start, the mean of the first two.
    """
    expected = [i for i in sorted(first) if i > saved_at]
    if sorted(second) != expected:
        raise DemoError(
            f"expected the second run to train iterations {expected[0]} to {expected[-1]}, found "
            f"{sorted(second)}: it did not continue from the checkpoint"
        )
    compared = [i for i in expected if i != saved_at + 2]
    difference = max(abs(first[i] - second[i]) for i in compared)
    if not difference <= RESUME_TOLERANCE:
        raise DemoError(
            f"expected the losses after iteration {saved_at} again, found a difference of "
            f"{difference:.3g}: the checkpoint did not bring everything back"
        )
    return len(compared), difference
