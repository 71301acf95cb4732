"""Config, provider and specs as they are copied, and sent to other processes by Ray and others."""

from __future__ import annotations

import copy
import functools
import pickle
import subprocess
import sys

import cloudpickle
import pytest
import torch
from support.implementation import IMPLEMENTATION, ON_TRANSFORMER_ENGINE
from support.installed import ROOT
from support.ours import build, initialize_megatron, run
from support.reference import random_tokens, random_weights, tiny_config, write_hf_folder

from step35_patch import Step35Config, Step35ModelProvider
from step35_patch.checkpoint import load_hf_weights
from step35_patch.model.layer import layer_config

# With each Megatron-Core; the others run with the newest only.
every_version = pytest.mark.megatron

from megatron.core.models.gpt import gpt_layer_specs  # noqa: E402
from megatron.core.models.gpt.gpt_model import GPTModel  # noqa: E402

WAYS = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: pickle.loads(cloudpickle.dumps(value)),
}


@pytest.fixture
def folder(tmp_path):
    initialize_megatron()
    config = tiny_config()
    return write_hf_folder(tmp_path / "hf", config, random_weights(config, 91))


def provider_of(folder, **options) -> Step35ModelProvider:
    return Step35ModelProvider.from_hf(
        folder,
        transformer_impl=IMPLEMENTATION,
        moe_grouped_gemm=ON_TRANSFORMER_ENGINE,
        use_cpu_initialization=True,
        **options,
    )


def logits_of(model: torch.nn.Module, folder) -> torch.Tensor:
    load_hf_weights(model, folder)
    return run(model, random_tokens(91, 1, 24)[0])


@pytest.mark.parametrize("way", WAYS)
def test_config_and_plans_come_through(way):
    config = Step35Config.from_dict(tiny_config())
    for value in (config, config.layers):
        again = WAYS[way](value)
        assert again == value
        assert hash(again) == hash(value)
    assert WAYS[way](config).fingerprint == config.fingerprint


@every_version
@pytest.mark.transformer_engine
@pytest.mark.parametrize("way", WAYS)
def test_provider_builds_the_same_model_afterwards(folder, way):
    """Also one that was changed since it was made, whose change comes along."""
    provider = provider_of(folder, gate_layout="expanded")
    provider.window = "steptron"
    again = WAYS[way](provider)
    assert type(again) is Step35ModelProvider
    assert again.step35 == provider.step35
    assert (again.step35.gate_layout, again.step35.window) == ("expanded", "steptron")
    wanted = logits_of(provider.provide(), folder)
    assert torch.equal(logits_of(again.provide(), folder), wanted)
    again.moe_aux_loss_coeff = 0.5
    assert provider.moe_aux_loss_coeff != 0.5


@pytest.mark.transformer_engine
@pytest.mark.parametrize("way", WAYS)
def test_specs_build_the_same_model_afterwards(folder, way):
    provider = provider_of(folder)
    options = {"use_transformer_engine": ON_TRANSFORMER_ENGINE}
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(provider, normalization="RMSNorm", **options)
    mtp_spec = gpt_layer_specs.get_gpt_mtp_block_spec(provider, spec, **options)
    spec, mtp_spec = WAYS[way]((spec, mtp_spec))
    model = GPTModel(
        provider,
        spec,
        vocab_size=96,
        max_sequence_length=256,
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        mtp_block_spec=mtp_spec,
    )
    assert torch.equal(logits_of(model, folder), logits_of(build(folder), folder))


@pytest.mark.parametrize("way", WAYS)
def test_wrapped_builder_stays_the_wrapped_one(way):
    """As in a partial, which trainers keep for their workers."""
    builder = gpt_layer_specs.get_gpt_decoder_block_spec
    again = WAYS[way](functools.partial(builder, normalization="RMSNorm"))
    assert again.func is builder


@pytest.mark.transformer_engine
@pytest.mark.parametrize("way", WAYS)
def test_layer_s_own_config_stays_that_layer_s(folder, way):
    """Which Megatron-Core deep-copies for experts."""
    provider = provider_of(folder)
    plan = provider.step35.layers[1]
    again = WAYS[way](layer_config(provider, provider.step35, plan))
    assert again.step35_layer == plan
    assert again.num_attention_heads == plan.num_attention_heads == 6
    assert again.step35 == provider.step35


# A worker as Ray starts it: it has imported Megatron-Core, and gets its work as bytes. Its stand-in
# for CUDA is loaded as a file, because importing the package would be what is tested.
WORKER = """
import importlib.util, pickle, sys

def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module

load("stand_in", sys.argv[1]).install()

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

store = torch.distributed.HashStore()
torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
parallel_state.initialize_model_parallel()
model_parallel_cuda_manual_seed(1234)
assert not [name for name in sys.modules if name.startswith("step35_patch")]
for path in sys.argv[3:]:
    with open(path, "rb") as file:
        work = pickle.load(file)
    torch.save(work(sys.argv[2]), path + ".logits")
"""


@every_version
@pytest.mark.slow
def test_worker_that_has_imported_megatron_builds_what_it_is_sent(folder, tmp_path):
    """A provider, and a function of the driver's script with a provider in it."""
    from step35_patch import checkpoint

    options = {"transformer_impl": "local", "use_cpu_initialization": True}
    provider = Step35ModelProvider.from_hf(folder, **options)
    tokens = random_tokens(91, 1, 24)[0]

    def work(hf_dir: str) -> torch.Tensor:
        model = provider.provide()
        checkpoint.load_hf_weights(model, hf_dir)
        positions = torch.arange(tokens.shape[1]).expand_as(tokens)
        return model(tokens, positions, None)

    # A function of a module that the worker does not have, as a script's are: by value.
    work.__module__ = "__main__"
    sent = tmp_path / "work"
    sent.write_bytes(cloudpickle.dumps(work))
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", worker, ROOT / "step35_patch" / "cpu.py", folder, sent],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = torch.load(f"{sent}.logits")
    torch.testing.assert_close(found, work(str(folder)), rtol=0, atol=1e-6)
