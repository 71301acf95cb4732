"""Configs that hypothesis makes: what is legal means what it says, what is not is refused.

`STEP35_TEST_EXAMPLES` sets how many: see tests/support/fuzzing.py.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from support.config_mutations import mutated, mutated_text, wrong
from support.config_samples import problems_of
from support.config_strategies import legal, read_by_transformers
from support.fuzzing import at_most, fuzzed

from step35_patch.config import Step35Config, Step35ConfigError
from step35_patch.config.aliases import ALIASES

# What transformers writes in another form, and reads.
_OF_TRANSFORMERS = (
    *("mlp_layer_types", "mtp_layer_types", "mtp_mlp_layer_types", "num_sliding_attention_heads"),
    *("per_layer_config", "rope_parameters"),
)
_SAME = (
    *("hidden_size", "intermediate_size", "vocab_size", "rms_norm_eps", "num_attention_groups"),
    *("head_dim", "num_hidden_layers", "num_nextn_predict_layers"),
)
_SAME_OF_EXPERTS = (
    *("moe_num_experts", "moe_top_k", "moe_intermediate_size", "share_expert_dim"),
    "moe_router_scaling_factor",
)


@pytest.fixture(scope="module", autouse=True)
def _transformers_says_nothing() -> Iterator[None]:
    """Of RoPE's lengths, for instance."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("fuzzed") / "config.json"


@fuzzed(0.4)
@given(config=legal())
def test_a_legal_config_has_the_layers_that_it_names(file, config):
    file.write_text(json.dumps(config.document))
    with at_most(10):
        found = Step35Config.from_pretrained(file)
        assert found == Step35Config.from_dict(config.document)
    assert found.layers == config.plans
    plain = Step35Config.from_dict(config.plain)
    assert plain.layers == config.plans
    assert found.fingerprint == plain.fingerprint
    assert Step35Config.from_dict(found.to_dict()) == found
    decoder = config.plain["num_hidden_layers"]
    assert found.without_mtp().layers == config.plans[:decoder]


@fuzzed(0.2)
@given(case=wrong())
def test_a_wrong_field_is_named(case):
    document, field = case
    with at_most(10):
        problems = problems_of(document)
    assert any(problem.field.startswith(field) for problem in problems), problems


@fuzzed(0.2)
@given(document=mutated())
def test_a_mutated_config_is_refused_or_what_transformers_reads(document):
    _refused_or_right(lambda: Step35Config.from_dict(document))


@fuzzed(0.2)
@given(text=mutated_text())
def test_a_mutated_file_is_refused_or_what_transformers_reads(file, text):
    file.write_bytes(text)
    _refused_or_right(lambda: Step35Config.from_pretrained(file))


def _refused_or_right(read: Callable[[], Step35Config]) -> None:
    with at_most(10):
        try:
            config = read()
        except Step35ConfigError as error:
            lines = str(error).splitlines()
            assert len(lines) == 1 + len(error.problems) > 1  # noqa: PT017
            assert "Input should" not in str(error)  # noqa: PT017
            return
    assert len(config.layers) == config.num_hidden_layers + config.num_nextn_predict_layers
    assert Step35Config.from_dict(config.to_dict()) == config
    assert_as_transformers_reads(config)


def assert_as_transformers_reads(config: Step35Config) -> None:
    """The same decoder as transformers makes of the file, as far as it can have one."""
    known = {*Step35Config.model_fields, *ALIASES, *_OF_TRANSFORMERS}
    fields = {name: value for name, value in config.to_dict().items() if name in known}
    if not config.use_moe:  # which it does not know
        fields["moe_layers_enum"] = []
    reference = read_by_transformers(fields)
    decoder = config.layers[: config.num_hidden_layers]
    same = _SAME + (_SAME_OF_EXPERTS if any(plan.is_moe for plan in decoder) else ())
    assert {n: getattr(config, n) for n in same} == {n: getattr(reference, n) for n in same}
    columns = {
        "attention_type": reference.layer_types,
        "is_moe": [kind == "sparse" for kind in reference.mlp_layer_types],
        "num_attention_heads": [layer.num_attention_heads for layer in reference.per_layer_config],
        "swiglu_limit": _limits(reference.swiglu_limits, len(decoder)),
        "swiglu_limit_shared": _limits(reference.swiglu_limits_shared, len(decoder)),
    }
    for name, wanted in columns.items():
        assert [getattr(plan, name) for plan in decoder] == wanted, name
    for kind, rope in reference.rope_parameters.items():
        # It takes the first layer's for all, and knows nothing of yarn_only_types.
        first = next(plan for plan in decoder if plan.attention_type == kind)
        assert first.rotary_base == float(rope["rope_theta"])
        assert first.rotary_percent == rope.get("partial_rotary_factor", 1.0)
        if rope["rope_type"] == "llama3" and first.rope_scaling is not None:
            scaling = dataclasses.asdict(first.rope_scaling)
            assert _fractions(scaling) == _fractions({name: rope[name] for name in scaling})


def _fractions(values: dict[str, Any]) -> dict[str, Any]:
    """With the nearest of them for whole numbers."""
    return {n: value if isinstance(value, str) else float(value) for n, value in values.items()}


def _limits(limits: list[float | None] | None, layers: int) -> list[float | None]:
    return [limit or None for limit in limits or [None] * layers]
