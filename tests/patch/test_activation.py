"""Activation as a user meets it: an installed wheel, subprocesses, the real Megatron-Core.

Most tests run one script, whose assertions are the test's; `CHECK` is what they share.
"""

import pytest
from support.installed import PUBLISHED

megatron = pytest.mark.megatron


# --- nothing is imported that need not be ---------------------------------------------------------


def test_import_is_light(installed):
    done = installed.run("-X", "importtime", "-c", "import step35_patch")
    loaded = {line.split("|")[-1].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "step35_patch" in loaded
    assert not loaded & {"torch", "megatron", "numpy", "pydantic", "wrapt"}


@pytest.mark.parametrize("value", [None, "", "0"])
def test_nothing_is_imported_unless_the_variable_is_set(installed, without_package, value):
    variables = {} if value is None else {"STEP35_PATCH": value}
    loaded = set(installed.check("-c", "import sys; print(*sys.modules)", **variables).split())
    assert not {name for name in loaded if "step35" in name or name == "wrapt"}
    assert loaded == set(without_package.check("-c", "import sys; print(*sys.modules)").split())


def test_names_that_are_imported_on_first_use(installed):
    code = """
import sys, step35_patch
assert set(step35_patch.__all__) <= set(dir(step35_patch))
from step35_patch import LayerPlan, Step35Config, Step35ConfigError
assert issubclass(Step35ConfigError, ValueError)
assert "torch" not in sys.modules
try:
    step35_patch.Step35Konfig
except AttributeError as error:
    assert "Step35Konfig" in str(error)
else:
    raise AssertionError
"""
    installed.check("-c", code)


# --- the environment variable ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "legal"),
    [
        ("STEP35_PATCH", "yes", "'0' or '1'"),
        ("STEP35_ALLOW_UNTESTED", "true", "'0' or '1'"),
        ("STEP35_GATE_LAYOUT", "head-wise", "'headwise' or 'expanded'"),
        ("STEP35_WINDOW", "513", "'hf' or 'steptron'"),
        ("STEP35_PADDED_LOGITS", "no", "'masked' or 'kept'"),
        ("STEP35_CONFIG", "/no/such/config.json", "which does not exist"),
    ],
)
def test_a_wrong_variable_ends_the_program_before_it_begins(installed, name, value, legal):
    done = installed.run("-c", "print('ran')", **({"STEP35_PATCH": "1"} | {name: value}))
    assert done.returncode != 0
    assert done.stdout == ""
    reason = done.stderr.splitlines()[-1]
    assert name in reason and legal in reason and value in reason


def test_all_wrong_variables_are_told_at_once(installed):
    variables = {"STEP35_WINDOW": "513", "STEP35_GATE_LAYOUT": "x", "STEP35_CONFIG": "/nowhere"}
    done = installed.run("-c", "import step35_patch", **variables)
    assert done.returncode == 1
    assert all(f"{name}: expected" in done.stderr for name in variables)


@pytest.mark.parametrize("left", ["a1_step35_patch.pth", "step35_patch_startup.py"])
def test_a_broken_installation_ends_the_program_before_it_begins(installed, tmp_path, left):
    """Only the start-up files are there: the first alone, or both, without the package."""
    for file in {"a1_step35_patch.pth", left}:
        (tmp_path / file).write_bytes((installed.site_packages / file).read_bytes())
    start = f"import site; site.addsitedir({str(tmp_path)!r}); print('ran')"
    # -S: the environment's own, intact installation stays out.
    done = installed.run("-S", "-c", start, STEP35_PATCH="1")
    assert done.returncode != 0
    assert done.stdout == ""
    assert "step35_patch" in done.stderr.splitlines()[-1]
    assert installed.check("-S", "-c", start) == "ran\n"


def test_without_site_the_package_says_that_it_was_not_started(installed):
    code = "import sys; assert 'step35_patch' not in sys.modules; import step35_patch; print('ran')"
    done = installed.run("-S", "-c", code, STEP35_PATCH="1", PYTHONPATH=installed.site_packages)
    assert done.stdout == "ran\n"
    assert "a1_step35_patch.pth" in done.stderr
    assert installed.run("-c", "import step35_patch", STEP35_PATCH="1").stderr == ""


@megatron
def test_the_variable_alone_patches_an_unchanged_program(installed, script):
    program = script("""
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        assert layers(get_gpt_decoder_block_spec) == OURS
        assert layers(get_gpt_decoder_block_spec, step35=False) == STOCK
        """)
    installed.check(program, STEP35_PATCH="1", STEP35_CONFIG=PUBLISHED)


# --- order of imports -----------------------------------------------------------------------------


@megatron
def test_import_before_megatron(installed, script):
    program = script("""
        import step35_patch
        step35_patch.activate(PUBLISHED, window="steptron")
        waiting = step35_patch.status()
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        assert layers(get_gpt_decoder_block_spec) == OURS
        assert layers(get_gpt_decoder_block_spec, step35=False) == STOCK

        import megatron.core, megatron.training.arguments
        status = step35_patch.status()
        assert {target.state for target in waiting.targets} == {"waiting"}
        assert states(status) == {"wrapped"}
        assert (status.state, status.window, status.config) == ("active", "steptron", PUBLISHED)
        assert status.megatron_version == megatron.core.__version__
        assert waiting.megatron_version is None
        assert PUBLISHED in str(status) and status.version in str(status)
        """)
    installed.check(program)


@megatron
def test_import_after_megatron_rebinds_copies(installed, script, tmp_path):
    (tmp_path / "builders.py").write_text(
        "from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec as build\n"
    )
    program = script("""
        import megatron.training.arguments
        import builders
        from builders import build
        assert type(build).__name__ == "function"

        import step35_patch
        step35_patch.activate(PUBLISHED)
        from megatron.core.models.gpt import gpt_layer_specs
        assert build is builders.build is gpt_layer_specs.get_gpt_decoder_block_spec
        assert layers(build) == OURS
        assert layers(build, step35=False) == STOCK

        status = step35_patch.status()
        assert states(status) == {"wrapped"}
        (target,) = [t for t in status.targets if t.attribute == "get_gpt_decoder_block_spec"]
        assert {"__main__.build", "builders.build"} <= set(target.copies)
        assert "builders.build" in str(status)
        """)
    installed.check(program)


# --- off, on, twice -------------------------------------------------------------------------------


def test_deactivate_restores_and_twice_is_once(installed, script, tmp_path):
    (tmp_path / "late.py").write_text(
        "from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec as build\n"
    )
    program = script("""
        import functools, sys, threading
        from megatron.core.models.gpt import gpt_layer_specs, gpt_model
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec as build
        import megatron.training.arguments

        modules = [module for name, module in sys.modules.items() if "megatron" in name]

        def everything():
            callables = {
                (module.__name__, name): id(value)
                for module in modules for name, value in vars(module).items() if callable(value)
            }
            return callables, id(vars(gpt_model.GPTModel)["__init__"])

        before = everything()
        original = [build]  # in a list: a global of this script would be rebound
        import step35_patch
        step35_patch.activate(PUBLISHED)
        patched = everything()
        assert patched != before and build is not original[0]
        once = str(step35_patch.status())

        # Twice, also from several threads at once, is once.
        activate = functools.partial(step35_patch.activate, PUBLISHED)
        threads = [threading.Thread(target=activate) for _ in range(8)]
        for thread in threads: thread.start()
        for thread in threads: thread.join()
        assert everything() == patched
        assert str(step35_patch.status()) == once
        assert build.__wrapped__ is original[0]

        import late  # copies the wrapper
        held = functools.partial(build)  # which nothing can rebind
        step35_patch.deactivate()
        assert everything() == before
        assert build is late.build is original[0]
        assert step35_patch.status().state == "off"
        assert {target.state for target in step35_patch.status().targets} == {"off"}
        assert layers(held) == STOCK

        step35_patch.activate(PUBLISHED)
        assert everything() == patched
        assert layers(build) == layers(late.build) == layers(held) == OURS
        assert held.func is build
        """)
    installed.check(program)


def test_modules_imported_while_off_are_patched_later(installed, script):
    program = script("""
        import step35_patch, megatron.core
        step35_patch.deactivate()
        from megatron.core.models.gpt import gpt_layer_specs
        assert layers(gpt_layer_specs.get_gpt_decoder_block_spec) == STOCK
        step35_patch.activate(PUBLISHED)
        assert layers(gpt_layer_specs.get_gpt_decoder_block_spec) == OURS
        """)
    installed.check(program)


def test_somebody_elses_wrapper_is_respected(installed, script):
    program = script("""
        import functools, sys, step35_patch
        step35_patch.activate(PUBLISHED)
        from megatron.core.models.gpt import gpt_layer_specs
        ours = [gpt_layer_specs.get_gpt_decoder_block_spec]  # where nothing rebinds it

        def around(function):
            return functools.wraps(function)(lambda *args, **kwargs: function(*args, **kwargs))

        theirs = [around(around(ours[0]))]

        gpt_layer_specs.get_gpt_decoder_block_spec = theirs[0]
        step35_patch.deactivate()
        assert gpt_layer_specs.get_gpt_decoder_block_spec is theirs[0]
        assert layers(theirs[0]) == STOCK
        assert "step35_patch.patch.hooks" not in sys.modules  # ours, inside, does nothing while off
        step35_patch.activate(PUBLISHED)
        assert gpt_layer_specs.get_gpt_decoder_block_spec is theirs[0]  # ours is inside
        assert layers(theirs[0]) == OURS
        gpt_layer_specs.get_gpt_decoder_block_spec = ours[0].__wrapped__
        assert "replaced" in {target.state for target in step35_patch.status().targets}
        """)
    installed.check(program)


def test_patched_callables_look_like_the_originals(installed, script):
    program = script("""
        import copy, inspect, pickle
        from megatron.core.models.gpt import gpt_layer_specs, gpt_model
        builder = inspect.signature(gpt_layer_specs.get_gpt_decoder_block_spec)
        model = inspect.signature(gpt_model.GPTModel)
        GPTModel = gpt_model.GPTModel
        import step35_patch
        patched = gpt_layer_specs.get_gpt_decoder_block_spec
        assert type(patched).__name__ != "function"
        assert inspect.signature(patched) == builder
        assert inspect.signature(GPTModel) == model and gpt_model.GPTModel is GPTModel
        for again in (copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))):
            assert again(patched) is patched
            assert again(gpt_model.process_mtp_loss) is gpt_model.process_mtp_loss
        """)
    installed.check(program)


def test_a_wrong_argument_changes_nothing(installed, script, broken_config):
    program = script(f"""
        import step35_patch
        step35_patch.activate(PUBLISHED)
        before = str(step35_patch.status())
        for arguments, words in [
            (dict(gate_layout="x"), ("gate_layout", "'headwise' or 'expanded'", "'x'")),
            (dict(window="x"), ("window", "'hf' or 'steptron'", "'x'")),
            (dict(config={str(broken_config)!r}), ("head_dim", "-3")),
            (dict(config=3), ("config", "int")),
        ]:
            try:
                step35_patch.activate(**arguments)
            except (ValueError, TypeError) as error:
                assert all(word in str(error) for word in words), error
            else:
                raise AssertionError(arguments)
            assert str(step35_patch.status()) == before
        step35_patch.activate(json.load(open(PUBLISHED)))
        assert step35_patch.status().config == "<object>"
        """)
    installed.check(program)


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_variable", [True, False])
def test_a_broken_config_stops_the_program(installed, script, broken_config, by_variable):
    program = script("""
        import step35_patch
        for attempt in range(2):
            try:
                import megatron.core.models.gpt.gpt_layer_specs
            except ImportError:  # as programs write it; a config error is none
                pass
            except ValueError as error:
                assert "head_dim" in str(error)
        assert "head_dim" in str(step35_patch.status())
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        print("ran")
        """)
    variables = {"STEP35_PATCH": "1"} if by_variable else {}
    done = installed.run(program, STEP35_CONFIG=broken_config, **variables)
    assert done.returncode != 0
    assert done.stdout == ""
    last = done.stderr.splitlines()[-1]
    assert "head_dim" in last and "-3" in last


@megatron
def test_an_untested_megatron_is_refused_at_every_attempt(installed, script):
    program = script("""
        import os, warnings, wrapt
        wrapt.register_post_import_hook(
            lambda module: setattr(module, "__version__", "0.20.1"), "megatron.core.package_info"
        )
        import step35_patch

        for attempt in range(3):
            try:
                from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
            except ImportError as error:
                assert isinstance(error, step35_patch.Step35ActivationError)
                for part in ("0.20.1", ">=0.17,<0.20", "STEP35_ALLOW_UNTESTED=1"):
                    assert part in str(error), error
            else:
                raise AssertionError(f"attempt {attempt} went through")
            report = step35_patch.status()
            assert "refused" in {target.state for target in report.targets}
            assert "0.20.1" in str(report)

        os.environ["STEP35_ALLOW_UNTESTED"] = "1"
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step35_patch.activate(PUBLISHED)
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        assert any("0.20.1" in str(warning.message) for warning in caught)
        assert layers(get_gpt_decoder_block_spec) == OURS
        assert "refused" not in {target.state for target in step35_patch.status().targets}
        """)
    installed.check(program, STEP35_ALLOW_UNTESTED="0")


@megatron
def test_an_untested_megatron_that_is_imported_already_is_refused(installed, script):
    program = script("""
        import megatron.core.package_info
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        megatron.core.package_info.__version__ = "0.20.1"
        for attempt in range(2):
            try:
                import step35_patch
            except ImportError as error:
                assert "0.20.1" in str(error)
            else:
                raise AssertionError
        assert type(get_gpt_decoder_block_spec).__name__ == "function"
        """)
    installed.check(program, STEP35_ALLOW_UNTESTED="0")


@megatron
@pytest.mark.parametrize("first", ["step35_patch", "megatron.core.models.gpt.gpt_layer_specs"])
def test_a_missing_target_is_refused(installed, script, first):
    program = script(f"""
        import importlib
        import step35_patch.patch.targets
        from step35_patch.patch import activation
        step35_patch.deactivate()
        module = "megatron.core.models.gpt.gpt_layer_specs"
        activation.TARGETS += (step35_patch.patch.targets.Target(module, "no_such_builder", "x"),)
        optional = step35_patch.patch.targets.Target(module, "no_such_option", "x", required=False)
        activation.TARGETS += (optional,)
        importlib.import_module({first!r})
        for attempt in range(2):
            try:
                step35_patch.activate(PUBLISHED)
                importlib.import_module(module)
            except step35_patch.Step35ActivationError as error:
                assert "no_such_builder" in str(error) and "no_such_option" not in str(error)
            else:
                raise AssertionError
        kept = (t for t in activation.TARGETS if t.attribute != "no_such_builder")
        activation.TARGETS = tuple(kept)
        step35_patch.activate(PUBLISHED)
        assert layers(importlib.import_module(module).get_gpt_decoder_block_spec) == OURS
        missing = [t.attribute for t in step35_patch.status().targets if t.state == "missing"]
        # Some releases lack other optional ones.
        assert [n for n in missing if n.startswith("no_such")] == ["no_such_option"]
        """)
    installed.check(program)
