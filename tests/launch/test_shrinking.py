"""Models in a size for a CPU: layers of the same kinds, in the same order."""

from __future__ import annotations

from step35_patch import Step35Config
from step35_patch.config.model import packaged_config_path
from step35_patch.launch.shrinking import shrunk, with_layers


def test_shrunk_model_has_the_layers_of_the_published_one():
    published = Step35Config.from_pretrained(packaged_config_path())
    small = Step35Config.from_dict(shrunk(published, tensor=16, expert=12, length=48))
    assert len(small.layers) == len(published.layers) == 48
    for ours, theirs in zip(small.layers, published.layers, strict=True):
        for name in ("is_moe", "is_mtp", "rotary_base"):
            assert getattr(ours, name) == getattr(theirs, name)
        for name in ("window_size", "rope_scaling", "swiglu_limit", "swiglu_limit_shared"):
            assert (getattr(ours, name) is None) == (getattr(theirs, name) is None)
        ratio = ours.num_attention_heads / small.layers[0].num_attention_heads
        assert ratio == theirs.num_attention_heads / published.layers[0].num_attention_heads
    assert small.moe_num_experts == 12 and small.num_attention_groups == 16


def test_some_layers_of_a_model_are_what_they_were():
    published = Step35Config.from_pretrained(packaged_config_path())
    kept = [0, 1, 2, 17, 43, 44]
    small = with_layers(published, kept, 2)
    for plan, index in zip(small.layers, [*kept, 45, 46], strict=True):
        before = published.layers[index]
        for name in (
            "attention_type",
            "is_moe",
            "is_mtp",
            "rotary_base",
            "rotary_percent",
            "swiglu_limit",
            "swiglu_limit_shared",
            "num_attention_heads",
            "window_size",
        ):
            assert getattr(plan, name) == getattr(before, name), (index, name)
