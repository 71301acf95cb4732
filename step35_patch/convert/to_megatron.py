"""The published checkpoint to Megatron's torch_dist format."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path

import torch
from torch import Tensor

from step35_patch.config.comparison import recorded
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
from step35_patch.storage import torch_dist
from step35_patch.storage.hf_description import torch_dtype_name
from step35_patch.storage.hf_folder import DTYPES, Accepted, HfFolder
from step35_patch.storage.megatron_checkpoint import MegatronCheckpoint
from step35_patch.storage.staging import Staging
from step35_patch.tensors.megatron import (
    Box,
    Chunk,
    MegatronTensor,
    Run,
    extra_states,
    megatron_tensors,
)
from step35_patch.tensors.published import SAFETENSORS_DTYPES, published_tensors

# A file is also what a resumed run need not write again, and what a worker has to itself.
FILE_BYTES = 2 * 10**9
_EMPTY_STATES = "__0_0.distcp"

type _Part = tuple[MegatronTensor, Chunk]
# Offsets and sizes of a chunk, and its record's file, offset and length.
type _Stored = tuple[tuple[int, ...], tuple[int, ...], tuple[str, int, int]]


def convert_to_megatron(
    hf_dir: AnyPath,
    out: AnyPath,
    *,
    gate_layout: str = "headwise",
    without_mtp: bool = False,
    accept_rounded_router_bias: bool = False,
    dequantize_fp8: bool = False,
    options: Options = DEFAULT_OPTIONS,
) -> None:
    """Write the checkpoint that Megatron's `--load OUT` takes, under any parallel layout.

    It is a "release" checkpoint: training starts at iteration 0 with a new optimizer state. It
    serves both transformer implementations.

    While it runs, torch's number of threads (`torch.set_num_threads`) is 1 in the whole process.

    Args:
        hf_dir: folder in the published layout, or one of transformers' `save_pretrained`:
            config.json, safetensors. A vision model's tensors in it are left alone.
        out: the folder to be made.
        gate_layout: "headwise" or "expanded", as the run that loads it will have.
        without_mtp: leave the MTP layers out, which the folder then need not have. A run with
            `--mtp-num-layers 0` needs no such checkpoint, but loads it.
        accept_rounded_router_bias: take routers' biases that were rounded to bf16 or fp16 when
            they were saved, as transformers does.
        dequantize_fp8: take weights in FP8 with block scales (`quant_method` fp8 with a
            `weight_block_size`): each is (fp8.float() * scale_inv of its block), rounded to the
            config's torch_dtype.
        options: the rest.

    Raises:
        Step35ConfigError: config.json is unusable.
        CheckpointError: the weights are not those of the config; every problem is listed, and
            the argument with which it goes.
        ConversionError: NaN or Inf, no space, or `--check` found a difference.
        FileExistsError, OutputBusyError, OSError: see `Staging`.
    """
    job.run(
        ToMegatron(
            Path(hf_dir),
            Path(out),
            gate_layout,
            without_mtp=without_mtp,
            accept=Accepted(accept_rounded_router_bias, dequantize_fp8),
            options=options,
        )
    )


class ToMegatron(Conversion[_Part]):
    """Writes chunks of Megatron's tensors, in the order of `megatron_tensors`.

    Args and errors: see `convert_to_megatron`.
    """

    def __init__(
        self,
        source: Path,
        target: Path,
        gate_layout: str,
        *,
        without_mtp: bool,
        accept: Accepted,
        options: Options,
    ):
        refuse_nesting([source], target)
        config = Step35Config.from_pretrained(source)
        self._mtp_layers = 0 if without_mtp else config.num_nextn_predict_layers
        self._folder = HfFolder(source, config, mtp_layers=self._mtp_layers, accept=accept)
        self._tensors = megatron_tensors(config, gate_layout, mtp_layers=self._mtp_layers)
        self._gate_layout = gate_layout
        self._dtype = options.dtype or DTYPES[SAFETENSORS_DTYPES[config.torch_dtype]]
        parts = [(tensor, chunk) for tensor in self._tensors for chunk in tensor.chunks]
        files = split(parts, self._num_bytes, options.file_bytes or FILE_BYTES)
        super().__init__(
            source,
            target,
            options,
            config=config,
            inputs=self._folder.files(),
            plan={
                "to": "megatron",
                "gate_layout": gate_layout,
                "dtype": str(self._dtype),
                "mtp_layers": self._mtp_layers,
                "fp8_block": self._folder.fp8_block,
            },
            tensors=len(published_tensors(config, mtp_layers=self._mtp_layers)),
            markers=(f"{torch_dist.RELEASE}/{torch_dist.METADATA}",),
            files=[
                OutputFile(f"{torch_dist.RELEASE}/__0_{number}.distcp", items, num_bytes)
                for number, (items, num_bytes) in enumerate(files, 1)
            ],
            block_bytes=2 * max(map(self._num_bytes, parts)),
            notice="\n".join(self._folder.notices),
        )

    def _dtype_of(self, tensor: MegatronTensor) -> torch.dtype:
        return torch.float32 if tensor.is_router_bias else self._dtype

    def _num_bytes(self, part: _Part) -> int:
        tensor, chunk = part
        return math.prod(chunk.sizes) * self._dtype_of(tensor).itemsize

    def _block(self, run: Run, box: Box | None = None) -> Tensor:
        return self._folder.block(run.name, run.start, run.num_elements)

    def write(self, items: Sequence[_Part], sink: Sink) -> None:
        """Fill a file with a record for each chunk, and note where each stands."""
        places = sink.notes["places"] = []
        for tensor, chunk in items:
            blocks = []
            for run in chunk.runs:
                values = self._block(run).to(self._dtype_of(tensor))
                sink.look_at(run.name, values)
                if run.repeat > 1:
                    values = values.view(-1, run.row).repeat_interleave(run.repeat, dim=0).view(-1)
                blocks.append(values)
            # One run alone goes from the source's pages to the file as it is.
            whole = blocks[0] if len(blocks) == 1 else torch.cat(blocks)
            start = sink.file.size
            torch_dist.save_record(whole.view(chunk.sizes), sink.file)
            places.append((start, sink.file.size - start))
            sink.count(self._num_bytes((tensor, chunk)))

    def finish(self, staging: Staging, notes: Mapping[str, Notes]) -> None:
        """Write the metadata, the empty states, the common state and the tracker."""
        buffer = BytesIO()
        torch.save([torch.empty(0, dtype=torch.uint8)], buffer)
        empty = buffer.getvalue()
        place = (_EMPTY_STATES, 0, len(empty))
        states = [(key, place) for key in extra_states(self.config, mtp_layers=self._mtp_layers)]
        small = {
            _EMPTY_STATES: empty,
            torch_dist.METADATA: torch_dist.metadata_bytes(self._written(notes), states),
            torch_dist.FORMAT: json.dumps(torch_dist.FORMAT_CONTENT).encode(),
            torch_dist.COMMON: self._common_state(),
        }
        for name, data in small.items():
            staging.small_file(f"{torch_dist.RELEASE}/{name}", data)
        staging.small_file(torch_dist.TRACKER, torch_dist.RELEASE.encode())

    def _written(self, notes: Mapping[str, Notes]) -> list[torch_dist.WrittenTensor]:
        stored: dict[str, list[_Stored]] = {t.key: [] for t in self._tensors}
        for file in self.files:
            places = notes[file.name]["places"]
            for (tensor, chunk), (start, length) in zip(file.items, places, strict=True):
                place = (Path(file.name).name, start, length)
                stored[tensor.key].append((chunk.offsets, chunk.sizes, place))
        return [
            torch_dist.WrittenTensor(t.key, t.shape, self._dtype_of(t), tuple(stored[t.key]))
            for t in self._tensors
        ]

    def _common_state(self) -> bytes:
        """What Megatron asks of a checkpoint besides weights, as it saves it."""
        config = self.config
        args = Namespace(
            num_layers=config.num_hidden_layers,
            mtp_num_layers=self._mtp_layers or None,
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
            step35_gate_layout=self._gate_layout,
            **recorded(config),
        )
        state = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 0,
            "content_metadata": {
                "singleton_local_shards": False,
                "chained_optim_avoid_prefix": True,
            },
        }
        buffer = BytesIO()
        torch.save(state, buffer)
        return buffer.getvalue()

    def differences(self, folder: Path) -> Iterator[str]:
        """The published tensors that a folder with the output does not hold as the source does."""
        written = MegatronCheckpoint(folder, self.config)
        name = torch_dtype_name(self._dtype)
        infos = published_tensors(self.config, name, mtp_layers=self._mtp_layers)
        return differing(infos, written.runs, self._block, written.block)
