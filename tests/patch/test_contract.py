"""What is relied on in Megatron-Core is held against what is there, whatever its version."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest

import step35_patch
from step35_patch.patch import activation, contract, hooks
from step35_patch.patch.targets import CONFIG_FIELDS, NATIVE_FIELDS, SEES_CONFIG, TARGETS, Target
from step35_patch.settings import Step35ActivationError

REPORT = Target("their.module", "report", "moe_metrics", parameters=("args",), reports=True)
LOSS = Target("their.module", "Model.loss", "process_mtp_loss", parameters=("config", "labels"))


def module(source: str, name: str = "their.module") -> ModuleType:
    made = ModuleType(name)
    exec(source, vars(made))
    return made


@pytest.mark.megatron
def test_this_megatron_core_is_what_is_known():
    looked_at = 0
    for name in sorted({target.module for target in TARGETS}):
        if name.startswith("megatron.bridge"):
            continue
        try:
            theirs = importlib.import_module(name)
        except ModuleNotFoundError:  # of a target that not each release has
            continue
        targets = [target for target in TARGETS if target.module == name]
        assert contract.drifts(theirs, targets) == []
        looked_at += 1
    assert looked_at > 12


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("class Model:\n    def loss(self, config, labels=None): pass", None),
        ("class Model:\n    def loss(self, config, *args, labels=None, **kwargs): pass", None),
        ("class Model:\n    def loss(self, *args, **kwargs): pass", "give it functools.wraps"),
        ("class Model:\n    pass", None),  # a missing target is said elsewhere
        ("class Model:\n    def loss(self, config): pass", "expected the parameter labels, found"),
        (
            "class Model:\n    def loss(self, cfg, x): pass",
            "parameters config, labels, found (self",
        ),
    ],
)
def test_parameters_that_are_gone_are_found(source, words):
    found = contract.drifts(module(source), [LOSS])
    assert [words in drift.what and not drift.reports for drift in found] == [True] * bool(words)


def test_a_drift_is_refused_or_warned_of(monkeypatch):
    theirs = module("def report(): pass\nclass Model:\n    def loss(self): pass")
    both = contract.drifts(theirs, [REPORT, LOSS])
    only = contract.drifts(theirs, [REPORT])
    for allowed in ("0", "1"):
        monkeypatch.setenv("STEP35_ALLOW_UNTESTED", allowed)
        with pytest.raises(Step35ActivationError, match=r"Model.loss: .* Install a released one"):
            activation._check_contract(theirs, both)
    with pytest.warns(RuntimeWarning, match="only reports depend on it"):
        activation._check_contract(theirs, only)
    monkeypatch.delenv("STEP35_ALLOW_UNTESTED")
    with pytest.raises(Step35ActivationError, match="report: expected the parameter args"):
        activation._check_contract(theirs, only)


@pytest.mark.parametrize("change", ["gone", *NATIVE_FIELDS])
def test_fields_of_the_config(monkeypatch, change):
    """Of a copy that says that it is a tested version, and is a branch with other fields."""
    from megatron.core.transformer import transformer_config

    real = [
        (field.name, field.type)
        for field in dataclasses.fields(transformer_config.TransformerConfig)
    ]
    if change == "gone":
        fields = [field for field in real if field[0] != "cp_comm_type"]
        words = "TransformerConfig: expected the fields cp_comm_type"
    else:
        fields, words = (
            [*real, (change, object)],
            f"{NATIVE_FIELDS[change]} in Megatron-Core itself",
        )
    other = dataclasses.make_dataclass("TransformerConfig", [(name, object) for name, _ in fields])
    monkeypatch.setattr(transformer_config, "TransformerConfig", other)
    [drift] = contract.drifts(sys.modules[SEES_CONFIG], [])
    assert words in drift.what
    assert not drift.reports


def test_every_parameter_that_a_wrapper_binds_is_named():
    """`call["x"]` of a hook is a parameter of its targets, or the hook fails at a call."""
    tree = ast.parse(Path(hooks.__file__).read_bytes())
    bound = {}
    for function in tree.body:
        if isinstance(function, ast.FunctionDef):
            bound[function.name] = {
                node.slice.value
                for node in ast.walk(function)
                if isinstance(node, ast.Subscript)
                and isinstance(node.slice, ast.Constant)
                and isinstance(node.slice.value, str)
                and (
                    ast.unparse(node.value) == "call"
                    or ast.unparse(node.value).startswith("_bind(")
                )
                # What is put in is new, or was read before.
                and isinstance(node.ctx, ast.Load)
            }
    for target in TARGETS:
        if not target.module.startswith("megatron.bridge"):
            assert bound[target.wrapper] <= set(target.parameters), target.attribute


def test_every_field_that_layers_read_is_named():
    from megatron.core.transformer.transformer_config import TransformerConfig

    there = {field.name for field in dataclasses.fields(TransformerConfig)}
    assert set(CONFIG_FIELDS) <= there
    package = Path(step35_patch.__file__).parent
    read = {
        node.attr
        for file in (package / "model" / "layer.py", package / "model" / "attention.py")
        for node in ast.walk(ast.parse(file.read_bytes()))
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("config", "self.config")
        and node.attr in there
    }
    assert read - set(CONFIG_FIELDS) <= {"overlap_p2p_comm"}
