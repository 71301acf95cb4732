"""The module `transformer_engine_torch` itself: what is in it, and how a kernel gets into it.

Kernels are functions of the other modules, registered by `kernel`. What is not implemented raises
with its name; `calls` counts calls by name, and `watched_by` lets others see them.
"""

from __future__ import annotations

import enum
import functools
import types
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

calls: Counter[str] = Counter()

# None, or called in place of a kernel with (the kernel, its args, its kwargs).
watched_by: Callable[..., Any] | None = None

NAME = "transformer_engine_torch"
# Of Transformer Engine, whose Python calls these functions with these arguments.
VERSION = "2.20.2"

# Imported by name when transformer_engine.pytorch is, and not implemented.
STUBS = """
    bulk_overlap_ag_with_external_gemm dbias_dgelu dbias_drelu multi_tensor_adam_capturable
    multi_tensor_adam_capturable_master multi_tensor_adam_fp8 multi_tensor_adam_param_remainder
    multi_tensor_compute_scale_and_scale_inv multi_tensor_compute_scale_inv_e8m0 multi_tensor_sgd
""".split()
# Classes that annotations name.
STUB_CLASSES = (
    "CommOverlap CommOverlapBase CommOverlapCore CommOverlapHelper CommOverlapP2P".split()
)


class MissingKernelError(NotImplementedError, AttributeError):
    """The stand-in has no such name. (As an AttributeError, so that hasattr says no.)"""


class Extension(types.ModuleType):
    """`transformer_engine_torch`."""

    def fill(self) -> None:
        vars(self).update(CONTENTS)
        for name in STUBS:
            setattr(self, name, stub(name))
        for name in STUB_CLASSES:
            setattr(self, name, type(name, (), {"__init__": stub(name), "__module__": NAME}))
        # `from transformer_engine_torch import *` must not find what is underscored here.
        self.__all__ = [name for name in vars(self) if not name.startswith("_")]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # Python's own questions
            raise AttributeError(name)
        raise MissingKernelError(f"te_on_cpu does not implement {NAME}.{name}")


CONTENTS: dict[str, Any] = {}


def stub(name: str) -> Callable:
    def stub(*args: Any, **kwargs: Any) -> Any:
        raise MissingKernelError(f"te_on_cpu does not implement {NAME}.{name}")

    stub.__name__ = name
    return stub


def kernel(function: Callable) -> Callable:
    """Register a function of the extension: counted, and outside autograd as a kernel is."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        with torch.no_grad():
            if watched_by is not None:
                return watched_by(function, args, kwargs)
            return function(*args, **kwargs)

    CONTENTS[function.__name__] = wrapper
    return wrapper


def refuse(what: str, unless: bool) -> None:
    if not unless:
        raise NotImplementedError(f"te_on_cpu: {what} is not implemented")


def plain(tensor: Any, what: str) -> torch.Tensor:
    """A tensor of floating point numbers, not one of Transformer Engine's quantised ones."""
    kind = type(tensor).__name__
    refuse(f"{what} of type {kind}", type(tensor) in (torch.Tensor, torch.nn.Parameter))
    refuse(f"{what} of {tensor.dtype}", tensor.dtype in FLOATS)
    return tensor


def no_quantizer(quantizer: Any, what: str) -> None:
    refuse(f"{what} with a {type(quantizer).__name__}", quantizer is None)


# --- Enums (common/util/pybind_helper.h) ----------------------------------------------------------


def enumeration(name: str, members: str, start: int = 0, **values: int) -> type[enum.IntEnum]:
    numbered = {member: i for i, member in enumerate(members.split(), start)} | values
    kind = enum.IntEnum(name, numbered, module=NAME)
    CONTENTS[name] = kind
    return kind


# common/include/transformer_engine/transformer_engine.h; kInt16 and kInt64 have no Python name.
DType = enumeration(
    "DType",
    "",
    kByte=0,
    kInt32=2,
    kFloat32=4,
    kFloat16=5,
    kBFloat16=6,
    kFloat8E4M3=7,
    kFloat8E5M2=8,
    kFloat4E2M1=10,
)
enumeration("NVTE_Bias_Type", "NVTE_NO_BIAS NVTE_PRE_SCALE_BIAS NVTE_POST_SCALE_BIAS NVTE_ALIBI")
enumeration(
    "NVTE_Mask_Type",
    "NVTE_NO_MASK NVTE_PADDING_MASK NVTE_CAUSAL_MASK NVTE_PADDING_CAUSAL_MASK"
    " NVTE_CAUSAL_BOTTOM_RIGHT_MASK NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
enumeration(
    "NVTE_Softmax_Type", "NVTE_VANILLA_SOFTMAX NVTE_OFF_BY_ONE_SOFTMAX NVTE_LEARNABLE_SOFTMAX"
)
enumeration(
    "NVTE_QKV_Format",
    "NVTE_SBHD NVTE_BSHD NVTE_THD NVTE_BSHD_2SBHD NVTE_SBHD_2BSHD NVTE_THD_2BSHD NVTE_THD_2SBHD"
    " NVTE_BHSD NVTE_QKV_Format_NOT_SET",
)
enumeration(
    "NVTE_QKV_Layout",
    "NVTE_SB3HD NVTE_SBH3D NVTE_SBHD_SB2HD NVTE_SBHD_SBH2D NVTE_SBHD_SBHD_SBHD NVTE_BS3HD"
    " NVTE_BSH3D NVTE_BSHD_BS2HD NVTE_BSHD_BSH2D NVTE_BSHD_BSHD_BSHD NVTE_T3HD NVTE_TH3D"
    " NVTE_THD_T2HD NVTE_THD_TH2D NVTE_THD_THD_THD NVTE_SBHD_BSHD_BSHD NVTE_BSHD_SBHD_SBHD"
    " NVTE_THD_BSHD_BSHD NVTE_THD_SBHD_SBHD NVTE_Paged_KV_BSHD_BSHD_BSHD"
    " NVTE_Paged_KV_BSHD_SBHD_SBHD NVTE_Paged_KV_SBHD_BSHD_BSHD NVTE_Paged_KV_SBHD_SBHD_SBHD"
    " NVTE_Paged_KV_THD_BSHD_BSHD NVTE_Paged_KV_THD_SBHD_SBHD NVTE_BHSD_BHSD_BHSD"
    " NVTE_QKV_Layout_NOT_SET",
)
enumeration(
    "NVTE_Fused_Attn_Backend", "", NVTE_No_Backend=-1, NVTE_F16_arbitrary_seqlen=1, NVTE_FP8=2
)
enumeration(
    "NVTEScalingMode",
    "NVTE_DELAYED_TENSOR_SCALING NVTE_MXFP8_1D_SCALING NVTE_BLOCK_SCALING_1D NVTE_BLOCK_SCALING_2D"
    " NVTE_NVFP4_1D_SCALING",
    NVTE_INVALID_SCALING=100,
)
enumeration("Float8BlockScaleTensorFormat", "GEMM_READY COMPACT INVALID")
enumeration("CommOverlapType", "RS AG")
enumeration(
    "CommOverlapAlgo",
    "BULK_OVERLAP_AG BULK_OVERLAP_RS SPLIT_PIPELINED_AG_P2P SPLIT_PIPELINED_RS"
    " SPLIT_PIPELINED_RS_P2P ATOMIC_GEMM_RS ATOMIC_GEMM_AG_P2P ATOMIC_GEMM_RS_P2P"
    " EXTERNAL_BULK_OVERLAP_AG",
)
enumeration("NVTERoutingMapFormat", "BYTEMAP BITMAP_U8")
enumeration("NVTEQBHistogramMode", "TWO_KERNEL FUSED_ATOMIC")
enumeration(
    "FP8FwdTensors",
    "GEMM1_INPUT GEMM1_WEIGHT GEMM1_OUTPUT GEMM2_INPUT GEMM2_WEIGHT GEMM2_OUTPUT GEMM3_INPUT"
    " GEMM3_WEIGHT GEMM3_OUTPUT",
)
enumeration(
    "FP8BwdTensors",
    "GRAD_OUTPUT1 GRAD_INPUT1 GRAD_OUTPUT2 GRAD_INPUT2 GRAD_OUTPUT3 GRAD_INPUT3",
)
CONTENTS["FP8TensorMeta"] = type(
    "FP8TensorMeta", (), {"scale": None, "scale_inv": None, "amax_history": None}
)

FLOATS = {
    torch.float32: DType.kFloat32,
    torch.float16: DType.kFloat16,
    torch.bfloat16: DType.kBFloat16,
}
TORCH_DTYPES = {te: dtype for dtype, te in FLOATS.items()}


def torch_dtype(dtype: Any) -> torch.dtype:
    refuse(f"output of {dtype!r}", int(dtype) in TORCH_DTYPES)
    return TORCH_DTYPES[int(dtype)]


# --- What this machine has ------------------------------------------------------------------------

CONTENTS["device_supports_multicast"] = lambda device_id=-1: False
CONTENTS["get_stream_priority_range"] = lambda device_id=-1: (0, 0)
CONTENTS["ubuf_built_with_mpi"] = lambda: False
CONTENTS["nvte_built_with_cublasmp"] = lambda: False
CONTENTS["get_num_cublas_streams"] = lambda: 4
CONTENTS["get_cublasLt_version"] = lambda: 130000
CONTENTS["get_cudnn_version"] = lambda: 91500
