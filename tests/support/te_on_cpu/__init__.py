"""A stand-in for Transformer Engine's compiled extension, so that its Python runs on a CPU.

    from step35_patch import cpu
    cpu.install()
    from support import te_on_cpu
    te_on_cpu.install()    # before the first `import megatron`
    import transformer_engine.pytorch

`install()` imports the unmodified Python of the `transformer-engine` wheel (without its shared
libraries it is pure Python) with the module of `extension.py` in place of the shared library
`transformer_engine_torch` (`tex` in Transformer Engine's code). All Python above that boundary is
the real one: modules, autograd functions, attention's choice of a backend, the optimizers. Each
kernel computes with torch what the kernel of its name is documented to compute; signatures and
returned tuples are those of csrc/extensions/pybind.cpp of 2.20.2.

Kernels that are written in Triton, such as those of permutation, run in Triton's interpreter. What
it can show: names, shapes, layouts, the wiring of modules, arguments that reach kernels. What
it cannot: the kernels' numbers and limits, streams and races, anything with FP8. Attention runs in
Transformer Engine's own unfused torch backend, because flash-attn is absent and
`get_fused_attn_backend` says that cuDNN has no kernel; with `install(cudnn=True)` in its
FusedAttention, whose kernels are in fused_attention.py.

Where it meets Transformer Engine and Megatron-Core:

- Importing Transformer Engine without a device needs NVTE_PROJECT_BUILDING, which must not stay.
- NVTE_FLASH_ATTN and its kin must not be set: Megatron-Core sets them, and asserts on others.
- Where Transformer Engine is installed, Megatron-Core's local path calls its kernels too, for the
  output layers (generic_gemm) and in Adam.
- Transformer Engine draws its weights on the CPU's generator here: random starts differ from the
  local path's. Compare from one checkpoint.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import sys
import types

import torch

# The modules are imported for the kernels that they register.
from support.te_on_cpu import (  # noqa: F401
    activations,
    apex,
    attention,
    fused_attention,
    matmul,
    norms,
    optimizers,
    rope,
    router,
    thd,
)
from support.te_on_cpu.extension import NAME, VERSION, Extension, calls

__all__ = ["VERSION", "calls", "install"]


def install(cudnn: bool = False) -> types.ModuleType:
    """Make `import transformer_engine.pytorch` work on this CPU; a second call does nothing.

    Args:
        cudnn: let Transformer Engine find cuDNN's attention (`fused_attention`), which alone
            knows context parallelism here. Otherwise it uses its own unfused attention.

    Returns:
        The stand-in, as sys.modules["transformer_engine_torch"].

    Raises:
        RuntimeError: torch.cuda has not been stood in for; the real extension or Megatron-Core
            is imported already; Transformer Engine is of another version than VERSION.
        ModuleNotFoundError: the transformer_engine package is not installed.
    """
    present = sys.modules.get(NAME)
    if isinstance(present, Extension):
        if cudnn:
            fused_attention.offer()
        return present
    if present is not None:
        raise RuntimeError(
            "te_on_cpu.install(): the real transformer_engine_torch is loaded already"
        )
    if not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory:
        raise RuntimeError(
            "te_on_cpu.install(): expected a stand-in for CUDA; call step35_patch.cpu.install() "
            "first"
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError("te_on_cpu.install() must come before Megatron-Core is imported")
    for name in [n for n in sys.modules if n.split(".")[0] == "transformer_engine"]:
        del sys.modules[name]  # a None, which stands for "not installed"; or a failed import
    # torch.compile and Triton would compile for the GPU that torch.cuda claims.
    os.environ.setdefault("NVTE_TORCH_COMPILE", "0")
    os.environ["TRITON_INTERPRET"] = "1"
    apex.install()
    extension = sys.modules[NAME] = Extension(NAME, __doc__)
    extension.fill()
    try:
        _import_package()
    except BaseException:
        del sys.modules[NAME]
        raise
    _choose_untimed()
    if cudnn:
        fused_attention.offer()
    return extension


def _choose_untimed() -> None:
    """Have Triton take the first variant of a kernel: there is no device to time them on."""
    from triton.runtime.autotuner import Autotuner

    Autotuner._bench = lambda self, *args, config, **meta: [1.0, 1.0, 1.0]


def _import_package() -> None:
    """Import transformer_engine, with nothing changed but how it loads its shared libraries.

    transformer_engine/__init__ imports `common`, which loads the core library, and then `pytorch`,
    whose first act is `common.load_framework_extension`. So the package's module is made but not
    yet run, `common` is imported below it, that function replaced, and then the package run.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None:
        raise ModuleNotFoundError(
            "No module named 'transformer_engine': ./run setup makes a folder with it",
            name="transformer_engine",
        )
    found = importlib.metadata.version("transformer_engine")
    if found != VERSION:
        raise RuntimeError(f"te_on_cpu: expected Transformer Engine {VERSION}, found {found}")
    package = importlib.util.module_from_spec(spec)
    sys.modules["transformer_engine"] = package
    # With it, common leaves out both its check that the libraries' wheels are installed and
    # loading them: a switch for building a wheel.
    before = os.environ.get("NVTE_PROJECT_BUILDING")
    os.environ["NVTE_PROJECT_BUILDING"] = "1"
    try:
        common = importlib.import_module("transformer_engine.common")
    finally:
        os.environ.pop("NVTE_PROJECT_BUILDING")
        if before is not None:
            os.environ["NVTE_PROJECT_BUILDING"] = before

    def load_framework_extension(framework: str) -> None:
        if framework != "torch":  # transformer_engine/__init__ tries jax too
            raise ImportError(f"te_on_cpu has no extension for {framework}")

    common.load_framework_extension = load_framework_extension
    spec.loader.exec_module(package)
    importlib.import_module("transformer_engine.pytorch")  # the package hides an ImportError
