"""The plug-in of verl: an installed wheel, and subprocesses that import as verl does."""

import pytest

# Megatron-Bridge, and this package's module for it, as far as importing goes.
BRIDGE = """
import importlib.abc, importlib.machinery, sys

class Bridges(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    problem, runs = None, 0

    def find_spec(self, name, path=None, target=None):
        if name in ("megatron.bridge", "megatron.bridge.models", "step35_patch.bridge"):
            package = name == "megatron.bridge"
            return importlib.machinery.ModuleSpec(name, self, is_package=package)

    def exec_module(self, module):
        if module.__name__ == "megatron.bridge":
            import megatron.bridge.models
        elif module.__name__ == "step35_patch.bridge":
            import megatron.bridge.models
            self.runs += 1
            if self.problem is not None:
                raise self.problem

bridges = Bridges()
sys.meta_path.insert(0, bridges)
"""

# As verl 0.9.1 does when it is imported.
VERL = """
import sys
from importlib.metadata import entry_points
found = entry_points(group="verl.plugins")
assert [point.name for point in found] == ["step35_patch"]
for point in found:
    try:
        point.load()
    except Exception:
        pass
"""

megatron = pytest.mark.megatron


@pytest.mark.parametrize(
    ("variables", "active"),
    [({}, True), ({"STEP35_PATCH": "1"}, True), ({"STEP35_PATCH": "0"}, False)],
)
def test_verl_activates_the_package_and_nothing_else(installed, variables, active):
    loaded = "print('step35_patch' in sys.modules, 'megatron' in sys.modules)"
    assert installed.check("-c", VERL + loaded, **variables) == f"{active} False\n"


def test_verl_does_not_go_on_with_a_refusal(installed):
    """It would pass over any exception, and train another model."""
    done = installed.run("-c", VERL + "print('went on')", STEP35_WINDOW="513")
    assert done.returncode == 1
    assert "went on" not in done.stdout
    assert "plug-in of verl" in done.stderr
    assert "STEP35_WINDOW: expected 'hf' or 'steptron', found '513'" in done.stderr


@megatron
@pytest.mark.parametrize(
    "imports",
    ["import megatron.bridge", "import step35_patch.bridge, megatron.bridge"],
    ids=["Megatron-Bridge", "ours first"],
)
def test_step35_comes_with_megatron_bridge(installed, imports):
    installed.check("-c", f"{BRIDGE}{VERL}{imports}\nassert bridges.runs == 1")
    installed.check("-c", f"{BRIDGE}{imports}{VERL}\nassert bridges.runs == 1")


@megatron
def test_megatron_bridge_is_not_to_be_had_without_it(installed):
    """Its own Step-3.5 would be taken instead: each import fails, until the reason is gone."""
    code = """
bridges.problem = ImportError("no such Megatron-Bridge")
for _ in range(2):
    try:
        import megatron.bridge
    except ImportError as error:
        assert str(error) == "no such Megatron-Bridge"
    else:
        raise AssertionError("imported")
bridges.problem = None
import megatron.bridge
assert bridges.runs == 3
"""
    installed.check("-c", BRIDGE + VERL + code)
