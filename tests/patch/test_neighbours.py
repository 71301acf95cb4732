"""Other patches of the same functions, there before this package: each stays inside its wrapper.

Those that come after it are in tests/patch/test_activation.py. As trainers' own patches do it, an
attribute is exchanged, with functools.wraps, by wrapt, or without saying what it stands for.
"""

import pytest


@pytest.mark.megatron
def test_wrappers_that_were_there_before(installed, script):
    program = script("""
        import functools, sys, wrapt
        from megatron.core.models.gpt import gpt_layer_specs, gpt_model
        calls = []

        @wrapt.decorator
        def counted(wrapped, instance, args, kwargs):
            calls.append(wrapped.__name__)
            return wrapped(*args, **kwargs)

        def plain(function):
            @functools.wraps(function)
            def around(*args, **kwargs):
                calls.append(function.__name__)
                return function(*args, **kwargs)
            return around

        gpt_layer_specs.get_gpt_decoder_block_spec = counted(
            gpt_layer_specs.get_gpt_decoder_block_spec
        )
        gpt_model.GPTModel.__init__ = plain(gpt_model.GPTModel.__init__)
        gpt_layer_specs.get_gpt_decoder_layer_specs = plain(
            gpt_layer_specs.get_gpt_decoder_layer_specs
        )
        theirs = vars(gpt_layer_specs) | {"init": vars(gpt_model.GPTModel)["__init__"]}

        import step35_patch
        step35_patch.activate(PUBLISHED)
        assert layers(gpt_layer_specs.get_gpt_decoder_block_spec) == OURS
        assert "get_gpt_decoder_block_spec" in calls
        assert layers(gpt_layer_specs.get_gpt_decoder_block_spec, step35=False) == STOCK
        import megatron.training.arguments
        assert states(step35_patch.status()) == {"wrapped"}
        calls.clear()
        try:
            gpt_model.GPTModel(config_of(False), None, 8, 8)
        except Exception:
            pass
        assert calls == ["__init__"]

        step35_patch.deactivate()
        for name in ("get_gpt_decoder_block_spec", "get_gpt_decoder_layer_specs"):
            assert vars(gpt_layer_specs)[name] is theirs[name]
        assert vars(gpt_model.GPTModel)["__init__"] is theirs["init"]

        # One that does not say what it stands for.
        inner = gpt_layer_specs.get_gpt_decoder_block_spec
        gpt_layer_specs.get_gpt_decoder_block_spec = lambda *args, **kwargs: inner(*args, **kwargs)
        for attempt in range(2):
            try:
                step35_patch.activate(PUBLISHED)
            except step35_patch.Step35ActivationError as error:
                for part in ("get_gpt_decoder_block_spec", "__main__.<lambda>", "functools.wraps"):
                    assert part in str(error), error
            else:
                raise AssertionError("went on")
        """)
    installed.check(program)
