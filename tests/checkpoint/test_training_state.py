"""Weights in and out of a model that is wrapped and has an optimizer, and what is refused there."""

from __future__ import annotations

import pytest
import torch
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.multi_token_prediction import MTPLossAutoScaler
from support.converted import assert_same, read, weights_of
from support.ours import build, initialize_megatron
from support.reference import tiny_config, write_hf_folder
from support.training_worker import BF16, step, wrap
from torch.distributed.device_mesh import init_device_mesh

from step35_patch import Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights, published_tensors_of, save_hf_weights

pytestmark = pytest.mark.megatron


@pytest.fixture(autouse=True)
def _loss_scales(monkeypatch):
    """Megatron-Core's schedules leave one for two micro-batches, for all models of the process."""
    for scaler in (MTPLossAutoScaler, MoEAuxLossAutoScaler):
        scale = scaler.main_loss_backward_scale
        own = None if scale is None else scale.clone()
        monkeypatch.setattr(scaler, "main_loss_backward_scale", own)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    config = tiny_config(torch_dtype="bfloat16")
    weights = weights_of(config)
    return weights, write_hf_folder(tmp_path_factory.mktemp("published"), config, weights)


def new_model(folder, **options):
    """With a random start, and a router's bias that does not move by itself."""
    initialize_megatron()
    model_parallel_cuda_manual_seed(1)
    fixed = {"transformer_impl": "local", "use_cpu_initialization": True}
    fixed["moe_router_bias_update_rate"] = 0.0
    return Step35ModelProvider.from_hf(folder, **(fixed | options)).provide()


def tensors_of(model, **options):
    return {name: tensor.clone() for name, tensor in published_tensors_of(model, **options)}


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
@pytest.mark.parametrize("first", ["wrapped", "loaded in 16 bits", "loaded in fp32"])
def test_router_bias_is_exact_in_float16_module(published, name, dtype, first):
    """Megatron's Float16Module makes bf16 or fp16 of all that it wraps."""
    weights, folder = published
    half = {name: True, "params_dtype": torch.float32 if first.endswith("fp32") else dtype}
    model = new_model(folder, **half)
    if first != "wrapped":
        load_hf_weights(model, folder)
    wrapped = Float16Module(model.config, model)
    if first == "wrapped":
        load_hf_weights(wrapped, folder)
    wanted = {n: t if n.endswith("router_bias") else t.to(dtype) for n, t in weights.items()}
    assert_same(tensors_of(wrapped), wanted)


def test_router_counts_its_tokens_exactly_in_bf16(published):
    """They say in which direction --moe-router-bias-update-rate moves the bias."""
    _, folder = published
    model = new_model(folder, **BF16)
    wrapped = Float16Module(model.config, model)
    tokens = torch.arange(301)[None] % 96
    for _ in range(3):
        wrapped(tokens, torch.arange(301)[None], None, labels=tokens)
    routers = [layer.mlp.router for layer in model.decoder.layers if layer.plan.is_moe]
    counts = {router.local_tokens_per_expert.sum().item() for router in routers}
    assert counts == {3 * 301 * model.config.moe_router_topk}


def test_parameters_in_fewer_bits_are_refused(published, tmp_path):
    _, folder = published

    class Float8Tensor(torch.Tensor):
        """Transformer Engine's needs a GPU; like that one it is a subclass of torch's."""

    model = new_model(folder)
    weight = model.output_layer.weight.data.as_subclass(Float8Tensor)
    model.output_layer.weight = torch.nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"output_layer\.weight: .* found Float8Tensor"):
        load_hf_weights(model, folder)
    with pytest.raises(ValueError, match=r"output_layer\.weight: .* found Float8Tensor"):
        save_hf_weights(model, tmp_path / "out")


@pytest.mark.parametrize("distributed", [False, True])
def test_masters_that_cannot_be_told_are_refused(published, distributed):
    _, folder = published
    (model,), optimizer = wrap([new_model(folder, **BF16)], overlap_param_gather=distributed)
    start = tensors_of(model)
    for part in (model, model.module.module):
        with pytest.raises(ValueError, match=r"pass (the wrapped model, or )?optimizer="):
            load_hf_weights(part, folder)
    assert_same(tensors_of(model), start)
    load_hf_weights(model.module.module, folder, optimizer=optimizer)


def test_another_models_optimizer_is_refused(published, tmp_path):
    _, folder = published
    _, optimizer = wrap([new_model(folder, **BF16)])
    (model,), _ = wrap([new_model(folder, **BF16)])
    for call in (
        lambda: load_hf_weights(model, folder, optimizer=optimizer),
        lambda: save_hf_weights(model, tmp_path / "out", optimizer=optimizer),
        lambda: tensors_of(model, optimizer=optimizer),
    ):
        with pytest.raises(ValueError, match="trains 113 parameters that are not the model's"):
            call()
    assert list(tmp_path.iterdir()) == []


def test_unwrapped_model_that_may_have_to_be_gathered_is_refused(published, tmp_path):
    _, folder = published
    (model,), optimizer = wrap([new_model(folder, **BF16)], overlap_param_gather=True)
    bare = model.module.module
    with pytest.raises(ValueError, match="pass the wrapped model, or optimizer="):
        save_hf_weights(bare, tmp_path / "out")
    assert_same(tensors_of(bare, optimizer=optimizer), tensors_of(model))


def test_parameters_that_are_kept_otherwise_are_refused(published, tmp_path):
    _, folder = published
    sharded = new_model(folder)
    torch.distributed.fsdp.fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    (waiting,), _ = wrap([new_model(folder, **BF16)])
    waiting.ddp_config.reuse_grad_buf_for_mxfp8_param_ag = True
    for model, said in ((sharded, "found FSDP's shards"), (waiting, "mxfp8_param_ag: expected F")):
        with pytest.raises(ValueError, match=said):
            load_hf_weights(model, folder)
        with pytest.raises(ValueError, match=said):
            save_hf_weights(model, tmp_path / "out")


def test_masters_of_the_precision_aware_optimizer_are_refused(published, tmp_path):
    """Transformer Engine's FusedAdam makes them in its first step, in its state."""
    _, folder = published
    (model,), optimizer = wrap([new_model(folder, **BF16)], overlap_param_gather=True)
    for part in optimizer.chained_optimizers:
        part.config.use_precision_aware_optimizer_no_fp8_or_ds_fp8 = True
    load_hf_weights(model, folder, optimizer=optimizer)
    with pytest.raises(ValueError, match="masters: the precision-aware optimizer"):
        save_hf_weights(model, tmp_path / "out", optimizer=optimizer, masters=True)
    for part in optimizer.chained_optimizers:
        part.init_state_fn(part.optimizer)
    with pytest.raises(ValueError, match=r"cannot be told .* load before that step"):
        load_hf_weights(model, folder, optimizer=optimizer)


def test_masters_are_refused_where_there_are_none(published, tmp_path):
    _, folder = published
    model = build(folder, **BF16)
    with pytest.raises(ValueError, match="masters: expected optimizer="):
        save_hf_weights(model, tmp_path / "out", masters=True)
    own = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"masters: 113 parameters .* without any"):
        save_hf_weights(model, tmp_path / "out", optimizer=own, masters=True)
    (wrapped,), optimizer = wrap([model])
    options = {"optimizer": optimizer, "masters": True}
    with pytest.raises(ValueError, match=r"dtype: expected None or torch\.float32 for masters"):
        save_hf_weights(wrapped, tmp_path / "out", dtype=torch.bfloat16, **options)
    assert list(tmp_path.iterdir()) == []


def test_masters_of_an_expanded_gate(published, tmp_path):
    """A head's rows have masters of their own, of which only the first is trained."""
    _, folder = published
    model = build(folder, gate_layout="expanded", **BF16)
    (wrapped,), optimizer = wrap([model])
    step([wrapped], optimizer, 1e-2)
    save_hf_weights(wrapped, tmp_path / "masters", optimizer=optimizer, masters=True)
    found, trained = read(tmp_path / "masters"), tensors_of(wrapped)
    assert_same({n: t.to(trained[n].dtype) for n, t in found.items()}, trained)


@pytest.mark.parametrize("precision_aware", [False, True])
def test_offloaded_optimizer_is_told(published, tmp_path, precision_aware):
    """With its fp32 copies on the same device: the stand-in for CUDA has one only."""
    weights, folder = published
    offload = {"optimizer_cpu_offload": True, "use_precision_aware_optimizer": precision_aware}
    (model,), optimizer = wrap([new_model(folder, **BF16)], overlap_param_gather=True, **offload)
    load_hf_weights(model, folder, optimizer=optimizer)
    step([model], optimizer, 0.0)
    assert_same(tensors_of(model), weights)
    step([model], optimizer, 1e-2)
    save_hf_weights(model, tmp_path / "masters", optimizer=optimizer, masters=True)
    found, trained = read(tmp_path / "masters"), tensors_of(model)
    assert_same({n: t.to(trained[n].dtype) for n, t in found.items()}, trained)
    assert not torch.equal(found["lm_head.weight"], trained["lm_head.weight"].float())
