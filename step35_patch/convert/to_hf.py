"""Megatron's torch_dist checkpoints to the published layout."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from step35_patch.config.comparison import not_acceptable
from step35_patch.config.model import Step35Config
from step35_patch.convert import job
from step35_patch.convert.conversion import (
    DEFAULT_OPTIONS,
    AnyPath,
    Conversion,
    Notes,
    Options,
    OutputFile,
    Sink,
    differing,
    refuse_nesting,
    split,
)
from step35_patch.storage import hf_description, hf_folder
from step35_patch.storage.hf_folder import DTYPES, HfFolder
from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint
from step35_patch.storage.staging import Staging
from step35_patch.tensors.megatron import Box, Run, megatron_tensors, published_runs
from step35_patch.tensors.published import TensorInfo, published_tensors

SHARD_BYTES = 5 * 10**9


def convert_to_hf(
    checkpoint: AnyPath,
    out: AnyPath,
    *,
    hf_dir: AnyPath,
    average_gate: bool = False,
    mtp_from: AnyPath | None = None,
    without_mtp: bool = False,
    accept_changed: Collection[str] = (),
    options: Options = DEFAULT_OPTIONS,
) -> None:
    """Write a Megatron checkpoint in the published layout, for vLLM, SGLang and transformers.

    While it runs, torch's number of threads (`torch.set_num_threads`) is 1 in the whole process.

    Args:
        checkpoint: what Megatron's `--load` takes (torch_dist, any parallel layout), or the folder
            of one iteration. Optimizer state is not read.
        out: the folder to be made: sharded safetensors, their index, config.json.
        hf_dir: folder with the model's config.json, and with the generation and tokenizer files,
            which are copied along; its weights are not read, and what describes their bytes
            (quantisation, dtype, the model card) does not come along.
        average_gate: see `MegatronCheckpoint`.
        mtp_from: folder in the published layout from which the MTP layers are copied that the
            checkpoint lacks (`--mtp-num-layers`).
        without_mtp: leave the MTP layers out, whether the checkpoint has them or not; config.json
            has num_nextn_predict_layers 0.
        accept_changed: names of fields in which hf_dir's config may differ from the one that the
            checkpoint was saved with: what is written has hf_dir's.
        options: the rest.

    Raises:
        DriftedGateError: rows of an expanded gate differ, and `average_gate` is not set.
        ValueError: MTP layers are missing and neither `mtp_from` nor `without_mtp` is given; or
            `mtp_from` is given and there is nothing to copy; or `accept_changed` has a field that
            decides what the weights are.
        Step35ConfigError, CheckpointError, ConversionError, FileExistsError, OutputBusyError,
            OSError: see `convert_to_megatron`.
    """
    job.run(
        ToHf(
            Path(checkpoint),
            Path(out),
            hf_dir=Path(hf_dir),
            average_gate=average_gate,
            mtp_from=None if mtp_from is None else Path(mtp_from),
            without_mtp=without_mtp,
            accept_changed=accept_changed,
            options=options,
        )
    )


class ToHf(Conversion[TensorInfo]):
    """Writes published tensors, in the order of `published_tensors`.

    Args and errors: see `convert_to_hf`.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        *,
        hf_dir: Path,
        average_gate: bool,
        mtp_from: Path | None,
        without_mtp: bool,
        accept_changed: Collection[str],
        options: Options,
    ):
        refuse_nesting([source, hf_dir, *([] if mtp_from is None else [mtp_from])], target)
        if problems := not_acceptable(accept_changed, "accept_changed"):
            raise ValueError("\n".join(map(str, problems)))
        config = Step35Config.from_pretrained(hf_dir)
        self._checkpoint = MegatronCheckpoint(
            source, config, average_gate=average_gate, accept_changed=accept_changed
        )
        self._untrained = _untrained(self._checkpoint, mtp_from, without_mtp)
        if not average_gate:
            self._checkpoint.refuse_drifted_gates()
        self._dtype = dtype = options.dtype or self._checkpoint.dtype
        # What is written of the checkpoint, whose own config stays that of its keys.
        self._written = config.without_mtp() if without_mtp else config
        self._infos = published_tensors(self._written, hf_description.torch_dtype_name(dtype))
        tensors = megatron_tensors(self._written, self._checkpoint.gate_layout)
        self._runs = published_runs(tensors)
        self._copied = hf_description.files_to_copy(hf_dir)
        inputs = [*self._checkpoint.files(), hf_dir / "config.json", *self._copied]
        if self._untrained is not None:
            inputs += self._untrained.files()
        files = split(self._infos, lambda info: info.num_bytes, options.file_bytes or SHARD_BYTES)
        largest_run = max(run.rows * run.row for pairs in self._runs.values() for run, _ in pairs)
        super().__init__(
            source,
            target,
            options,
            config=config,
            inputs=inputs,
            plan={
                "to": "hf",
                "average_gate": average_gate,
                "dtype": str(dtype),
                "without_mtp": without_mtp,
            },
            tensors=len(self._infos),
            markers=(hf_folder.INDEX, hf_folder.SINGLE),
            files=[
                OutputFile(f"model-{n:05d}-of-{len(files):05d}.safetensors", items, num_bytes)
                for n, (items, num_bytes) in enumerate(files, 1)
            ],
            block_bytes=2 * largest_run * dtype.itemsize,
            notice="\n".join(self._notices()),
        )

    def _notices(self) -> Iterator[str]:
        for line in self._checkpoint.accepted:
            yield f"accepted: {line}"
        if not self._checkpoint.folder.has_sums:
            yield "the checkpoint was saved without check sums: damage to it would go unnoticed"

    def _block(self, run: Run, box: Box) -> Tensor:
        if self._untrained is not None and run.name not in self._checkpoint.runs:
            return self._untrained.block(run.name, run.start, run.num_elements)
        return self._checkpoint.block(run, box)

    def write(self, items: Sequence[TensorInfo], sink: Sink) -> None:
        """Fill a file: the header, then the tensors' runs."""
        sink.file.write(hf_folder.header(items))
        for info in items:
            for run, box in self._runs[info.name]:
                values = self._block(run, box).to(DTYPES[info.dtype])
                sink.look_at(info.name, values)
                data = values.view(torch.uint8).numpy().data
                sink.file.write(data)
                sink.count(len(data))

    def finish(self, staging: Staging, notes: Mapping[str, Notes]) -> None:
        """Copy what is no weight, and write config.json and the index."""
        for path in self._copied:
            staging.small_file(path.name, path.read_bytes())
        beside = {path.name for path in self._copied}
        config = hf_description.config_document(self._written, self._dtype, beside)
        staging.small_file("config.json", config)
        weight_map = {info.name: file.name for file in self.files for info in file.items}
        index = hf_description.index_document(weight_map, self.num_bytes)
        staging.small_file(hf_folder.INDEX, index)

    def differences(self, folder: Path) -> Iterator[str]:
        """The published tensors that a folder with the output does not hold as the source does."""
        name = hf_description.torch_dtype_name(self._dtype)
        written = HfFolder(folder, self._written, torch_dtype=name)

        def block(run: Run, box: Box) -> Tensor:
            return written.block(run.name, run.start, run.num_elements)

        return differing(self._infos, self._runs, self._block, block)


def _untrained(
    checkpoint: MegatronCheckpoint, mtp_from: Path | None, without_mtp: bool
) -> HfFolder | None:
    """The folder that the MTP layers come from that a checkpoint lacks; None if none is needed."""
    if without_mtp:
        if mtp_from is not None:
            raise ValueError(f"mtp_from: expected None with without_mtp, found {mtp_from}")
        return None
    absent = len(checkpoint.absent)
    if mtp_from is not None and absent:
        return HfFolder(mtp_from, checkpoint.config)
    if mtp_from is None and not absent:
        return None
    raise ValueError(
        f"mtp_from: the checkpoint lacks {absent} tensors of the config's MTP layers; expected "
        + (
            "a folder to copy them from (--mtp-from, mtp_from), found None; or leave the MTP "
            "layers out with --without-mtp (without_mtp=True)"
            if absent
            else "None"
        )
    )
