"""`step35-patch convert`, both directions, against `cp` of the same bytes.

A synthetic checkpoint at the published width is made first: a dense layer, a full-attention and a
sliding MoE layer with all 288 experts, an MTP layer, all 128,896 rows of the three vocabulary
matrices; some 22 GB of safetensors in bf16. A round copies it with `cp -r` and converts it, one
right after the other and the order changing by round; then the same for the way back. Both
end when the bytes are on the disk (`cp` is followed by `sync -f`; convert calls fsync itself), and
begin with cold caches if the system lets us drop them (root; the result says so). Start-up, some
seconds of importing torch, is part of the conversion's time.

Memory is the largest resident size of the process, mapped pages included, beyond that of one that
only imports the same modules.

Needs Linux and twice the checkpoint's size of disk space besides it; the folder is removed at
the end. Run it from the repository:

    python benchmarks/convert.py --work-dir DIR    # some 10 minutes; writes results/convert.csv
    python benchmarks/convert.py --quick           # 8 experts, few words, one round; writes no file

Not covered: network file systems, more than one disk, tens of workers.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import models
import paired
import torch
from safetensors.torch import save_file

from step35_patch import Step35Config
from step35_patch.tensors.published import published_tensors

RESULTS = paired.RESULTS / "convert.csv"
GIB = 2**30


def small_config(quick: bool) -> dict:
    """The published config with four of its layers."""
    config = models.published() | ({"vocab_size": 1024} if quick else {})
    full, sliding = "full_attention", "sliding_attention"
    config |= {
        "num_hidden_layers": 3,
        "num_nextn_predict_layers": 1,
        "layer_types": [sliding, full, sliding, sliding],
        "moe_layers_enum": "1,2",
        "moe_num_experts": 8 if quick else 288,
    }
    for name, kinds in {
        "rope_theta": {full: 5e6, sliding: 1e4},
        "partial_rotary_factors": {full: 0.5, sliding: 1.0},
    }.items():
        config[name] = [kinds[kind] for kind in config["layer_types"]]
    for name in ("swiglu_limits", "swiglu_limits_shared"):
        config[name] = [0.0, 7.0, 16.0, 0.0]
    return config


def make_checkpoint(folder: Path, config: dict) -> int:
    """Random weights in the published layout, a file for each tensor; returns their bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    pool = torch.randn(2**26, generator=torch.Generator().manual_seed(1)).bfloat16()
    weight_map, total = {}, 0
    for number, info in enumerate(published_tensors(Step35Config.from_dict(config))):
        repeats = -(-info.num_elements // pool.numel())
        values = pool.roll(number).repeat(repeats)[: info.num_elements].view(info.shape)
        file = f"model-{number:05d}.safetensors"
        values = values.float() if info.dtype == "F32" else values
        save_file({info.name: values.contiguous()}, folder / file, metadata={"format": "pt"})
        weight_map[info.name] = file
        total += info.num_bytes
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def drop_caches() -> bool:
    """Whether the system let go of its file cache."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def timed(command: list[str]) -> tuple[float, float]:
    """Seconds and the largest resident size in GiB of a command."""
    drop_caches()
    began = time.monotonic()
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command)}: status {status}")
    return time.monotonic() - began, usage.ru_maxrss * 1024 / GIB


def compare(source: Path, work: Path, arguments: list[str], rounds: int, row: dict) -> list[dict]:
    """Rounds of copying and converting a folder; the last conversion stays at `work / "out"`."""
    copy, out = work / "copy", work / "out"
    program = "import sys; from step35_patch.cli import main; sys.exit(main(sys.argv[1:]))"
    convert = [sys.executable, "-c", program, "convert", *arguments]
    imports = [sys.executable, "-c", "import step35_patch.convert, step35_patch.commands.convert"]
    base = timed(imports)[1]
    rows = []
    for number in range(rounds):
        seconds = {}
        # The last round ends with a conversion, which stays.
        for what in ("cp", "convert") if (rounds - number) % 2 else ("convert", "cp"):
            shutil.rmtree(out, ignore_errors=True)
            if what == "cp":
                shell = 'cp -r "$0" "$1" && sync -f "$1"'
                seconds[what], _ = timed(["sh", "-c", shell, str(source), str(copy)])
                shutil.rmtree(copy)
            else:
                seconds[what], peak = timed(convert)
        rows.append(
            row
            | {
                "round": number + 1,
                "cp_s": f"{seconds['cp']:.1f}",
                "convert_s": f"{seconds['convert']:.1f}",
                "cp_gb_s": f"{row['bytes'] / seconds['cp'] / 1e9:.3f}",
                "convert_gb_s": f"{row['bytes'] / seconds['convert'] / 1e9:.3f}",
                "rate_over_cp": f"{seconds['cp'] / seconds['convert']:.3f}",
                "memory_above_start_gib": f"{peak - base:.3f}",
            }
        )
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmark convert; see the docstring.")
    parser.add_argument(
        "--work-dir", type=Path, help="on the disk that is measured; default the system's for files"
    )
    parser.add_argument(
        "--quick", action="store_true", help="8 experts, few words, one round, no file"
    )
    parser.add_argument("--rounds", type=int, help="default 3; 1 with --quick")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="convert-", dir=arguments.work_dir))
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    try:
        # In a process of its own: the resident size of a child starts at its parent's.
        with ProcessPoolExecutor(1) as pool:
            total = pool.submit(
                make_checkpoint, work / "hf", small_config(arguments.quick)
            ).result()
        about = paired.about(threads=arguments.workers) | {
            "cold_caches": drop_caches(),
            "bytes": total,
        }
        hf, out, megatron = work / "hf", work / "out", work / "megatron"
        common = ["--workers", str(arguments.workers)]
        to_megatron = ["to-megatron", str(hf), str(out), *common]
        rows = compare(hf, work, to_megatron, rounds, about | {"direction": "to-megatron"})
        out.rename(megatron)
        for file in hf.glob("*.safetensors"):  # config.json is all that the way back needs
            file.unlink()
        to_hf = ["to-hf", str(megatron), str(out), "--hf-dir", str(hf), *common]
        rows += compare(megatron, work, to_hf, rounds, about | {"direction": "to-hf"})
    finally:
        shutil.rmtree(work)
    if not arguments.quick:
        paired.write(RESULTS, rows)


if __name__ == "__main__":
    main()
