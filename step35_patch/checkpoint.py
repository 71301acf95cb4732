"""Weights between a live Megatron model and the published Hugging Face layout.

`_entries` says, once, which parameter of the model stands for which published tensors and how;
loading and saving both follow it. Each rank reads only what its own parameters need; saving gathers
tensor- and expert-parallel parts and lets one rank of each pipeline stage write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from megatron.core import parallel_state
from torch import Tensor

from step35_patch.model.description import Step35Runtime, runtime_for
from step35_patch.model.layer import Step35DecoderLayer
from step35_patch.model.mtp import OUTPUT_LAYERS
from step35_patch.storage import hf_folder as hf_files
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import HfFolder, ShardWriter
from step35_patch.tensors.published import published_tensors
from step35_patch.tensors.qkv import pack_qkv, unpack_qkv

DEFAULT_SHARD_BYTES = 5 * 10**9


@dataclass(frozen=True)
class _Entry:
    """One parameter (or buffer) of the model and its published tensors.

    load: reads this rank's part from the folder, in the parameter's shape.
    save: yields the published tensors; it is called on all ranks of the tensor- and
        expert-parallel groups, because it gathers.
    """

    parameter: Tensor
    load: Callable[[HfFolder], Tensor]
    save: Callable[[], Iterator[tuple[str, Tensor]]]


def _share(tensor: Tensor, dim: int, rank: int, size: int) -> Tensor:
    return tensor.chunk(size, dim=dim)[rank]


def _gather(tensor: Tensor, dim: int, group) -> Tensor:
    """The whole tensor from the parts of a group's ranks, along `dim`."""
    if group is None or group.size() == 1:
        return tensor.detach()
    parts = [torch.empty_like(tensor) for _ in range(group.size())]
    torch.distributed.all_gather(parts, tensor.detach().contiguous(), group=group)
    return torch.cat(parts, dim=dim)


class _ModelMap:
    """The entries of one model chunk."""

    def __init__(self, model: torch.nn.Module, runtime: Step35Runtime):
        self.model, self.runtime = model, runtime
        self.gate_layout = runtime.gate_layout if runtime.config.use_head_wise_attn_gate else None
        self.tp = model.pg_collection.tp
        self.rank, self.size = self.tp.rank(), self.tp.size()

    def entries(self) -> Iterator[_Entry]:
        model, runtime = self.model, self.runtime
        if hasattr(model, "embedding"):
            yield self._vocabulary(
                model.embedding.word_embeddings.weight, "model.embed_tokens.weight"
            )
        for layer in model.decoder.layers:
            yield from self._layer(layer)
        if model.decoder.final_layernorm is not None:
            yield self._whole(model.decoder.final_layernorm.weight, "model.norm.weight")
        if model.post_process:
            yield self._vocabulary(model.output_layer.weight, "lm_head.weight")
            first = runtime.config.num_hidden_layers
            for depth, head in getattr(model, OUTPUT_LAYERS, torch.nn.Module()).named_children():
                name = f"model.layers.{first + int(depth)}.transformer.shared_head.output.weight"
                yield self._vocabulary(head.weight, name)
        for mtp in model.mtp.layers if getattr(model, "mtp_process", False) else ():
            inner = mtp.mtp_model_layer
            prefix = f"model.layers.{inner.plan.index}."
            yield self._whole(mtp.enorm.weight, prefix + "enorm.weight")
            yield self._whole(mtp.hnorm.weight, prefix + "hnorm.weight")
            yield self._split(mtp.eh_proj.weight, prefix + "eh_proj.weight", dim=0)
            norm = prefix + "transformer.shared_head.norm.weight"
            yield self._whole(mtp.final_layernorm.weight, norm)
            yield from self._layer(inner)

    def _layer(self, layer: Step35DecoderLayer) -> Iterator[_Entry]:
        prefix = f"model.layers.{layer.plan.index}."
        attention = layer.self_attention
        # Transformer Engine keeps a norm in the linear layer behind it.
        yield self._norm(layer.input_layernorm, attention.linear_qkv, prefix + "input_layernorm")
        yield self._qkv(layer, prefix + "self_attn.")
        for name in ("q", "k"):
            norm = getattr(attention, f"{name}_layernorm")
            yield self._whole(norm.weight, f"{prefix}self_attn.{name}_norm.weight")
        yield self._split(attention.linear_proj.weight, prefix + "self_attn.o_proj.weight", dim=1)
        mlp = layer.mlp
        norm_name = prefix + "post_attention_layernorm"
        if not layer.plan.is_moe:
            yield self._norm(layer.pre_mlp_layernorm, mlp.linear_fc1, norm_name)
            yield from self._mlp(mlp, prefix + "mlp.")
            return
        yield self._whole(layer.pre_mlp_layernorm.weight, norm_name + ".weight")
        yield self._whole(mlp.router.weight, prefix + "moe.gate.weight")
        yield self._whole(mlp.router.expert_bias, prefix + "moe.router_bias")
        yield from self._mlp(mlp.shared_experts, prefix + "share_expert.")
        yield from self._experts(mlp, prefix + "moe.")

    def _norm(self, norm: torch.nn.Module, fused: torch.nn.Module, name: str) -> _Entry:
        weight = norm.weight if hasattr(norm, "weight") else fused.layer_norm_weight
        return self._whole(weight, name + ".weight")

    def _whole(self, parameter: Tensor, name: str) -> _Entry:
        """The same tensor on every tensor-parallel rank."""
        return _Entry(
            parameter, lambda folder: folder.get(name), lambda: iter([(name, parameter.detach())])
        )

    def _split(self, parameter: Tensor, name: str, dim: int) -> _Entry:
        """Split along `dim` over the tensor-parallel ranks."""

        def load(folder: HfFolder) -> Tensor:
            return _share(folder.get(name), dim, self.rank, self.size)

        def save() -> Iterator[tuple[str, Tensor]]:
            yield name, _gather(parameter, dim, self.tp)

        return _Entry(parameter, load, save)

    def _vocabulary(self, parameter: Tensor, name: str) -> _Entry:
        """Split by rows, which Megatron-Core pads; the padding is zero and is not published."""
        vocab_size = self.runtime.config.vocab_size

        def load(folder: HfFolder) -> Tensor:
            rows = parameter.shape[0]
            part = folder.get(name, slice(self.rank * rows, (self.rank + 1) * rows))
            return torch.cat([part, part.new_zeros(rows - part.shape[0], part.shape[1])])

        def save() -> Iterator[tuple[str, Tensor]]:
            yield name, _gather(parameter, 0, self.tp)[:vocab_size]

        return _Entry(parameter, load, save)

    def _qkv(self, layer: Step35DecoderLayer, prefix: str) -> _Entry:
        attention, plan = layer.self_attention, layer.plan
        parameter = attention.linear_qkv.weight
        letters = "qkvg" if self.gate_layout else "qkv"
        names = [f"{prefix}{letter}_proj.weight" for letter in letters]

        def load(folder: HfFolder) -> Tensor:
            q, k, v, *g = (folder.get(name) for name in names)
            whole = pack_qkv(q, k, v, g[0] if g else None, plan, self.gate_layout)
            return _share(whole, 0, self.rank, self.size)

        def save() -> Iterator[tuple[str, Tensor]]:
            if attention.tied_gate:
                attention.tie_gate_rows()
            whole = _gather(parameter, 0, self.tp)
            yield from zip(names, unpack_qkv(whole, plan, self.gate_layout, prefix + "linear_qkv"))

        return _Entry(parameter, load, save)

    def _mlp(self, mlp: torch.nn.Module, prefix: str) -> Iterator[_Entry]:
        """A dense MLP or the shared expert; each rank's linear_fc1 is [its gate | its up]."""
        fc1 = mlp.linear_fc1.weight
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]

        def load(folder: HfFolder) -> Tensor:
            parts = (_share(folder.get(name), 0, self.rank, self.size) for name in names)
            return torch.cat(list(parts))

        def save() -> Iterator[tuple[str, Tensor]]:
            for name, part in zip(names, fc1.chunk(2)):
                yield name, _gather(part, 0, self.tp)

        yield _Entry(fc1, load, save)
        yield self._split(mlp.linear_fc2.weight, prefix + "down_proj.weight", dim=1)

    def _experts(self, moe: torch.nn.Module, prefix: str) -> Iterator[_Entry]:
        """The routed experts of this rank; published as one tensor for all experts."""
        experts, groups = moe.experts, self.model.pg_collection
        etp, ep = groups.expt_tp, groups.ep
        ids = moe.local_expert_indices
        names = [prefix + "gate_proj.weight", prefix + "up_proj.weight"]
        down = prefix + "down_proj.weight"

        def weight(linear: str, position: int) -> Tensor:
            if hasattr(experts, "local_experts"):
                return getattr(experts.local_experts[position], linear).weight
            return getattr(getattr(experts, linear), f"weight{position}")

        def nothing() -> Iterator[tuple[str, Tensor]]:
            return iter(())

        def save_all() -> Iterator[tuple[str, Tensor]]:
            fc1 = torch.stack([weight("linear_fc1", i) for i in range(len(ids))])
            for name, part in zip(names, fc1.chunk(2, dim=1)):
                yield name, _gather(_gather(part, 1, etp), 0, ep)
            fc2 = torch.stack([weight("linear_fc2", i) for i in range(len(ids))])
            yield down, _gather(_gather(fc2, 2, etp), 0, ep)

        for position, expert in enumerate(ids):

            def load_fc1(folder: HfFolder, expert=expert) -> Tensor:
                parts = (folder.get(name, expert) for name in names)
                return torch.cat([_share(part, 0, etp.rank(), etp.size()) for part in parts])

            def load_fc2(folder: HfFolder, expert=expert) -> Tensor:
                return _share(folder.get(down, expert), 1, etp.rank(), etp.size())

            # All experts make up one published tensor: the first entry saves it.
            save = save_all if position == 0 else nothing
            yield _Entry(weight("linear_fc1", position), load_fc1, save)
            yield _Entry(weight("linear_fc2", position), load_fc2, nothing)


def _chunks(model) -> list[tuple[torch.nn.Module, Step35Runtime]]:
    """The bare GPTModels of a model or list of model chunks, each with its runtime."""
    chunks = []
    for chunk in model if isinstance(model, (list, tuple)) else [model]:
        while hasattr(chunk, "module"):  # DistributedDataParallel, Float16Module
            chunk = chunk.module
        runtime = runtime_for(chunk.config)
        if runtime is None:
            raise ValueError(
                "expected a Step-3.5 model, found a GPTModel whose TransformerConfig is none; "
                "build it with step35_patch active"
            )
        chunks.append((chunk, runtime))
    return chunks


def _check_covered(model: torch.nn.Module, entries: list[_Entry]) -> None:
    """Every parameter and router bias must have an entry: none may keep its random start."""
    known = {id(entry.parameter) for entry in entries}
    forgotten = [name for name, value in model.named_parameters() if id(value) not in known]
    if forgotten:
        raise ValueError(
            "parameters of the model that the published layout does not have:\n  "
            + "\n  ".join(forgotten)
        )


def entries_of(model: torch.nn.Module, runtime: Step35Runtime) -> list[_Entry]:
    """Every parameter and router bias of one model chunk, with its published tensors.

    Raises:
        ValueError: the model has a parameter that the published layout does not have.
    """
    entries = list(_ModelMap(model, runtime).entries())
    _check_covered(model, entries)
    return entries


def published_tensors_of(model) -> Iterator[tuple[str, Tensor]]:
    """The model's weights in the published layout, one (name, whole tensor) after the other.

    Collective over the tensor- and expert-parallel groups; each pipeline stage yields its own
    layers' tensors, the one with the MTP layers its copy of the embedding besides.

    Args:
        model: as for `load_hf_weights`.
    """
    for chunk, runtime in _chunks(model):
        for entry in entries_of(chunk, runtime):
            yield from entry.save()


def load_hf_weights(model, hf_dir: str | os.PathLike) -> None:
    """Fill a model with the weights of a folder in the published layout.

    Args:
        model: a GPTModel of Step-3.5, wrapped or not, or the list of its model chunks, under any
            tensor-, pipeline-, virtual-pipeline- and expert-parallel layout.
        hf_dir: folder with safetensors whose tensors are those of the model's config, with its
            shapes and dtypes. Values are converted to the parameters' dtypes.

    Raises:
        CheckpointError: the files are not that; everything wrong is listed, and no parameter has
            been changed.
    """
    chunks = _chunks(model)
    folder = HfFolder(hf_dir, published_tensors(chunks[0][1].config))
    for chunk, runtime in chunks:
        entries = entries_of(chunk, runtime)
        with torch.no_grad():
            for entry in entries:
                entry.parameter.copy_(entry.load(folder))


def save_hf_weights(
    model,
    out_dir: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    mtp_from: str | os.PathLike | None = None,
) -> None:
    """Write a model's weights as a folder in the published layout.

    The folder holds sharded safetensors, their index and a config.json. It is built beside
    `out_dir` and renamed when it is whole. Collective: call it on every rank; ranks of one
    data-parallel group hold the same weights, and the first writes.

    Args:
        model: as for `load_hf_weights`.
        out_dir: a folder that does not exist yet.
        dtype: of the written tensors (router_bias stays fp32); the parameters' own by default.
            config.json names it.
        max_shard_bytes: a file is closed before it would grow past this many bytes.
        mtp_from: where the model has fewer MTP layers than its config (`mtp_num_layers`): the
            folder in the published layout, usually the one that was loaded, from which the others
            are copied as they are.

    Raises:
        FileExistsError: `out_dir` exists.
        ValueError: `mtp_from` is missing, or is given and there is nothing to copy.
        CheckpointError: `mtp_from` is not a checkpoint of the model's config.
        OSError: writing failed; nothing is left at `out_dir`.
    """
    chunks = _chunks(model)
    config = chunks[0][1].config
    target = Path(out_dir)
    untrained = _untrained_mtp_layers(chunks[0][0], config, mtp_from)
    dtype = dtype or next(chunks[0][0].parameters()).dtype
    hf_files.dtype_name(dtype)  # refuses one that weights don't come in
    staged, error = _first_rank_does(lambda: hf_files.staging_folder(target))
    try:
        if error is not None:
            raise error
        problem: BaseException | None = None
        weight_map, size = {}, 0
        try:
            weight_map, size = _write(model, staged, dtype, max_shard_bytes, untrained)
        except Exception as caught:  # every rank must get to the collective below
            problem = caught
        results = _all_ranks((weight_map, size, problem))
        if problems := [found for _, _, found in results if found is not None]:
            raise problems[0]

        def finish() -> None:
            whole = {name: file for part, _, _ in results for name, file in part.items()}
            _check_complete(target, config, whole)
            index = hf_files.index_document(whole, sum(size for _, size, _ in results))
            (staged / hf_files.INDEX).write_bytes(index)
            (staged / "config.json").write_bytes(hf_files.config_document(config, dtype))
            hf_files.publish(staged, target)

        _, error = _first_rank_does(finish)
        if error is not None:
            raise error
    except BaseException:
        if staged is not None and _is_first_rank():
            hf_files.discard(staged)
        raise


def _untrained_mtp_layers(model, config, mtp_from) -> dict[str, HfFolder]:
    """The tensors of MTP layers that the model does not have, and the folder to copy them from."""
    built = model.config.mtp_num_layers or 0
    prefixes = tuple(
        f"model.layers.{config.num_hidden_layers + depth}."
        for depth in range(built, config.num_nextn_predict_layers)
    )
    names = [info.name for info in published_tensors(config) if info.name.startswith(prefixes)]
    if bool(names) != (mtp_from is not None):
        raise ValueError(
            f"mtp_from: the model has {built} of the config's {config.num_nextn_predict_layers} "
            "MTP layers; expected "
            + ("a folder to copy the others from, found None" if names else "None")
        )
    if not names:
        return {}
    folder = HfFolder(mtp_from, published_tensors(config))
    return dict.fromkeys(names, folder)


def _write(
    model, staged: Path, dtype: torch.dtype, max_bytes: int, untrained: dict[str, HfFolder]
) -> tuple[dict[str, str], int]:
    """Gather this pipeline stage's tensors; the stage's first rank writes them.

    The last stage writes the tensors of `untrained` besides.
    """
    writes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    writer = ShardWriter(staged, f"model-{stage + 1:05d}", max_bytes)
    for name, tensor in published_tensors_of(model):
        # A later stage with MTP layers has a copy of the embedding; the first one publishes it.
        if writes and not (name == "model.embed_tokens.weight" and stage > 0):
            keeps = name.endswith("moe.router_bias")
            writer.add(name, tensor.float() if keeps else tensor.to(dtype))
    if writes and parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        for name, folder in untrained.items():
            writer.add(name, folder.get(name).to(dtype))
    writer.flush()
    return writer.weight_map, writer.bytes


def _check_complete(target: Path, config, weight_map: dict[str, str]) -> None:
    expected = {info.name for info in published_tensors(config)}
    if lost := sorted(expected ^ set(weight_map)):
        raise CheckpointError(target, [f"{name}: not written" for name in lost])


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _first_rank_does(action: Callable):
    """Run `action` on rank 0; every rank gets (its result, the exception or None)."""
    outcome = [None, None]
    if _is_first_rank():
        try:
            outcome[0] = action()
        except Exception as error:
            outcome[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    return outcome


def _all_ranks(value) -> list:
    if not torch.distributed.is_initialized():
        return [value]
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
