"""Runs a Megatron-LM script as it is, on the CPU: real_script.py SCRIPT ARGS.

Only the stand-in for CUDA is put in front, and that for Transformer Engine's kernels if it is
tested; step35_patch is activated by STEP35_PATCH=1 or, where its start-up file is not installed, by
the import below.
"""

import os
import sys

from support import implementation

# In processes started by "spawn" too, such as the writer of checkpoints, which import this file
# under another name.
implementation.install(cudnn=True)

if __name__ == "__main__":
    del sys.argv[0]
    sys.path.insert(0, os.path.dirname(os.path.abspath(sys.argv[0])))
    # In this module: with runpy those processes would import the script itself in its place, before
    # anything stands in.
    with open(sys.argv[0]) as script:
        exec(compile(script.read(), sys.argv[0], "exec"))
