import json
import sys
import textwrap

import pytest
from support.installed import PUBLISHED, Installed, new_environment, wheel_environment

import step35_patch

# What becomes of a layer spec: the kinds of layer that a builder makes for a config.
CHECK = f"""
import json
PUBLISHED = {str(PUBLISHED)!r}

def config_of(step35):
    from megatron.core.transformer.transformer_config import TransformerConfig
    from step35_patch import Step35Config
    from step35_patch.model.megatron_fields import model_fields
    if step35:
        return TransformerConfig(**model_fields(Step35Config.from_pretrained(PUBLISHED)))
    return TransformerConfig(
        num_layers=2, hidden_size=64, num_attention_heads=4, normalization="RMSNorm"
    )

def layers(builder, step35=True):
    block = builder(
        config_of(step35), use_transformer_engine=False, normalization="RMSNorm", pp_rank=0
    )
    return {{spec.module.__name__ for spec in block.layer_specs}}

def states(status):
    # Of the targets in modules that are imported; some releases lack the optional ones.
    import sys
    from step35_patch.patch.targets import TARGETS
    required = {{(t.module, t.attribute) for t in TARGETS if t.required}}
    imported = [t for t in status.targets if t.module in sys.modules]
    assert len(imported) > 10
    assert {{t.state for t in imported}} <= {{"wrapped", "missing"}}
    return {{t.state for t in imported if (t.module, t.attribute) in required}}

OURS, STOCK = {{"Step35DecoderLayer"}}, {{"TransformerLayer"}}
"""


@pytest.fixture(scope="session")
def installed(tmp_path_factory) -> Installed:
    return wheel_environment(tmp_path_factory)


@pytest.fixture(scope="session")
def without_package(tmp_path_factory) -> Installed:
    return new_environment(tmp_path_factory.mktemp("without_package"))


@pytest.fixture
def script(tmp_path):
    """A function that writes a script, after `CHECK`, and returns its path."""

    def write(code: str, name: str = "script.py"):
        path = tmp_path / name
        path.write_text(CHECK + textwrap.dedent(code))
        return path

    return write


@pytest.fixture
def broken_config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(PUBLISHED.read_text()) | {"head_dim": -3}))
    return path


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Parses a command line as Megatron's scripts do; the first argument may be a config."""
    from megatron.training import arguments

    def parse(*words: str, config: dict | None = None, option: bool = True):
        line = list(words)
        if config is not None:
            path = tmp_path / "config.json"
            path.write_text(json.dumps(config))
            if option:
                line += ["--step35-config", str(path)]
            else:
                monkeypatch.setenv("STEP35_CONFIG", str(path))
                step35_patch.activate()
        monkeypatch.setattr(sys, "argv", ["pretrain_gpt.py", *line])
        return arguments.parse_args()

    yield parse
    monkeypatch.delenv("STEP35_CONFIG", raising=False)
    step35_patch.activate()
