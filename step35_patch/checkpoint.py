"""Weights between a live Megatron model and the published Hugging Face layout.

Loading and saving follow `step35_patch.model.live_weights`, which finds the live parameters of the
one table of tensors. Saving lets one rank of each pipeline stage write.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from megatron.core import parallel_state
from torch import Tensor

from step35_patch.config.model import Step35Config
from step35_patch.model.adapters import adapted_modules, merged_values
from step35_patch.model.description import Step35Runtime
from step35_patch.model.live_weights import entries_of, own_values
from step35_patch.model.training_state import Optimizer, TrainingState, unwrap
from step35_patch.storage import hf_description, hf_folder
from step35_patch.storage.errors import CheckpointError
from step35_patch.storage.hf_folder import DTYPES, Accepted, HfFolder, ShardWriter
from step35_patch.tensors.published import layer_tensors, published_tensors
from step35_patch.tensors.table import EMBEDDING

DEFAULT_SHARD_BYTES = 5 * 10**9

# A GPTModel, wrapped or not, or its model chunks.
Model = torch.nn.Module | Sequence[torch.nn.Module]


def _wrapped_chunks(model: Model) -> Sequence[torch.nn.Module]:
    return [model] if isinstance(model, torch.nn.Module) else model


def _bare_chunks(model: Model) -> list[tuple[Any, Step35Runtime]]:
    """The bare GPTModels of a model or list of model chunks, each with its runtime."""
    chunks = []
    for wrapped in _wrapped_chunks(model):
        chunk, _ = unwrap(wrapped)
        runtime = getattr(chunk, "step35", None)
        if runtime is None:
            raise ValueError(
                "expected a Step-3.5 model, found a GPTModel whose TransformerConfig is none; "
                "build it with step35_patch active"
            )
        chunks.append((chunk, runtime))
    return chunks


def _check_adapters(
    chunks: list[tuple[Any, Step35Runtime]], found: str | None, legal: tuple[str, ...]
) -> None:
    """Raise ValueError unless a caller has said what is to become of the adapters that there are.

    A choice is legal for a model without adapters too, where it has no meaning.
    """
    adapted = adapted_modules(chunk for chunk, _ in chunks)
    if found in legal or (found is None and not adapted):
        return
    raise ValueError(
        f"adapters: expected {' or '.join(map(repr, legal))}, found {found!r}"
        + f", of a model with {len(adapted)} adapters; 'apart' takes the weights without them "
        "(step35_patch.bridge.save_adapters saves the adapters)"
        + ", 'merged' with their products added"
        * ("merged" in legal)
    )


def _values(
    chunks: list[tuple[Any, Step35Runtime]], adapters: str | None
) -> Callable[[Tensor], Tensor]:
    _check_adapters(chunks, adapters, ("merged", "apart"))
    return merged_values([chunk for chunk, _ in chunks]) if adapters == "merged" else own_values


def published_tensors_of(
    model: Model,
    *,
    optimizer: Optimizer | None = None,
    every_stage: bool = False,
    adapters: Literal["merged", "apart"] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """The model's weights in the published layout, one (name, whole tensor) after the other.

    What an inference engine or another model takes its weights from while this one trains. There
    is never more in memory than a few times the largest tensor, all experts' of one layer.

    Collective over the tensor-, expert- and data-parallel groups: go through all of it on all
    ranks. Each pipeline stage yields its own layers' tensors, the one with the MTP layers its copy
    of the embedding besides; with `every_stage`, all ranks yield all of the model's, each once.

    Parameters that the distributed optimizer has updated and not gathered yet
    (`overlap_param_gather`) are gathered first, as Megatron does before it saves.

    Args:
        model: as for `load_hf_weights`.
        optimizer: of this model, by which its DistributedDataParallel is found if `model` is not
            wrapped in it.
        every_stage: send each stage's tensors to the others of its pipeline, one after the other.
        adapters: of a model with adapters, Megatron-Bridge's or ModelOpt's: "merged", the tensors
            of the adapted model, or "apart", those of the model without them.

    Yields:
        A name, and its tensor without padding: in the published shape and the parameter's own
        dtype, on its device. It may share memory with the parameter: clone it to keep or change
        it. In the `expanded` layout the rows of a head's gate are made equal first, in the model.

    Raises:
        ValueError: the model is none of Step-3.5, or has a parameter that the published layout
            does not have; it has adapters, and `adapters` is None, or they can't be merged; the
            optimizer is another model's; the parameters are FSDP's shards; the
            model was unwrapped from a DistributedDataParallel of the distributed optimizer.
    """
    chunks = _bare_chunks(model)
    values = _values(chunks, adapters)
    TrainingState(_wrapped_chunks(model), optimizer).complete_parameters()
    tensors = _published(chunks, values)
    group = parallel_state.get_pipeline_model_parallel_group()
    if every_stage and group.size() > 1:
        device = next(parameter.device for chunk, _ in chunks for parameter in chunk.parameters())
        tensors = _of_every_stage(tensors, group, device)
    yield from tensors


def _of_every_stage(
    own: Iterator[tuple[str, Tensor]], group: torch.distributed.ProcessGroup, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Each stage's tensors on all ranks of a pipeline; an error of one stage is all ranks'."""
    for stage, source in enumerate(torch.distributed.get_process_group_ranks(group)):
        sends = group.rank() == stage
        while True:
            told: list[Any] = [None]
            tensor = None
            if sends:
                try:
                    name, tensor = next(own, ("", None))
                    # A later stage with MTP layers has a copy of the embedding.
                    while name == EMBEDDING and stage > 0:
                        name, tensor = next(own, ("", None))
                    if tensor is not None:
                        tensor = tensor.contiguous()
                        told = [(name, tensor.shape, tensor.dtype)]
                except Exception as error:  # the others must not wait for this one
                    told = [error]
            torch.distributed.broadcast_object_list(told, src=source, group=group, device=device)
            if isinstance(told[0], Exception):
                raise told[0]
            if told[0] is None:
                break
            name, shape, dtype = told[0]
            if tensor is None:
                tensor = torch.empty(shape, dtype=dtype, device=device)
            torch.distributed.broadcast(tensor, src=source, group=group)
            yield name, tensor


def _published(
    chunks: list[tuple[Any, Step35Runtime]], values: Callable[[Tensor], Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for chunk, runtime in chunks:
        for entry in entries_of(chunk, runtime, values, beside_adapters=True):
            yield from entry.save()


def load_hf_weights(
    model: Model,
    hf_dir: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    accept_rounded_router_bias: bool = False,
    dequantize_fp8: bool = False,
    adapters: Literal["apart"] | None = None,
) -> None:
    """Fill a model with the weights of a folder in the published layout, to train on from there.

    Call it before the optimizer is made, or with the optimizer, whose fp32 main parameters are
    then filled as well; its moments and step count stay. The router's bias is loaded in fp32 and
    stays so, whether the model is wrapped in Megatron's Float16Module before or after.

    Args:
        model: a GPTModel of Step-3.5, wrapped or not, or the list of its model chunks, under any
            tensor-, pipeline-, virtual-pipeline- and expert-parallel layout.
        hf_dir: folder with safetensors whose tensors are those of the model's config, with its
            shapes and dtypes, in the published names or as transformers' `save_pretrained` writes
            them. Values are converted to the parameters' dtypes. Tensors of MTP layers that the
            model was built without (`mtp_num_layers`) may be there or not.
        optimizer: what get_megatron_optimizer made of this model, if it has been called.
        accept_rounded_router_bias: see `step35_patch.convert.convert_to_megatron`.
        dequantize_fp8: the same.
        adapters: of a model with adapters, Megatron-Bridge's or ModelOpt's: "apart", which fills
            the weights and leaves the adapters as they are, whose products are added to them.

    Raises:
        CheckpointError: the files are not that; everything wrong is listed, and no parameter has
            been changed.
        ValueError: the model has adapters, and `adapters` is None; the parameters have fp32 main
            parameters, and `optimizer` is missing, is another model's or cannot be told (the
            precision-aware one of Transformer Engine after its first step); or as for
            `published_tensors_of`. Other copies of the parameters leave no trace on them, and are
            not noticed without `optimizer`: those on the CPU of an offloaded optimizer for a model
            in fp32, or those of an optimizer that is not Megatron's.
    """
    chunks = _bare_chunks(model)
    _check_adapters(chunks, adapters, ("apart",))
    state = TrainingState(_wrapped_chunks(model), optimizer)
    state.check_loadable()
    folder = HfFolder(
        hf_dir,
        chunks[0][1].config,
        mtp_layers=chunks[0][0].config.mtp_num_layers or 0,
        accept=Accepted(accept_rounded_router_bias, dequantize_fp8),
    )
    state.complete_parameters()  # a gather under way would write the old values again
    for chunk, runtime in chunks:
        entries = entries_of(chunk, runtime, beside_adapters=True)
        with torch.no_grad():
            for entry in entries:
                entry.parameter.copy_(entry.load(folder))
    state.parameters_changed()


def save_hf_weights(
    model: Model,
    out_dir: str | os.PathLike[str],
    *,
    optimizer: Optimizer | None = None,
    masters: bool = False,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    mtp_from: str | os.PathLike[str] | None = None,
    without_mtp: bool = False,
    adapters: Literal["merged", "apart"] | None = None,
) -> None:
    """Write a model's weights as a folder in the published layout.

    The folder holds sharded safetensors, their index and a config.json. It is built beside
    `out_dir` and renamed when it is whole. Collective: call it on every rank; ranks of one
    data-parallel group hold the same weights, and the first writes.

    What is written are the weights after the last step, bit for bit in the parameters' dtype: what
    Megatron's own checkpoint of this moment holds. See `published_tensors_of`.

    Args:
        model: as for `load_hf_weights`.
        out_dir: a folder that does not exist yet.
        optimizer: as for `published_tensors_of`; needed with `masters`.
        masters: write the optimizer's fp32 main parameters in place of the parameters that it
            rounds from them. They are gathered one after the other where they are sharded.
        dtype: of the written tensors (router_bias stays fp32); the parameters' own by default,
            fp32 with `masters`. config.json names it.
        max_shard_bytes: a file is closed before it would grow past this many bytes.
        mtp_from: where the model has fewer MTP layers than its config (`mtp_num_layers`): the
            folder in the published layout, usually the one that was loaded, from which the others
            are copied as they are.
        without_mtp: leave the MTP layers out, whether the model has them or not; config.json has
            num_nextn_predict_layers 0.
        adapters: as for `published_tensors_of`; `masters` go with "apart" alone.

    Raises:
        FileExistsError: `out_dir` exists.
        ValueError: MTP layers are missing and neither `mtp_from` nor `without_mtp` is given; or
            `mtp_from` is given and there is nothing to copy; `masters` goes with another dtype,
            or with merged adapters, or the optimizer is missing or has none that can be read; or
            as for `published_tensors_of`.
        CheckpointError: `mtp_from` is not a checkpoint of the model's config.
        OSError: writing failed; nothing is left at `out_dir`.
    """
    chunks = _bare_chunks(model)
    config = chunks[0][1].config
    target = Path(out_dir)
    untrained = _untrained_mtp_layers(chunks[0][0], config, mtp_from, without_mtp)
    if without_mtp:
        config = config.without_mtp()
    state = TrainingState(_wrapped_chunks(model), optimizer)
    if masters:
        if dtype not in (None, torch.float32):
            raise ValueError(f"dtype: expected None or torch.float32 for masters, found {dtype}")
        if adapters == "merged":
            raise ValueError(
                "masters: expected False with merged adapters, which are merged into the "
                "parameters, found True; leave it out"
            )
        dtype = torch.float32
    values = _values(chunks, adapters)
    if masters:
        values = state.masters()
    dtype = dtype or next(chunks[0][0].parameters()).dtype
    hf_folder.dtype_name(dtype)  # refuses one that weights don't come in
    staged, error = _first_rank_does(lambda: hf_folder.staging_folder(target))
    if staged is None:
        raise error or RuntimeError(f"{target}: rank 0 made no folder to write in")
    try:
        problem: BaseException | None = None
        weight_map: dict[str, str] = {}
        size = 0
        try:
            state.complete_parameters()
            tensors = _published(chunks, values)
            weight_map, size = _write(tensors, config, staged, dtype, max_shard_bytes, untrained)
        except Exception as caught:  # every rank must get to the collective below
            problem = caught
        results = _all_ranks((weight_map, size, problem))
        if problems := [found for _, _, found in results if found is not None]:
            raise problems[0]

        def finish() -> None:
            whole = {name: file for part, _, _ in results for name, file in part.items()}
            _check_complete(target, config, whole)
            index = hf_description.index_document(whole, sum(size for _, size, _ in results))
            (staged / hf_folder.INDEX).write_bytes(index)
            (staged / "config.json").write_bytes(hf_description.config_document(config, dtype))
            hf_folder.publish(staged, target)

        _, error = _first_rank_does(finish)
        if error is not None:
            raise error
    except BaseException:
        if _is_first_rank():
            hf_folder.discard(staged)
        raise


def _untrained_mtp_layers(
    model: Any,
    config: Step35Config,
    mtp_from: str | os.PathLike[str] | None,
    without_mtp: bool,
) -> dict[str, HfFolder]:
    """The tensors of MTP layers that the model does not have, and the folder to copy them from."""
    if without_mtp:
        if mtp_from is not None:
            raise ValueError(f"mtp_from: expected None with without_mtp, found {mtp_from}")
        return {}
    built = model.config.mtp_num_layers or 0
    untrained = config.layers[config.num_hidden_layers + built :]
    names = [info.name for plan in untrained for info in layer_tensors(config, plan)]
    if bool(names) != (mtp_from is not None):
        raise ValueError(
            f"mtp_from: the model has {built} of the config's {config.num_nextn_predict_layers} "
            "MTP layers; expected "
            + (
                "a folder to copy the others from, found None; or leave all MTP layers out with "
                "without_mtp=True"
                if names
                else "None"
            )
        )
    if mtp_from is None:
        return {}
    folder = HfFolder(mtp_from, config)
    return dict.fromkeys(names, folder)


def _write(
    tensors: Iterator[tuple[str, Tensor]],
    config: Step35Config,
    staged: Path,
    dtype: torch.dtype,
    max_bytes: int,
    untrained: dict[str, HfFolder],
) -> tuple[dict[str, str], int]:
    """Go through this pipeline stage's tensors; the stage's first rank writes them.

    The last stage writes the tensors of `untrained` as well.
    """
    infos = published_tensors(config, hf_description.torch_dtype_name(dtype))
    dtypes = {info.name: DTYPES[info.dtype] for info in infos}
    writes = (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    )
    stage = parallel_state.get_pipeline_model_parallel_rank()
    writer = ShardWriter(staged, f"model-{stage + 1:05d}", max_bytes)
    for name, tensor in tensors:
        # A later stage with MTP layers has a copy of the embedding; the first one publishes it.
        if writes and name in dtypes and not (name == EMBEDDING and stage > 0):
            writer.add(name, tensor.to(dtypes[name]))
    if writes and parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        for name, folder in untrained.items():
            writer.add(name, folder.get(name).to(dtypes[name]))
    writer.flush()
    return writer.weight_map, writer.bytes


def _check_complete(target: Path, config: Step35Config, weight_map: dict[str, str]) -> None:
    expected = {info.name for info in published_tensors(config)}
    if lost := sorted(expected ^ set(weight_map)):
        raise CheckpointError(target, [f"{name}: not written" for name in lost])


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0


def _first_rank_does[T](action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """Run `action` on rank 0; every rank gets its result, or the exception."""
    outcome: list[Any] = [None, None]
    if _is_first_rank():
        try:
            outcome[0] = action()
        except Exception as error:  # on every rank: the others must not wait for this one
            outcome[1] = error
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(outcome, src=0)
    return outcome[0], outcome[1]


def _all_ranks[T](value: T) -> list[T]:
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
