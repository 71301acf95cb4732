"""What lies beside exported tensors speaks of these, not of those that --hf-dir has."""

from __future__ import annotations

import json

import pytest
import torch
from support.converted import SMALL_FILES
from support.reference import tiny_config, write_hf_folder
from transformers import AutoConfig

from step35_patch import Step35Config
from step35_patch.convert import convert_to_hf, convert_to_megatron
from step35_patch.storage.hf_description import config_document
from step35_patch.storage.hf_folder import INDEX

FP8 = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}
AUTO_MAP = {
    "AutoConfig": "configuration_step3p5.Step3p5Config",
    "AutoModelForCausalLM": "modeling_step3p5.Step3p5ForCausalLM",
    "AutoTokenizer": ["stepfun-ai/code--tokenization_step.Slow", None],
}
SAID_OF_THE_OTHERS = [
    *("hf_quant_config.json", "quantize_config.json", "quant_config.json", "recipe.yaml"),
    *("kv_cache_scales.json", "model.safetensors.index.json", "input_scales.safetensors"),
    *("README.md", "model.onnx", "consolidated.pth"),
]
COPIED = {"LICENSE", "chat_template.jinja", "configuration_step3p5.py", "tokenizer_config.json"}


def test_export_with_the_config_of_an_fp8_folder_is_of_plain_weights(case, tmp_path):
    config, weights, hf = case
    convert_to_megatron(hf, tmp_path / "m", options=SMALL_FILES)
    quantized = tmp_path / "quantized"
    quantized.mkdir()
    document = config | {"quantization_config": FP8, "dtype": "bfloat16", "auto_map": AUTO_MAP}
    (quantized / "config.json").write_text(json.dumps(document))
    for name in (*SAID_OF_THE_OTHERS, *COPIED):
        (quantized / name).write_text("{}")

    convert_to_hf(tmp_path / "m", tmp_path / "back", hf_dir=quantized, options=SMALL_FILES)

    found = {path.name for path in (tmp_path / "back").iterdir() if path.suffix != ".safetensors"}
    assert found == COPIED | {"config.json", INDEX}
    assert json.loads((tmp_path / "back" / INDEX).read_text())["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in weights.values())
    }
    # The code of one class is there, of another in a repository, of the third nowhere.
    kept = {name: AUTO_MAP[name] for name in ("AutoConfig", "AutoTokenizer")}
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert written == config | {"auto_map": kept}
    (tmp_path / "back" / "configuration_step3p5.py").unlink()
    as_read = AutoConfig.from_pretrained(tmp_path / "back")
    assert getattr(as_read, "quantization_config", None) is None
    assert as_read.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_config_names_the_dtype_and_no_quantization_at_any_level(tmp_path, dtype):
    name = str(dtype).removeprefix("torch.")
    nested = {
        "dtype": "float8_e4m3fn",
        "quantization_config": FP8,
        "layers": [{"torch_dtype": "x"}],
    }
    config = tiny_config(
        torch_dtype="float16",
        dtype="float16",
        compression_config={"format": "pack-quantized"},
        quantization={"bits": 4},
        draft_config=nested,
        auto_map=AUTO_MAP,
    )
    found = json.loads(config_document(Step35Config.from_dict(config), dtype))
    plain = {"dtype": name, "layers": [{"torch_dtype": name}]}
    remote = {"AutoTokenizer": AUTO_MAP["AutoTokenizer"]}
    assert found == tiny_config(torch_dtype=name, draft_config=plain, auto_map=remote)
    folder = write_hf_folder(tmp_path, found, {})
    assert Step35Config.from_pretrained(folder).torch_dtype == name
