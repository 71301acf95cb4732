"""The published checkpoint to Megatron's torch_dist format and back, in little memory.

Both directions copy runs of rows (`megatron_layout`) from memory-mapped files into new ones, a few
files at a time (`conversion_run`). Nothing needs a GPU or a process group. The output is staged
(`staging`): it appears whole or not at all, and a run that was killed is gone on with.
"""

from __future__ import annotations

import json
import math
import os
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from step35_patch._version import __version__
from step35_patch.config.model import Step35Config
from step35_patch.convert.job import (
    ConversionError,
    Job,
    Options,
    OutputFile,
    run_job,
    split_into_files,
)
from step35_patch.storage import hf_folder as hf_files
from step35_patch.storage import torch_dist
from step35_patch.storage.hf_folder import HfFolder
from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint
from step35_patch.storage.staging import Staging, SummedFile
from step35_patch.tensors.megatron import (
    Box,
    Chunk,
    MegatronTensor,
    Run,
    extra_states,
    megatron_tensors,
    published_runs,
)
from step35_patch.tensors.published import TensorInfo, published_tensors

__all__ = ["ConversionError", "Options", "convert_to_hf", "convert_to_megatron"]

# A torch_dist file is also what a resumed run takes up again, and what a worker has to itself.
MEGATRON_FILE_BYTES, HF_SHARD_BYTES = 2 * 10**9, 5 * 10**9
_EMPTY_STATES = "__0_0.distcp"
_MEGATRON_MARKERS = (f"{torch_dist.RELEASE}/{torch_dist.METADATA}",)
# Files of a folder in the published layout that are weights in some format, and not copied along.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".npz")


# --- To Megatron --------------------------------------------------------------------------------


def convert_to_megatron(
    hf_dir: str | os.PathLike,
    out: str | os.PathLike,
    *,
    gate_layout: str = "headwise",
    options: Options = Options(),
) -> None:
    """Write the checkpoint that Megatron's `--load OUT` takes, under any parallel layout.

    It is a "release" checkpoint: training starts at iteration 0 with a new optimizer state. It
    serves both transformer implementations.

    Args:
        hf_dir: folder in the published layout: config.json, safetensors.
        out: the folder to be made.
        gate_layout: "headwise" or "expanded", as the run that loads it will have.
        options: the rest.

    Raises:
        Step35ConfigError: config.json is unusable.
        CheckpointError: the weights are not those of the config; every problem is listed.
        ConversionError: NaN or Inf, no space, or `--check` found a difference.
        FileExistsError, OutputBusyError, OSError: see `Staging`.
    """
    source, target = Path(hf_dir), Path(out)
    _refuse_nesting([source], target)
    config = Step35Config.from_pretrained(source)
    folder = HfFolder(source, published_tensors(config))
    tensors = megatron_tensors(config, gate_layout)
    dtype = options.dtype or getattr(torch, config.torch_dtype)

    def dtype_of(tensor: MegatronTensor) -> torch.dtype:
        return torch.float32 if tensor.is_router_bias else dtype

    def size(tensor: MegatronTensor, chunk: Chunk) -> int:
        return math.prod(chunk.sizes) * dtype_of(tensor).itemsize

    pairs = [(tensor, chunk) for tensor in tensors for chunk in tensor.chunks]
    job = _job(source, target, options, config, folder.files(), _MEGATRON_MARKERS)
    job.plan |= {"to": "megatron", "gate_layout": gate_layout, "dtype": str(dtype)}
    job.block_bytes = 2 * max(size(*pair) for pair in pairs)

    def block(run: Run, box: Box | None = None) -> Tensor:
        return folder.block(run.name, run.start, run.num_elements)

    def write(part: Sequence[tuple], file: SummedFile, notes: dict[str, Any]) -> None:
        notes["places"] = []
        for tensor, chunk in part:
            blocks = []
            for run in chunk.runs:
                values = block(run).to(dtype_of(tensor))
                job.look_at(run.name, values, notes)
                if run.repeat > 1:
                    values = values.view(-1, run.row).repeat_interleave(run.repeat, dim=0).view(-1)
                blocks.append(values)
            # One run alone goes from the source's pages to the file as it is.
            whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            start = file.size
            torch_dist.save_record(whole.view(chunk.sizes), file)
            notes["places"].append((start, file.size - start))
            job.count(size(tensor, chunk))

    parts = split_into_files(
        pairs, [size(*p) for p in pairs], options.file_bytes or MEGATRON_FILE_BYTES
    )
    names = [f"{torch_dist.RELEASE}/__0_{n}.distcp" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        num_bytes = sum(size(*pair) for pair in part)
        job.files.append(OutputFile(name, num_bytes, _bind(write, part)))

    def finish(staging: Staging, notes: dict[str, dict]) -> None:
        empty = BytesIO()
        torch.save([torch.empty(0, dtype=torch.uint8)], empty)
        stored: dict[str, list] = {tensor.key: [] for tensor in tensors}
        for name, part in zip(names, parts):
            places = notes[name]["places"]
            for (tensor, chunk), place in zip(part, places, strict=True):
                where = (Path(name).name, *place)
                stored[tensor.key].append((chunk.offsets, chunk.sizes, where))
        written = [
            torch_dist.WrittenTensor(t.key, t.shape, dtype_of(t), tuple(stored[t.key]))
            for t in tensors
        ]
        place = (_EMPTY_STATES, 0, empty.getbuffer().nbytes)
        states = [(key, place) for key in extra_states(config)]
        small = {
            _EMPTY_STATES: empty.getvalue(),
            torch_dist.METADATA: torch_dist.metadata_bytes(written, states),
            torch_dist.FORMAT: json.dumps(torch_dist.FORMAT_CONTENT).encode(),
            torch_dist.COMMON: _common_state(config, gate_layout),
        }
        for name, data in small.items():
            staging.small_file(f"{torch_dist.RELEASE}/{name}", data)
        staging.small_file(torch_dist.TRACKER, torch_dist.RELEASE.encode())

    def compare(staged: Path) -> Iterator[str]:
        written = MegatronCheckpoint(staged, config)
        infos = published_tensors(config, hf_files.torch_dtype_name(dtype))
        yield from _differences(infos, written.runs, block, written.block)

    job.finish, job.compare = finish, compare
    run_job(job)


def _common_state(config: Step35Config, gate_layout: str) -> bytes:
    """What Megatron asks of a checkpoint besides weights, as it saves it."""
    args = Namespace(
        num_layers=config.num_hidden_layers,
        mtp_num_layers=config.num_nextn_predict_layers or None,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.intermediate_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_attention_groups,
        kv_channels=config.head_dim,
        num_experts=config.moe_num_experts,
        max_position_embeddings=config.max_position_embeddings,
        padded_vocab_size=config.vocab_size,
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        step35_fingerprint=config.fingerprint,
        step35_gate_layout=gate_layout,
    )
    state = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    }
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


# --- To Hugging Face ----------------------------------------------------------------------------


def convert_to_hf(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    hf_dir: str | os.PathLike,
    average_gate: bool = False,
    mtp_from: str | os.PathLike | None = None,
    options: Options = Options(),
) -> None:
    """Write a Megatron checkpoint in the published layout, for vLLM, SGLang and transformers.

    Args:
        checkpoint: what Megatron's `--load` takes (torch_dist, any parallel layout), or the folder
            of one iteration. Optimizer state is not read.
        out: the folder to be made: sharded safetensors, their index, config.json.
        hf_dir: folder with the model's config.json, and with the generation and tokenizer files,
            which are copied along; its weights are not read.
        average_gate: see `MegatronCheckpoint`.
        mtp_from: folder in the published layout from which the MTP layers are copied that the
            checkpoint lacks (`--mtp-num-layers`).
        options: the rest.

    Raises:
        DriftedGateError: rows of an expanded gate differ, and `average_gate` is not set.
        ValueError: `mtp_from` is missing, or is given and there is nothing to copy.
        For others see `convert_to_megatron`.
    """
    target, from_dir = Path(out), Path(hf_dir)
    _refuse_nesting([Path(p) for p in (checkpoint, hf_dir, mtp_from) if p is not None], target)
    config = Step35Config.from_pretrained(from_dir)
    source = MegatronCheckpoint(checkpoint, config, average_gate=average_gate)
    untrained = _untrained(source, mtp_from)
    if not average_gate:
        source.refuse_drifted_gates()
    dtype = options.dtype or source.dtype
    infos = published_tensors(config, hf_files.torch_dtype_name(dtype))
    runs = published_runs(megatron_tensors(config, source.gate_layout))
    copied = _files_to_copy(from_dir)
    inputs = [*source.files(), from_dir / "config.json", *copied]
    inputs += untrained.files() if untrained else []
    markers = (hf_files.INDEX, hf_files.SINGLE)
    job = _job(Path(checkpoint), target, options, config, inputs, markers)
    job.plan |= {"to": "hf", "average_gate": average_gate, "dtype": str(dtype)}
    run_bytes = max(run.rows * run.row for pairs in runs.values() for run, _ in pairs)
    job.block_bytes = 2 * run_bytes * dtype.itemsize

    def block(run: Run, box: Box) -> Tensor:
        if run.name in source.runs:
            return source.block(run, box)
        return untrained.block(run.name, run.start, run.num_elements)

    def write(part: Sequence[TensorInfo], file: SummedFile, notes: dict[str, Any]) -> None:
        file.write(hf_files.header(part))
        for info in part:
            for run, box in runs[info.name]:
                values = block(run, box).to(hf_files.DTYPES[info.dtype])
                job.look_at(info.name, values, notes)
                data = values.view(torch.uint8).numpy().data
                file.write(data)
                job.count(len(data))

    parts = split_into_files(
        infos, [i.num_bytes for i in infos], options.file_bytes or HF_SHARD_BYTES
    )
    names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        job.files.append(OutputFile(name, sum(info.num_bytes for info in part), _bind(write, part)))

    def finish(staging: Staging, notes: dict[str, dict]) -> None:
        for path in copied:
            staging.small_file(path.name, path.read_bytes())
        document = hf_files.config_document(config, dtype)
        staging.small_file("config.json", document)
        weight_map = {info.name: name for name, part in zip(names, parts) for info in part}
        index = hf_files.index_document(weight_map, sum(info.num_bytes for info in infos))
        staging.small_file(hf_files.INDEX, index)

    def compare(staged: Path) -> Iterator[str]:
        written = HfFolder(staged, infos)
        yield from _differences(
            infos,
            runs,
            block,
            lambda run, box: written.block(run.name, run.start, run.num_elements),
        )

    job.finish, job.compare = finish, compare
    if not source.folder.has_sums:
        job.notice = "the checkpoint was saved without check sums: damage to it would go unnoticed"
    run_job(job)


def _untrained(source: MegatronCheckpoint, mtp_from: str | os.PathLike | None) -> HfFolder | None:
    if bool(source.absent) != (mtp_from is not None):
        raise ValueError(
            f"mtp_from: the checkpoint lacks {len(source.absent)} tensors of the config's MTP "
            "layers; expected "
            + ("a folder to copy them from, found None" if source.absent else "None")
        )
    return HfFolder(mtp_from, published_tensors(source.config)) if source.absent else None


def _files_to_copy(folder: Path) -> list[Path]:
    """Tokenizer, generation config and whatever else is no weight; links are followed."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and not path.name.startswith(".")
        and not path.name.endswith(_WEIGHTS)
        and path.name != "config.json"
    )


# --- Both ---------------------------------------------------------------------------------------


def _job(source, target, options, config, inputs, markers) -> Job:
    plan = {
        "step35_patch": __version__,
        "torch": torch.__version__,
        "config": config.to_dict(),
        "file_bytes": options.file_bytes,
        "inputs": [
            [str(path.resolve()), stat.st_size, stat.st_mtime_ns]
            for path in inputs
            for stat in [path.stat()]
        ],
    }
    tensors = len(published_tensors(config))
    return Job(source, target, plan, markers, options, tensors, block_bytes=0)


def _refuse_nesting(sources: list[Path], target: Path) -> None:
    """An output in a source, around it or in its place could cost the source."""
    b = target.resolve()
    for source in sources:
        a = source.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ValueError(
                f"output: expected a place apart from the source {source}, found {target}"
            )


def _bind(write: Callable, part: Sequence) -> Callable[[SummedFile, dict[str, Any]], None]:
    return lambda file, notes: write(part, file, notes)


def _differences(
    infos: Sequence[TensorInfo],
    runs: dict[str, list[tuple[Run, Box]]],
    source: Callable[[Run, Box], Tensor],
    written: Callable[[Run, Box], Tensor],
) -> Iterator[str]:
    """The names of tensors that are not written as the source has them, in their dtypes."""
    for info in infos:
        dtype = hf_files.DTYPES[info.dtype]
        if not all(_same_bits(source(*pair).to(dtype), written(*pair)) for pair in runs[info.name]):
            yield info.name


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # As numbers, NaN would differ from itself and 0 not from -0.
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )
