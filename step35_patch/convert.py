"""The published checkpoint to Megatron's torch_dist format and back, in little memory.

Both directions copy runs of rows (`megatron_layout`) from memory-mapped files into new ones, a few
files at a time. Nothing needs a GPU or a process group. The output is staged (`staging`): it
appears whole or not at all, and a run that was killed is gone on with.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
import tempfile
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import step35_patch
from step35_patch import hf_files, torch_dist
from step35_patch.config import Step35Config
from step35_patch.hf_files import HfFolder
from step35_patch.inventory import TensorInfo, published_tensors
from step35_patch.megatron_layout import (
    Box,
    Chunk,
    MegatronTensor,
    Run,
    extra_states,
    megatron_tensors,
    published_runs,
)
from step35_patch.megatron_source import MegatronCheckpoint
from step35_patch.progress import Progress, peak_memory, readable_bytes, readable_seconds
from step35_patch.staging import Staging, SummedFile, check_target

DEFAULT_WORKERS = 2
# A torch_dist file is also what a resumed run takes up again, and what a worker has to itself.
MEGATRON_FILE_BYTES, HF_SHARD_BYTES = 2 * 10**9, 5 * 10**9
_EMPTY_STATES = "__0_0.distcp"
_MEGATRON_MARKERS = (f"{torch_dist.RELEASE}/{torch_dist.METADATA}",)
# Files of a folder in the published layout that are weights in some format, and not copied along.
_WEIGHTS = (".safetensors", ".index.json", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".npz")


class ConversionError(RuntimeError):
    """A conversion that can't be done, or was not; nothing is at the output."""


@dataclass(frozen=True)
class Options:
    """What both directions have in common.

    Attributes:
        dtype: of the written weights (routers' biases stay fp32); as they are by default.
        file_bytes: a file is closed before it would grow past this.
        workers: files that are written at a time.
        overwrite: replace a checkpoint at the output.
        check: read the output again before it appears, and compare it with the source.
        allow_nonfinite: go on with weights that are NaN or Inf.
        dry_run: only say what would be done.
    """

    dtype: torch.dtype | None = None
    file_bytes: int | None = None
    workers: int = DEFAULT_WORKERS
    overwrite: bool = False
    check: bool = False
    allow_nonfinite: bool = False
    dry_run: bool = False

    def __post_init__(self) -> None:
        for name in ("workers", "file_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, found {value}")


@dataclass
class _File:
    """A file of the output: its name, the bytes of its weights, and who writes it."""

    name: str
    num_bytes: int
    write: Callable[[SummedFile, dict[str, Any]], None]


@dataclass
class _Job:
    """One conversion.

    Attributes:
        source, target: folders.
        plan: see `Staging`.
        markers: see `Staging`.
        notice: what the user should know of the source.
        files: of weights.
        block_bytes: the most that one worker has in memory at a time, without mapped pages.
        finish: writes the small files, when those with weights are there.
        compare: yields the names of published tensors that are not the source's in a folder.
        tensors: published tensors.
    """

    source: Path
    target: Path
    plan: dict[str, Any]
    markers: tuple[str, ...]
    options: Options
    tensors: int
    block_bytes: int
    notice: str = ""
    files: list[_File] = field(default_factory=list)
    finish: Callable[[Staging, dict[str, dict]], None] = lambda staging, notes: None
    compare: Callable[[Path], Iterator[str]] = lambda folder: iter(())
    stop: threading.Event = field(default_factory=threading.Event)
    progress: Progress | None = None

    @property
    def num_bytes(self) -> int:
        return sum(file.num_bytes for file in self.files)

    def look_at(self, name: str, tensor: Tensor, notes: dict[str, Any]) -> None:
        """Note NaN and Inf in values to be written."""
        # A sum is NaN or Inf if one of its terms is; finite terms can only make it overflow.
        if not math.isfinite(tensor.sum()) and not torch.isfinite(tensor).all():
            notes.setdefault("nonfinite", [])
            if name not in notes["nonfinite"]:
                notes["nonfinite"].append(name)
                self.progress.say(f"{name}: has NaN or Inf")

    def count(self, num_bytes: int) -> None:
        """Tell of bytes that were written, and stop here if the run is to end."""
        self.progress.add(num_bytes)
        if self.stop.is_set():
            raise _Stopped


class _Stopped(Exception):
    """Another worker failed, or the user has had enough."""


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

    parts = _split(pairs, [size(*p) for p in pairs], options.file_bytes or MEGATRON_FILE_BYTES)
    names = [f"{torch_dist.RELEASE}/__0_{n}.distcp" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        num_bytes = sum(size(*pair) for pair in part)
        job.files.append(_File(name, num_bytes, _bind(write, part)))

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
        yield from _differences(written.runs, block, written.block, dtype)

    job.finish, job.compare = finish, compare
    _run(job)


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
    infos = [_with_dtype(info, dtype) for info in published_tensors(config)]
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

    parts = _split(infos, [i.num_bytes for i in infos], options.file_bytes or HF_SHARD_BYTES)
    names = [f"model-{n:05d}-of-{len(parts):05d}.safetensors" for n in range(1, len(parts) + 1)]
    for name, part in zip(names, parts):
        job.files.append(_File(name, sum(info.num_bytes for info in part), _bind(write, part)))

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
            runs,
            block,
            lambda run, box: written.block(run.name, run.start, run.num_elements),
            dtype,
        )

    job.finish, job.compare = finish, compare
    if not source.folder.has_sums:
        job.notice = "the checkpoint was saved without check sums: damage to it would go unnoticed"
    _run(job)


def _untrained(source: MegatronCheckpoint, mtp_from: str | os.PathLike | None) -> HfFolder | None:
    if bool(source.absent) != (mtp_from is not None):
        raise ValueError(
            f"mtp_from: the checkpoint lacks {len(source.absent)} tensors of the config's MTP "
            "layers; expected "
            + ("a folder to copy them from, found None" if source.absent else "None")
        )
    return HfFolder(mtp_from, published_tensors(source.config)) if source.absent else None


def _with_dtype(info: TensorInfo, dtype: torch.dtype) -> TensorInfo:
    # The router's bias is fp32 whatever the rest is.
    if info.name.endswith("moe.router_bias"):
        return info
    return TensorInfo(info.name, info.shape, hf_files.dtype_name(dtype))


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


def _job(source, target, options, config, inputs, markers) -> _Job:
    plan = {
        "step35_patch": step35_patch.__version__,
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
    return _Job(source, target, plan, markers, options, tensors, block_bytes=0)


def _refuse_nesting(sources: list[Path], target: Path) -> None:
    """An output in a source, around it or in its place could cost the source."""
    b = target.resolve()
    for source in sources:
        a = source.resolve()
        if a == b or a in b.parents or b in a.parents:
            raise ValueError(
                f"output: expected a place apart from the source {source}, found {target}"
            )


def _split(items: list, sizes: list[int], file_bytes: int) -> list[list]:
    """The items in order, in as many files as their sizes ask for."""
    parts: list[list] = []
    filled = 0
    for item, size in zip(items, sizes):
        if not parts or filled + size > file_bytes:
            parts.append([])
            filled = 0
        parts[-1].append(item)
        filled += size
    return parts


def _bind(write: Callable, part: Sequence) -> Callable[[SummedFile, dict[str, Any]], None]:
    return lambda file, notes: write(part, file, notes)


def _differences(
    runs: dict[str, list[tuple[Run, Box]]],
    source: Callable[[Run, Box], Tensor],
    written: Callable[[Run, Box], Tensor],
    dtype: torch.dtype,
) -> Iterator[str]:
    """The names of tensors that are not written as the source has them, in `dtype`."""
    for name, pairs in runs.items():
        wanted = torch.float32 if name.endswith("moe.router_bias") else dtype
        if not all(_same_bits(source(*pair).to(wanted), written(*pair)) for pair in pairs):
            yield name


def _same_bits(a: Tensor, b: Tensor) -> bool:
    # As numbers, NaN would differ from itself and 0 not from -0.
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)
    )


def _run(job: _Job) -> None:
    """Convert: write what is missing, check, publish and tell."""
    base, began = peak_memory(), time.monotonic()
    options = job.options
    check_target(job.target, options.overwrite, job.markers)
    job.progress = Progress(job.num_bytes)
    job.progress.say(_plan_text(job))
    if job.notice:
        job.progress.say(job.notice)
    if options.dry_run:
        _check_space(job, job.num_bytes)
        job.progress.say(_estimate(job))
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the workers are what runs side by side
    try:
        staging = Staging(job.target, job.plan, overwrite=options.overwrite, markers=job.markers)
        with _clear_errors(job, staging), staging:
            _say_what_is_there(job, staging)
            there = sum(file.num_bytes for file in job.files if staging.claims(file.name))
            _check_space(job, job.num_bytes - there)
            notes = _write_files(job, staging)
            job.progress.close()
            _refuse_nonfinite(job, notes)
            job.finish(staging, notes)
            if options.check:
                _check_output(job, staging)
            staging.publish()
    finally:
        torch.set_num_threads(threads)
    seconds = time.monotonic() - began
    job.progress.say(
        f"{job.target}: {job.tensors} tensors, {readable_bytes(job.num_bytes)} in "
        f"{len(job.files)} files, {seconds:.1f} s, {job.num_bytes / seconds / 1e9:.2f} GB/s, "
        f"peak memory {readable_bytes(peak_memory() - base)} above the start"
    )


def _plan_text(job: _Job) -> str:
    workers = min(job.options.workers, len(job.files))
    memory = workers * job.block_bytes + 2**28
    return (
        f"{job.source} -> {job.target}: {job.tensors} tensors, {readable_bytes(job.num_bytes)}, "
        f"{len(job.files)} files, {workers} at a time, about {readable_bytes(memory)} of memory"
    )


def _estimate(job: _Job) -> str:
    """The time that the bytes need at the rate at which the output's disk takes some."""
    place = _existing(job.target)
    free = shutil.disk_usage(place).free
    amount = min(2**28, free // 4)
    data = os.urandom(min(2**24, amount))
    began = time.monotonic()
    with tempfile.TemporaryFile(dir=place) as file:
        for _ in range(amount // max(len(data), 1)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
    rate = max(amount, 1) / (time.monotonic() - began)
    return (
        f"nothing is written (dry run); at {readable_bytes(rate)}/s, measured at the output, it "
        f"takes about {readable_seconds(job.num_bytes / rate)}"
    )


def _existing(path: Path) -> Path:
    """The innermost folder above a path that is there."""
    return next(parent for parent in path.resolve().parents if parent.exists())


def _check_space(job: _Job, needed: int) -> None:
    free = shutil.disk_usage(_existing(job.target)).free
    if needed > free:
        raise ConversionError(
            f"{job.target}: needs {readable_bytes(needed)} of disk space, free are "
            f"{readable_bytes(free)}; nothing was written"
        )


@contextlib.contextmanager
def _clear_errors(job: _Job, staging: Staging) -> Iterator[None]:
    """Say what is left and what to do with it when a run ends early."""

    def left() -> str:
        if staging.published:
            return "the output is in place"
        if not staging.keeps_files:
            return "nothing is left of it"
        return (
            f"finished files are in {staging.folder}: run the same command again to go on, or "
            "remove it"
        )

    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "no space left on the disk" if full else error
        raise ConversionError(f"{job.target}: {what}; {left()}") from error
    except KeyboardInterrupt:
        job.progress.say(f"stopped; {left()}")
        raise


def _say_what_is_there(job: _Job, staging: Staging) -> None:
    if staging.discarded:
        job.progress.say("what an earlier run left was made of other inputs or options; removed")
    elif staging.resumed:
        job.progress.say(f"going on with what an earlier run left in {staging.folder}")


def _write_files(job: _Job, staging: Staging) -> dict[str, dict]:
    """Write all files but those that an earlier run finished and that are whole; their notes."""
    notes: dict[str, dict] = {}
    taken_up = []

    def write(file: _File) -> None:
        if job.stop.is_set():
            raise _Stopped
        if (found := staging.finished(file.name)) is not None:
            taken_up.append(file.name)
            job.progress.skip(file.num_bytes)
        else:
            found = {}
            with staging.file(file.name, found) as out:
                file.write(out, found)
        # As they come back from a resumed run, so that nothing can depend on which it was.
        notes[file.name] = json.loads(json.dumps(found))

    with ThreadPoolExecutor(job.options.workers) as pool:
        futures = [pool.submit(write, file) for file in job.files]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            job.stop.set()
            pool.shutdown(cancel_futures=True)
    for future in futures:
        error = None if future.cancelled() else future.exception()
        if error is not None and not isinstance(error, _Stopped):
            raise error
    if taken_up:
        job.progress.say(
            f"going on: {len(taken_up)} of {len(job.files)} files were there and whole"
        )
    return notes


def _refuse_nonfinite(job: _Job, notes: dict[str, dict]) -> None:
    names = list(dict.fromkeys(n for note in notes.values() for n in note.get("nonfinite", ())))
    if names and not job.options.allow_nonfinite:
        raise ConversionError(
            f"{job.source}: NaN or Inf in {len(names)} tensors:\n  "
            + "\n  ".join(names)
            + "\nThe model is broken, or its values don't fit the dtype. --allow-nonfinite "
            "(allow_nonfinite=True) converts it as it is."
        )


def _check_output(job: _Job, staging: Staging) -> None:
    job.progress.say("checking: reading the output again")
    for file in job.files:
        with open(staging.out / file.name, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)  # from the disk
    if different := list(job.compare(staging.out)):
        staging.forget_files()
        raise ConversionError(
            f"{job.target}: not what the source holds:\n  "
            + "\n  ".join(different)
            + "\nThe disk or the memory lost data; the output was not put in place."
        )
    job.progress.say(f"checked: all {job.tensors} tensors are the source's, bit for bit")
