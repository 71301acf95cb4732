"""Whose Step-3.5 AutoBridge takes: this package's with a config, else its own with a warning."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.bridge_processes import needs_bridge, output_of
from support.reference import random_weights, tiny_config, write_hf_folder

pytestmark = needs_bridge

START = """
import sys, warnings
from support import bridge_on_cpu
bridge_on_cpu.install()
import hashlib, os
import torch
import step35_patch
if "OFF" in os.environ:
    step35_patch.deactivate()
from megatron.bridge import AutoBridge

def of_whom():
    bridge = AutoBridge.from_hf_pretrained(sys.argv[1])
    provider = bridge.to_megatron_provider(load_weights=False)
    names = type(bridge._model_bridge).__module__, type(provider).__module__
    return {name.split(".")[0] for name in names}

def warned():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        whose = of_whom()
    return whose, [str(w.message) for w in caught if "step35_patch" in str(w.message)]

def another_model():
    from transformers import Qwen3MoeConfig
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, architectures=["Qwen3MoeForCausalLM"], torch_dtype="float32",
    )
    provider = AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)
    provider.finalize()
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    provider.initialize_model_parallel(seed=1)
    torch.manual_seed(1)
    (model,) = provider.provide_distributed_model(wrap_with_ddp=False, use_cpu_initialization=True)
    tokens = torch.arange(20)[None]
    logits = model.eval()(tokens, tokens, None)
    tensors = [*model.state_dict().values(), logits]
    sums = hashlib.sha256(str(model).encode())
    for tensor in tensors:
        if torch.is_tensor(tensor):
            sums.update(tensor.detach().numpy().tobytes())
    return sums.hexdigest()
"""


def run(code: str, folder: Path, **variables: str) -> str:
    return output_of(START + code, folder, **variables)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = tiny_config(architectures=["Step3p5ForCausalLM"])
    return write_hf_folder(tmp_path_factory.mktemp("hf"), config, random_weights(config, 2))


def test_with_a_config_the_import_of_megatron_bridge_is_enough(folder):
    """And other models stay what they are, bit for bit."""
    code = """
assert "step35_patch.bridge" in sys.modules
assert warned() == ({"step35_patch"}, [])

def with_config(config):
    return AutoBridge.from_hf_config(config).to_megatron_provider(load_weights=False)

from transformers import AutoConfig
from megatron.bridge.models.stepfun.configuration_step35 import Step35Config as WithoutFolder
assert with_config(AutoConfig.from_pretrained(sys.argv[1])).num_layers == 6
try:
    with_config(WithoutFolder(architectures=["Step3p5ForCausalLM"]))
except ValueError as error:
    assert "AutoConfig.from_pretrained(folder)" in str(error), error
else:
    raise AssertionError("a config without its folder was taken")

# The YAML file of step35-patch args, as Megatron-Bridge's scripts merge it.
import contextlib, dataclasses, pathlib
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.training.utils.omegaconf_utils import process_config_with_overrides
from step35_patch import cli

@dataclasses.dataclass
class Run:
    model: GPTModelProvider

file = pathlib.Path(sys.argv[1], "model.yaml")
with open(file, "w") as stream, contextlib.redirect_stdout(stream):
    assert cli.main(["args", sys.argv[1], "--format", "yaml"]) == 0
merged = Run(AutoBridge.from_hf_pretrained(sys.argv[1]).to_megatron_provider(load_weights=False))
asked = merged.model.step35.config.fingerprint
merged.model.swiglu_limits = [1.0] * 8  # which would be refused
process_config_with_overrides(merged, str(file))
merged.model.finalize()
assert merged.model.step35.config.fingerprint == asked
"""
    other = "\nprint('another model', another_model())"
    active = run(code + other, folder, STEP35_CONFIG=str(folder))
    # Whatever else is printed; without the package its hooks are not there.
    assert active.splitlines()[-1] == run(other, folder, OFF="1").splitlines()[-1]
    assert len(active.splitlines()[-1]) == len("another model ") + 64


def test_without_one_megatron_bridges_own_model_comes_with_one_warning(folder):
    code = """
assert "step35_patch.bridge" not in sys.modules
whose, messages = warned()
assert whose == {"megatron"}, whose
assert len(messages) == 1 and "STEP35_CONFIG" in messages[0], messages
assert warned() == ({"megatron"}, [])
# And a config that comes after Megatron-Bridge.
step35_patch.activate(sys.argv[1])
assert warned() == ({"step35_patch"}, [])
"""
    run(code, folder)
