"""A config that transformers saved: its per-layer fields, translated to the published ones.

`Step3p7TextConfig.save_pretrained` writes `mlp_layer_types` for `moe_layers_enum`,
`num_sliding_attention_heads` and `per_layer_config` for `attention_other_setting`,
`rope_parameters` (one object for each layer type) for the RoPE lists, and the MTP layers' types
apart. On loading, transformers prefers these to the published ones, so a file with both is
refused. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

from step35_patch.config.errors import ConfigProblem, found_text
from step35_patch.config.layer_plan import LAYER_TYPES, SLIDING_ATTENTION

_UNSCALED_KEYS = ("rope_theta", "partial_rotary_factor")


class Resaved:
    """The fields of one config, translated on construction.

    Args:
        fields: As the file has them, lists as tuples, otherwise unchecked.

    Attributes:
        fields: The fields in the published form.
        origins: For each published field that the file has in transformers' form, its name there;
            also where a problem kept it from being translated.
        problems: What cannot be translated.
    """

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self.fields = dict(fields)
        self.origins: dict[str, str] = {}
        self.problems: list[ConfigProblem] = []
        self._layer_types()
        self._moe_layers()
        self._sliding_heads()
        self._rope()

    def _take(self, name: str) -> Any:
        """Remove a field; None if it is missing or null, which transformers takes alike."""
        return self.fields.pop(name, None)

    def _put(self, name: str, value: Any, origin: str) -> None:
        if self.fields.get(name) is not None:
            self._refuse(name, f"either this field or {origin}", f"both {name} and {origin}")
        else:
            self.fields[name], self.origins[name] = value, origin

    def _leave(self, name: str, origin: str) -> None:
        """Note that the file has `name` as `origin`, so that it is not reported as missing."""
        if self.fields.get(name) is None:
            self.fields.pop(name, None)
            self.origins[name] = origin

    def _refuse(self, field: str, expected: str, found: str) -> None:
        self.problems.append(ConfigProblem(field, expected, found))

    def _layer_types(self) -> None:
        tail, types = self._take("mtp_layer_types"), self.fields.get("layer_types")
        if tail is None or not isinstance(types, tuple):
            return
        if not isinstance(tail, tuple):
            self._refuse("mtp_layer_types", "a list of layer types", found_text(tail))
        elif len(types) != self.fields.get("num_hidden_layers"):
            expected = "num_hidden_layers entries, as mtp_layer_types has the rest"
            self._refuse("layer_types", expected, f"a list of {len(types)}")
        else:
            self.fields["layer_types"] = types + tail

    def _moe_layers(self) -> None:
        kinds, mtp_kinds = self._take("mlp_layer_types"), self._take("mtp_mlp_layer_types")
        if mtp_kinds is not None and not _all_in(mtp_kinds, ("dense",)):
            self._refuse("mtp_mlp_layer_types", 'a list of "dense"', found_text(mtp_kinds))
        if kinds is None:
            return
        layers = self.fields.get("num_hidden_layers")
        if _all_in(kinds, ("dense", "sparse")) and len(kinds) == layers:
            moe = tuple(index for index, kind in enumerate(kinds) if kind == "sparse")
            self._put("moe_layers_enum", moe, "mlp_layer_types")
        else:
            expected = 'a list of "dense" and "sparse", num_hidden_layers of them'
            self._refuse("mlp_layer_types", expected, found_text(kinds))
            self._leave("moe_layers_enum", "mlp_layer_types")

    def _sliding_heads(self) -> None:
        heads = self._take("num_sliding_attention_heads")
        if heads is not None:
            setting = {"attention_type": SLIDING_ATTENTION, "num_attention_heads": heads}
            self._put("attention_other_setting", setting, "num_sliding_attention_heads")
        by_layer, types = self._take("per_layer_config"), self.fields.get("layer_types")
        layers = self.fields.get("num_hidden_layers")
        if by_layer is None or not _all_in(types, LAYER_TYPES) or type(layers) is not int:
            return
        # transformers writes the keys as "01", "02", ..., and none where nothing differs.
        given = by_layer.items() if isinstance(by_layer, Mapping) else [("", by_layer)]
        overrides = {f"{key}".lstrip("0") or "0": entry for key, entry in given}
        main = self.fields.get("num_attention_heads")
        for index, layer_type in enumerate(types[:layers]):
            expected = heads if layer_type == SLIDING_ATTENTION else main
            if overrides.get(f"{index}", {"num_attention_heads": main}) == {
                "num_attention_heads": expected
            }:
                overrides.pop(f"{index}", None)
            else:
                overrides.setdefault(f"{index}", None)
        if overrides:
            text = "the num_sliding_attention_heads of each sliding layer, and nothing else"
            self._refuse("per_layer_config", text, found_text(by_layer))

    def _rope(self) -> None:
        by_type = self._take("rope_parameters")
        types = self.fields.get("layer_types")
        if by_type is None:
            return
        for name in ("rope_theta", "partial_rotary_factors", "rope_scaling"):
            self._leave(name, "rope_parameters")
        if not _all_in(types, LAYER_TYPES):
            return
        used = tuple(dict.fromkeys(types))
        if not isinstance(by_type, Mapping) or not all(
            isinstance(by_type.get(layer_type), Mapping) for layer_type in used
        ):
            expected = f"an object for each of {' and '.join(used)}"
            self._refuse("rope_parameters", expected, found_text(by_type))
            return
        for name, key, default in (
            ("rope_theta", "rope_theta", None),
            ("partial_rotary_factors", "partial_rotary_factor", 1.0),
        ):
            numbers = tuple(by_type[layer_type].get(key, default) for layer_type in types)
            self._put(name, numbers, "rope_parameters")
        scalings = {}
        for layer_type in used:
            rest = {k: v for k, v in by_type[layer_type].items() if k not in _UNSCALED_KEYS}
            if rest.get("rope_type") != "default":
                scalings[layer_type] = rest
        if not scalings:
            return
        scaling, *others = scalings.values()
        if any(other != scaling for other in others):
            expected = "one scaling for all scaled layer types"
            self._refuse("rope_parameters", expected, found_text(by_type))
        self._put("rope_scaling", scaling, "rope_parameters")
        # The published list outlives a save, although transformers does not read it.
        given = self._take("yarn_only_types")
        if given is not None and not (
            _all_in(given, tuple(scalings)) and len(given) == len(scalings)
        ):
            expected = f"{found_text(list(scalings))}, as in rope_parameters"
            self._refuse("yarn_only_types", expected, found_text(given))
        self._put("yarn_only_types", tuple(scalings), "rope_parameters")


def _all_in(values: Any, legal: tuple[str, ...]) -> TypeGuard[tuple[str, ...]]:
    return isinstance(values, tuple) and all(value in legal for value in values)
