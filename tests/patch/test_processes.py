"""Threads, worker processes, and places where nothing can be written, from an installed wheel."""

import subprocess

import pytest
from support.installed import PUBLISHED, environment

# A thread that is held up in the import of a module, by a method of its loader, until it may go on.
HELD_UP = """
import importlib, importlib.machinery, sys, threading
reached, go_on = threading.Event(), threading.Event()
NAME = "megatron.core.models.gpt.gpt_layer_specs"

class Slow:
    def __init__(self, name, method):
        self.name, self.method = name, method

    def find_spec(self, name, path=None, target=None):
        if name != self.name:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        real = getattr(spec.loader, self.method)

        def method(argument):
            reached.set()
            assert go_on.wait(60)
            return real(argument)

        setattr(spec.loader, self.method, method)
        return spec

def start(name):
    thread = threading.Thread(target=importlib.import_module, args=(name,), daemon=True)
    thread.start()
    return thread

def held_up(name, method):
    sys.meta_path.insert(0, Slow(name, method))
    thread = start(name)
    assert reached.wait(60)
    return thread
"""


@pytest.mark.megatron
def test_module_that_another_thread_has_found_already(installed, script):
    """It has not begun to run when hooks are left, and is seen by the first wrapped function."""
    program = script(f"""
        {HELD_UP.replace(chr(10), chr(10) + " " * 8)}
        import megatron.core.models.gpt
        held = held_up(NAME, "create_module")
        start("step35_patch").join()
        go_on.set()
        held.join()

        from megatron.core.models.gpt import gpt_layer_specs, gpt_model
        import step35_patch
        try:
            gpt_model.process_mtp_loss()
        except TypeError:
            pass
        assert type(gpt_layer_specs.get_gpt_decoder_block_spec).__name__ != "function"
        step35_patch.activate(PUBLISHED)
        assert states(step35_patch.status()) == {{"wrapped"}}
        assert layers(gpt_layer_specs.get_gpt_decoder_block_spec) == OURS
        """)
    installed.check(program)


def test_threads_that_import_a_package_and_its_module(installed, script):
    """wrapt's finder would wait for the package, whose thread would wait for the finder."""
    program = script(f"""
        {HELD_UP.replace(chr(10), chr(10) + " " * 8)}
        import time
        import step35_patch
        step35_patch.activate(PUBLISHED)
        import megatron.core.models.common
        held = held_up("megatron.core.models.gpt", "exec_module")
        module = start(NAME)
        time.sleep(0.5)
        go_on.set()
        for thread in (held, module):
            thread.join(60)
            assert not thread.is_alive(), "they wait for each other"
        from megatron.core.models.gpt import gpt_layer_specs
        assert layers(gpt_layer_specs.get_gpt_decoder_block_spec) == OURS
        assert "_TellingLoader" not in repr(gpt_layer_specs.__spec__.loader)
        """)
    installed.check(program)


@pytest.mark.slow
@pytest.mark.megatron
def test_workers_have_what_their_program_has(installed, script):
    """A fork all of it, a new interpreter what the variables say."""
    program = script("""
        import multiprocessing, os

        def state():
            import step35_patch
            from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
            status = step35_patch.status()
            return status.state, status.window, layers(get_gpt_decoder_block_spec) == OURS

        def worker(queue):
            queue.put(state())

        def of_a_worker(method):
            context = multiprocessing.get_context(method)
            queue = context.SimpleQueue()
            process = context.Process(target=worker, args=(queue,))
            process.start()
            found = queue.get()
            process.join()
            return found

        if __name__ == "__main__":
            assert state() == ("active", "hf", True)
            assert of_a_worker("spawn") == ("active", "hf", True)
            import step35_patch
            step35_patch.activate(PUBLISHED, window="steptron")
            assert of_a_worker("fork") == ("active", "steptron", True)
        """)
    installed.check(program, STEP35_PATCH="1", STEP35_CONFIG=PUBLISHED)


def test_environment_that_cannot_be_written_to(installed, script, tmp_path):
    """As an image of a container, in which no user is known either."""
    program = script("""
        import os
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        import step35_patch
        assert step35_patch.__file__.startswith(os.environ["PLACE"]), step35_patch.__file__
        try:
            open(step35_patch.__file__, "a")
        except OSError:
            print("closed")
        assert layers(get_gpt_decoder_block_spec) == OURS
        """)
    place = tmp_path / "image"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "--bind", "-o", "ro", installed.folder, place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"nothing can be mounted here: {mounted.stderr.decode()}")
    try:
        variables = environment(
            STEP35_PATCH="1", STEP35_CONFIG=PUBLISHED, PLACE=place, TMPDIR=place, LC_ALL="C"
        )
        done = subprocess.run(
            [place / "bin" / "python", program],
            capture_output=True,
            text=True,
            cwd="/",
            env={name: variables[name] for name in variables if name not in ("HOME", "USER")},
        )
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "closed\n"
