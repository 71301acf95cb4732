"""The launcher, `python -m step35_patch`, from an installed wheel."""

import textwrap

import pytest
from support.installed import PUBLISHED, ROOT


def test_launcher_runs_a_script_as_python_does(installed, tmp_path):
    (tmp_path / "beside.py").write_text("")
    program = tmp_path / "program.py"
    program.write_text(
        "import os, sys\n"
        "if '-m' not in sys.orig_argv: import step35_patch\n"
        "import beside, step35_patch\n"
        "assert step35_patch.status().state != 'off'\n"
        "main = sys.modules['__main__'].__dict__ is globals()\n"
        "print([__name__, __file__, sys.argv, sys.path[0], main])\n"
        "sys.exit(3)\n"
    )
    plain = installed.run(program, "-m", "--flag", "x")
    launched = installed.run("-m", "step35_patch", program, "-m", "--flag", "x")
    assert plain.returncode == launched.returncode == 3, launched.stderr
    assert plain.stdout == launched.stdout
    assert launched.stderr == ""


def test_launcher_runs_a_module(installed):
    code = installed.check("-m", "step35_patch", "-m", "json.tool", "--help")
    assert "json" in code


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no_such_script.py", "x"), ("no_such_script.py", "no such file", "usage:")),
        ((), ("usage:",)),
        (("-m",), ("usage:",)),
        (("--tensor-model-parallel-size", "2"), ("usage:",)),
    ],
)
def test_launcher_without_a_script(installed, arguments, words):
    done = installed.run("-m", "step35_patch", *arguments)
    assert done.returncode == 2
    assert all(word in done.stderr for word in words)
    assert "Traceback" not in done.stderr


def test_launched_script_can_spawn_and_start_patched_processes(installed, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import concurrent.futures, multiprocessing, subprocess, sys

            STATE = "import sys; print('step35_patch' in sys.modules)"

            def child(number):  # found by its name in the spawned process
                return __name__, sys.modules["step35_patch"].status().state, number

            if __name__ == "__main__":
                print("main runs")
                spawn = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    print(pool.submit(child, 7).result())
                sys.stdout.flush()
                subprocess.run([sys.executable, "-c", STATE], check=True)
            """)
    )
    output = installed.check("-m", "step35_patch", program)
    assert output.splitlines() == ["main runs", "('__mp_main__', 'inert', 7)", "True"]


def test_launcher_in_a_checkout_that_is_not_installed(without_package, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent("""
            import concurrent.futures, multiprocessing

            if __name__ == "__main__":
                import step35_patch
                spawn = multiprocessing.get_context("spawn")
                with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
                    print(pool.submit(step35_patch.status).result().state)
            """)
    )
    done = without_package.run("-m", "step35_patch", program, cwd=ROOT)
    assert done.stdout == "inert\n", done.stderr


def test_launcher_says_when_children_stay_unpatched(installed, tmp_path):
    (tmp_path / "program.py").write_text("print('ran')")
    arguments = ("-S", "-m", "step35_patch", tmp_path / "program.py")
    done = installed.run(*arguments, PYTHONPATH=installed.site_packages)
    assert done.stdout == "ran\n"
    assert "processes that it starts are not" in done.stderr


@pytest.mark.slow
def test_torchrun(installed, script, broken_config):
    program = script("""
        import os, sys
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
        assert layers(get_gpt_decoder_block_spec) == OURS
        print("rank", os.environ["RANK"], sys.argv[1:])
        """)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    arguments = (*torchrun, "-m", "step35_patch", program, "--x")
    lines = installed.check(*arguments, STEP35_CONFIG=PUBLISHED).splitlines()
    assert sorted(lines) == ["rank 0 ['--x']", "rank 1 ['--x']"]

    done = installed.run(*arguments, STEP35_CONFIG=broken_config)
    assert done.returncode != 0
    assert "rank" not in done.stdout
    assert "head_dim" in done.stderr
