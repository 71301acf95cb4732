"""Runs a Megatron-LM script as it is, on the CPU: real_script.py SCRIPT ARGS.

Only the stand-in for CUDA is put in front; step35_patch is activated by STEP35_PATCH=1 or, where
its start-up file is not installed, by the import below.
"""

import os
import runpy
import sys

from step35_patch import cpu

cpu.install()  # in processes started by "spawn" too, which import this file under another name

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    runpy.run_path(sys.argv[0], run_name="__main__")
