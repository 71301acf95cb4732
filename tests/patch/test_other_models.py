"""What Megatron-LM trains besides GPTModel is refused with a Step-3.5 config, not built wrong.

Also by its own scripts, of the checkouts that STEP35_TEST_MEGATRON_LM names.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from support import layout_runs
from support.layout_runs import arguments, run
from support.ours import initialize_megatron
from support.reference import tiny_config, write_hf_folder

from step35_patch import Step35ModelProvider

CHECKOUTS = [
    Path(path) for path in os.environ.get("STEP35_TEST_MEGATRON_LM", "").split(os.pathsep) if path
]


def hybrid_class() -> tuple[type, str]:
    """The class of hybrid models, and its argument of the layers' spec: 0.17 names them Mamba's."""
    try:
        return importlib.import_module("megatron.core.models.hybrid.hybrid_model").HybridModel, (
            "hybrid_stack_spec"
        )
    except ModuleNotFoundError:
        module = importlib.import_module("megatron.core.models.mamba.mamba_model")
        return module.MambaModel, "mamba_stack_spec"


@pytest.mark.megatron
@pytest.mark.parametrize("name", ["BertModel", "T5Model", "hybrid", "LLaVAModel"])
def test_other_models_are_refused(name, tmp_path):
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.models.multimodal.llava_model import LLaVAModel
    from megatron.core.models.T5.t5_model import T5Model
    from megatron.core.transformer.spec_utils import ModuleSpec

    initialize_megatron()
    config = Step35ModelProvider.from_hf(
        write_hf_folder(tmp_path / "hf", tiny_config(), {}), transformer_impl="local"
    )
    spec, sizes = ModuleSpec(module=object), {"vocab_size": 96, "max_sequence_length": 64}
    hybrid, its_spec = hybrid_class()
    kind, call = {
        "BertModel": (
            BertModel,
            {"config": config, "num_tokentypes": 0, "transformer_layer_spec": spec, **sizes},
        ),
        "T5Model": (
            T5Model,
            {
                **{"config": config, "encoder_config": config, **sizes},
                **dict.fromkeys(
                    (
                        "transformer_encoder_layer_spec",
                        "transformer_decoder_layer_spec",
                    ),
                    spec,
                ),
            },
        ),
        "hybrid": (hybrid, {"config": config, its_spec: spec, **sizes}),
        "LLaVAModel": (
            LLaVAModel,
            {
                **{f"language_{key}": value for key, value in sizes.items()},
                "language_transformer_config": config,
                "language_transformer_layer_spec": spec,
                "vision_transformer_config": config,
                "vision_transformer_layer_spec": spec,
                "drop_vision_class_token": False,
                "vision_projection_config": config,
                "vision_projection_layer_spec": spec,
            },
        ),
    }[name]
    with pytest.raises(NotImplementedError, match=f"{kind.__name__}: expected a GPTModel"):
        kind(**call)


# What each script is given besides the model: what it builds other layers by, or needs itself.
SCRIPTS = {
    "pretrain_hybrid.py": (
        ["--hybrid-layer-pattern", "*-*-*-", "--spec", "megatron.core.models.hybrid", "x"],
        r"--hybrid-layer-pattern: expected None, found \*-\*-\*-; it would build other layers",
    ),
    "train_rl.py": (["--perform-rl-step"], "--perform-rl-step: expected False, found True; its"),
    "pretrain_vlm.py": (
        ["--ckpt-format", "torch", "--img-h", "32", "--img-w", "32"],
        "LLaVAModel: expected a GPTModel for the Step-3.5 config",
    ),
}


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUTS, reason="STEP35_TEST_MEGATRON_LM names no checkout")
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda path: path.name)
def test_other_scripts_are_refused(tmp_path, checkout, script):
    if not (checkout / script).exists():
        pytest.skip(f"{checkout.name} has no {script}")
    more, words = SCRIPTS[script]
    with pytest.raises(RuntimeError, match=words):
        run(
            layout_runs.write_config(tmp_path),
            str(checkout / script),
            *arguments(iterations=10),
            *("--mock-data", "--vocab-size", "255", *more),
            script=layout_runs.REAL_SCRIPT,
            python_path=(checkout,),
        )
