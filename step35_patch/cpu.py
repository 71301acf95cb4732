"""A stand-in for CUDA, so that Megatron-Core's training loop runs on a machine without a GPU.

``install()`` makes ``torch.cuda`` claim a device for each process of this machine, runs everything
that is sent to such a device on the CPU, and gives torch.distributed Gloo where NCCL is asked for.
It is made for trying a training script out, not for measuring one: streams and events do nothing,
memory statistics are zero, and a tensor that is "moved" between the two devices stays the same
object, so races and missing copies stay invisible.

How the pieces fit together:

- ``_redirect_tensors`` wraps the torch functions and Tensor methods that take a device. (A
  ``TorchFunctionMode`` would need no list of them, but is off while ``Tensor.backward`` runs, and
  so in the backward of every ``autograd.Function``.)
- ``_CUDA`` holds what replaces the names of ``torch.cuda``. A name that is not listed keeps torch's
  own and fails for want of a driver.
- ``_use_gloo`` wraps the entry points of torch.distributed.
"""

import atexit
import contextlib
import functools
import os
import sys
import time
import types
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed
from torch.distributed import HashStore  # type: ignore[attr-defined]  # not in its __all__

_LOCAL_WORLD_SIZE = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def install() -> None:
    """Let this process take its CPU for CUDA devices; a second call does nothing.

    Call it before the first ``import megatron``: Megatron-Core copies names of torch and decides on
    fusions and compilation while it is imported.

    Raises:
        RuntimeError: if this machine has a usable CUDA device (the run would be slow for no
            reason), or if Megatron-Core is imported or torch.distributed initialised already.
    """
    if torch.cuda.Stream is _CUDA["Stream"]:
        return
    if torch.cuda.is_available():
        raise RuntimeError(
            "step35_patch.cpu.install() found a CUDA device "
            f"({torch.cuda.get_device_name()}), and would leave it idle. Leave the call out to "
            "train on it, or set CUDA_VISIBLE_DEVICES= (empty) to train on the CPU on purpose."
        )
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "step35_patch.cpu.install() must be called before Megatron-Core is imported, which has "
            "happened already. Call it first thing in the script, before any megatron import."
        )
    if torch.distributed.is_initialized():
        raise RuntimeError(
            "step35_patch.cpu.install() must be called before torch.distributed is initialised, "
            "which has happened already. Call it first thing in the script."
        )
    _switch_off_gpu_software()
    for name, value in _CUDA.items():
        setattr(torch.cuda, name, value)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        setattr(torch.cuda.random, name, _CUDA[name])
    # torch's own code (the data loader's pinning thread) asks here, and would look for the driver.
    torch.accelerator.is_available = lambda: False
    _redirect_tensors()
    _use_gloo()


def _switch_off_gpu_software() -> None:
    """Keep off what would compile for a GPU or look for one, here and in child processes."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron's jit_fuser is torch.compile
    if "torch._dynamo" in sys.modules:  # has read the variable already
        torch._dynamo.config.disable = True
    # Megatron asserts on it under tensor parallelism; on a GPU it orders kernels.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # Importing them without a device fails in ways that Megatron does not expect; a None in
    # sys.modules is the ModuleNotFoundError that it handles.
    for name in ("transformer_engine", "apex", "amp_C"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


# --- Tensors ------------------------------------------------------------------------------------

_CPU = torch.device("cpu")

# Functions of torch, and methods of Tensor, that take the device of their result as a keyword.
_FACTORIES = (
    *("arange", "as_tensor", "asarray", "eye", "linspace", "logspace", "scalar_tensor", "tensor"),
    *("empty", "empty_like", "empty_strided", "full", "full_like", "ones", "ones_like"),
    *("rand", "rand_like", "randint", "randint_like", "randn", "randn_like", "randperm"),
    *("tril_indices", "triu_indices", "zeros", "zeros_like"),
)
_TENSOR_FACTORIES = (
    *("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros"),
)
# Those that draw, and take a generator.
_DRAWS = ("rand", "randint", "randn", "randperm")


def _on_cpu(device: Any) -> Any:
    """The CPU for any spelling of a CUDA device ("cuda:0", torch.device, an index).

    Anything else is returned as it is, so that any argument can be handed in: a tensor, a dtype.
    """
    if isinstance(device, torch.device):
        return _CPU if device.type == "cuda" else device
    if isinstance(device, str):
        return _CPU if device.split(":")[0] == "cuda" else device
    if isinstance(device, int) and not isinstance(device, bool):
        return _CPU
    return device


def _redirect_tensors() -> None:
    """Make tensors that are asked for on a CUDA device on the CPU, and let them pass for CUDA's."""

    def factory(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.get("device")
            if device is not None and _on_cpu(device) is not device:
                kwargs["device"] = _CPU
                if function.__name__ in _DRAWS:
                    kwargs.setdefault("generator", _GENERATOR)
            kwargs.pop("pin_memory", None)
            return function(*args, **kwargs)

        return wrapper

    # Such a block knows torch's constructors by identity, from the first time that it sees one.
    with torch.device("cpu"):
        torch.empty(0)
    for name in _FACTORIES:
        setattr(torch, name, factory(getattr(torch, name)))
    for name in _TENSOR_FACTORIES:
        setattr(torch.Tensor, name, factory(getattr(torch.Tensor, name)))

    original_to, original_type = torch.Tensor.to, torch.Tensor.type

    def to(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = _on_cpu(kwargs["device"])
        return original_to(self, *map(_on_cpu, args[:1]), *args[1:], **kwargs)

    def type_(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        # Megatron's optimizers compare tensor.type() with "torch.cuda.FloatTensor" and its kin.
        if dtype is None:
            return original_type(self).replace("torch.", "torch.cuda.")
        if isinstance(dtype, str):
            dtype = dtype.replace("torch.cuda.", "torch.")
        return original_type(self, dtype, *args, **kwargs)

    methods = {
        "to": to,
        "type": type_,
        "cuda": lambda self, *args, **kwargs: self,  # Module.cuda goes through it too
        "pin_memory": lambda self, *args, **kwargs: self,
        "record_stream": lambda self, stream: None,
        # Megatron brings the counts of its MoE dispatchers to the host only if they are on a GPU.
        "is_cuda": property(lambda self: self.device.type == "cpu"),
    }
    for name, method in methods.items():
        setattr(torch.Tensor, name, method)

    original_dropout = torch.nn.functional.dropout

    @functools.wraps(original_dropout)
    def dropout(*args: Any, **kwargs: Any) -> torch.Tensor:
        state = torch.get_rng_state()
        torch.set_rng_state(_GENERATOR.get_state())
        try:
            return original_dropout(*args, **kwargs)
        finally:
            _GENERATOR.set_state(torch.get_rng_state())
            torch.set_rng_state(state)

    torch.nn.functional.dropout = dropout
    torch.Generator = _Generator  # type: ignore[misc]  # a class in the place of a class


_TorchGenerator = torch.Generator


class _Generators(type(_TorchGenerator)):  # type: ignore[misc]  # torch's metaclass has no name
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _TorchGenerator)


class _Generator(_TorchGenerator, metaclass=_Generators):
    """Makes one of torch's generators, on the CPU for any device; they are its instances."""

    def __new__(cls, device: Any = _CPU) -> Any:
        return _TorchGenerator(_on_cpu(device))


# --- torch.cuda ---------------------------------------------------------------------------------


class _Stream:
    """A stream on which everything has happened already: the CPU runs its work in order."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> "_Stream":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass

    def wait_stream(self, stream: "_Stream") -> None:
        pass

    def wait_event(self, event: "_Event") -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def record_event(self, event: "_Event | None" = None) -> "_Event":
        event = event or _Event()
        event.record()
        return event


class _Event:
    """An event that knows when it was recorded, for Megatron's timers."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._seconds = 0.0

    def record(self, stream: _Stream | None = None) -> None:
        self._seconds = time.perf_counter()

    def wait(self, stream: _Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: "_Event") -> float:
        return (end._seconds - self._seconds) * 1e3


class _Scope(contextlib.nullcontext[None]):
    """``torch.cuda.device`` and ``torch.cuda.stream``: take any argument and change nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()


def _returns(value: Any) -> Callable[..., Any]:
    """A new function (torch tells functions apart by identity) that returns ``value``."""
    return lambda *args, **kwargs: value


class _Current:
    """What ``set_device`` and ``set_stream`` chose."""

    device = int(os.environ.get("LOCAL_RANK", "0"))
    stream = _Stream()

    @classmethod
    def set_device(cls, device: Any) -> None:
        cls.device = device if isinstance(device, int) else torch.device(device).index or 0

    @classmethod
    def set_stream(cls, stream: _Stream) -> None:
        cls.stream = stream


# The GPU's generator: what Megatron's trackers of its state save and restore. Dropout, and tensors
# that are drawn on a CUDA device, use it and leave the CPU's alone. The weights are drawn with that
# (--use-cpu-initialization), so they do not depend on what Megatron's warm-up drew before them,
# which depends on the batch and the parallel layout.
_GENERATOR = torch.Generator()

_PROPERTIES = types.SimpleNamespace(
    # A compute capability that allows bf16, and nothing (FP8) that the CPU could not do.
    name="CPU in place of a GPU",
    major=8,
    minor=0,
    total_memory=0,
    multi_processor_count=1,
)

_CUDA: dict[str, Any] = {
    "is_available": _returns(True),
    "is_initialized": _returns(True),
    "_lazy_init": _returns(None),
    "_lazy_call": lambda function, **kwargs: function(),
    "device_count": _returns(_LOCAL_WORLD_SIZE),
    "current_device": lambda: _Current.device,
    "set_device": _Current.set_device,
    "device": _Scope,
    "get_device_name": _returns(_PROPERTIES.name),
    "get_device_properties": _returns(_PROPERTIES),
    "get_device_capability": _returns((_PROPERTIES.major, _PROPERTIES.minor)),
    "synchronize": _returns(None),
    "empty_cache": _returns(None),
    "Stream": _Stream,
    "Event": _Event,
    "stream": _Scope,
    "set_stream": _Current.set_stream,
    "current_stream": lambda device=None: _Current.stream,
    "default_stream": lambda device=None: _Current.stream,
    "is_current_stream_capturing": _returns(False),
    "memory_stats": lambda device=None: defaultdict(int),
    **{
        name: _returns(0)
        for name in (
            "memory_allocated",
            "max_memory_allocated",
            "memory_reserved",
            "max_memory_reserved",
            "device_memory_used",
        )
    },
    "reset_peak_memory_stats": _returns(None),
    "nvtx": types.SimpleNamespace(
        range_push=_returns(None), range_pop=_returns(None), mark=_returns(None), range=_Scope
    ),
    "default_generators": (_GENERATOR,) * _LOCAL_WORLD_SIZE,
    "get_rng_state": lambda device=None: _GENERATOR.get_state(),
    "set_rng_state": lambda state, device=None: _GENERATOR.set_state(state),
    "manual_seed": _GENERATOR.manual_seed,
    "manual_seed_all": _GENERATOR.manual_seed,  # torch.manual_seed calls it
}


# --- torch.distributed --------------------------------------------------------------------------


def _use_gloo() -> None:
    """Let torch.distributed use Gloo where NCCL is asked for, by name or by default."""

    def wrap(name: str, adapt: Callable[[dict[str, Any]], None]) -> None:
        original = getattr(torch.distributed, name)

        @functools.wraps(original)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            # The one that is usually given by position.
            if name == "init_process_group" and args:
                args, kwargs = args[1:], kwargs | {"backend": args[0]}
            adapt(kwargs)
            return original(*args, **kwargs)

        setattr(torch.distributed, name, wrapper)
        setattr(torch.distributed.distributed_c10d, name, wrapper)

    def on_gloo(kwargs: dict[str, Any]) -> None:
        kwargs["backend"] = "gloo"
        for name in ("device_id", "pg_options"):  # NCCL's
            kwargs.pop(name, None)

    def initialise(kwargs: dict[str, Any]) -> None:
        on_gloo(kwargs)
        if kwargs.get("world_size") == 1 and kwargs.get("store") is None:
            # Nobody to meet, so that a script may be started without torchrun.
            kwargs["store"] = HashStore()

    wrap("init_process_group", initialise)
    wrap("new_group", on_gloo)
    wrap("barrier", lambda kwargs: kwargs.pop("device_ids", None))
    atexit.register(_end_process_group)


def _end_process_group() -> None:
    """End all groups; a collective in flight when the interpreter ends makes Gloo abort it."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
