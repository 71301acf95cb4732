"""What a GPU would launch, read and write, counted while a program runs on the CPU.

A `Counter` sees every operation that torch dispatches, forward and backward, and every kernel of
Transformer Engine's that `tests/support/te_on_cpu` stands in for. Its rules:

- An operation that returns only views of its inputs, or memory that is not written, launches
  nothing. Any other is one kernel, or as many as `KERNELS` says.
- A kernel reads each distinct element of its inputs once, and writes its outputs once. What it
  writes to without reading (`out`, copy_, zero_) is not read; of a table that is indexed, only the
  chosen elements are.
- Inside one of Transformer Engine's kernels nothing of torch's is counted: what it returns is
  written, its other tensors are read.
- A function under torch.compile (Megatron-Core's `jit_fuser`) is split into forward and backward
  by Inductor's own partitioner with its decompositions, which decides what is kept for backward.
  Each half is one kernel: what a pointwise function, with at most one reduction over its rows,
  becomes.
- Matrix products and attention are counted apart: kernels and operations, no bytes.

Not counted: transfers between host and GPU, what the allocator does, NCCL. Small tensors that
Megatron-Core has on the host (tokens of each expert) can't be told from the GPU's, and count.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# Operations of torch's that launch more than one kernel, or none.
KERNELS = {
    "slice_backward": 2,  # zeros, and a copy
    "select_backward": 2,
    "masked_fill": 2,  # a copy, and the filling
    "scatter": 2,
    "scatter_add": 2,
    "index_put": 2,
    "index_add": 2,
    "masked_scatter": 2,
    "sort": 2,
    "argsort": 2,
    "nonzero": 2,
    "masked_select": 3,
    "_local_scalar_dense": 0,  # a transfer to the host
    "is_pinned": 0,
    "scalar_tensor": 0,  # of where(), which takes it as a number
}
# Of Transformer Engine's: a reduction over rows for gamma ends in a kernel of its own
# (common/normalization); attention's backward pass prepares sum(out * dout), and turns dq to bf16.
TE_KERNELS = {
    "rmsnorm_bwd": 2,
    "rmsnorm_bwd_add": 2,
    "layernorm_bwd": 2,
    "fused_attn_bwd": 3,
    "get_fused_attn_backend": 0,
}

_EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_"}
# Take only the shape of what they are given.
_LIKE = {"zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full"}
# Read nothing of what they write to.
_OVERWRITES = {"copy_", "zero_", "fill_", "normal_", "uniform_", "random_"}
# (argument that is a table) -> of it, as many elements are read as are written, or as the source.
_GATHERS = {"index_select", "gather", "index", "embedding", "masked_select"}
_SCATTERS = {"scatter_", "scatter_add_", "index_add_", "index_put_", "index_copy_"}
_ADDS = {"scatter_add_", "index_add_", "scatter_add", "index_add"}
_GEMMS = {"generic_gemm", "te_general_grouped_gemm"}
_ATTENTION = {"fused_attn_fwd", "fused_attn_bwd"}


def elements(tensor: torch.Tensor) -> int:
    """Distinct ones: a dimension of stride 0 repeats them."""
    return math.prod(
        n for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or n == 0
    )


def size(tensor: torch.Tensor) -> int:
    """Bytes of the distinct elements."""
    return elements(tensor) * tensor.element_size()


def tensors_of(tree: Any) -> list[torch.Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, torch.Tensor)]


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _key(tensor: torch.Tensor) -> tuple[Any, ...]:
    """Two views of the same elements are read once."""
    return storage(tensor), tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def distinct(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [*{_key(x): x for x in tensors}.values()]


@dataclass
class Totals:
    """Of one pass: kernels and bytes of what is neither matrix product nor attention."""

    kernels: int = 0
    read: int = 0
    written: int = 0
    gemm_kernels: int = 0
    gemm_flops: int = 0
    attention_kernels: int = 0


@dataclass(frozen=True)
class Launch:
    """What a row of a listing is made of."""

    phase: str
    name: str
    kernels: int
    read: int
    written: int
    shapes: str


@dataclass
class Counter:
    """Counts what runs in `counting(phase)`, and what is kept there for backward in `keeping`."""

    totals: dict[str, Totals] = field(default_factory=dict)
    launches: list[Launch] = field(default_factory=list)
    _phase: str | None = None
    _worked: bool = False
    _kept: list[weakref.ref[_Kept]] = field(default_factory=list)

    @contextlib.contextmanager
    def counting(self, phase: str) -> Iterator[None]:
        global _active
        from support.te_on_cpu import extension

        self._phase = phase
        _active, extension.watched_by = self, self._transformer_engine
        try:
            with _Operations(self):
                yield
        finally:
            _active, extension.watched_by, self._phase = None, None, None

    @contextlib.contextmanager
    def keeping(self) -> Iterator[None]:
        def pack(tensor: torch.Tensor) -> _Kept:
            kept = _Kept(tensor)
            self._kept.append(weakref.ref(kept))
            return kept

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
            yield

    def kept(self, but: list[torch.Tensor]) -> dict[int, torch.Tensor]:
        """A tensor of each storage that is kept now, without those of `but`, by storage."""
        known = {storage(x) for x in but}
        alive = (reference() for reference in self._kept)
        tensors = (kept.tensor for kept in alive if kept is not None)
        return {
            storage(x): x
            for x in tensors
            if storage(x) not in known and x.untyped_storage().nbytes()
        }

    def add(
        self,
        name: str,
        kernels: int,
        reads: list[torch.Tensor],
        writes: list[torch.Tensor],
        read: int | None = None,
        written: int | None = None,
    ) -> None:
        if self._phase is None or not kernels:
            return
        reads, writes = distinct(reads), distinct(writes)
        read = sum(map(size, reads)) if read is None else read
        written = sum(map(size, writes)) if written is None else written
        totals = self._totals
        totals.kernels += kernels
        totals.read += read
        totals.written += written
        shapes = f"{_shapes(reads)} -> {_shapes(writes)}"
        self.launches.append(Launch(self._phase, name, kernels, read, written, shapes))

    @property
    def _totals(self) -> Totals:
        assert self._phase is not None
        return self.totals.setdefault(self._phase, Totals())

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing counts."""
        phase, self._phase = self._phase, None
        try:
            yield
        finally:
            self._phase = phase

    def operation(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        """One of torch's, after it has run."""
        name = func.overloadpacket.__name__
        if func.overloadpacket in flop_registry and self._phase is not None:
            flops = flop_registry[func.overloadpacket](*args, **kwargs, out_val=out)
            self._totals.gemm_kernels += 1
            self._totals.gemm_flops += flops
            return
        kernels = KERNELS.get(name, 1)
        inputs, outputs = tensors_of((args, kwargs)), tensors_of(out)
        changed = [
            x
            for argument, value in zip(func._schema.arguments, args, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
            for x in tensors_of(value)
        ]
        changed += tensors_of([v for k, v in kwargs.items() if k == "out" or k.startswith("out")])
        known = {storage(x) for x in inputs}
        fresh = [x for x in outputs if storage(x) not in known]
        if name in _EMPTY or not (fresh or changed) or not any(x.numel() for x in fresh + changed):
            return
        self._worked = True
        written = fresh + changed
        targets = {_key(x) for x in changed}
        reads = [x for x in inputs if _key(x) not in targets]
        if name in _LIKE:
            self.add(name, kernels, [], written)
        elif name in _SCATTERS:
            # The source comes last, behind the indices; or a number is written to each index.
            amount = elements(reads[-1]) * changed[0].element_size()
            again = amount if name in _ADDS or kwargs.get("accumulate") else 0
            self.add(name, kernels, reads, changed, sum(map(size, reads)) + again, amount)
        elif name in _GATHERS:
            amount = sum(map(size, fresh))
            self.add(name, kernels, reads, fresh, amount + sum(map(size, reads[1:])), amount)
        elif name in ("slice_backward", "select_backward"):
            amount = sum(map(size, fresh)) + sum(map(size, reads))
            self.add(name, kernels, reads, fresh, None, amount)
        else:
            if name not in _OVERWRITES:
                reads = reads + changed
            self.add(name, kernels, reads, written)

    def _transformer_engine(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        name = function.__name__
        if self._phase is None:
            return function(*args, **kwargs)
        inputs = tensors_of((args, kwargs))
        before = [x._version for x in inputs]
        with self.quiet():
            out = function(*args, **kwargs)
        if name in _GEMMS:
            self._gemm(name, args)
        elif name in _ATTENTION:
            self._totals.attention_kernels += TE_KERNELS.get(name, 1)
        else:
            changed = [x for x, v in zip(inputs, before, strict=True) if x._version != v]
            targets = {_key(x) for x in changed}
            reads = [x for x in inputs if _key(x) not in targets]
            known = {storage(x) for x in inputs}
            fresh = [x for x in tensors_of(out) if storage(x) not in known and x.numel()]
            self.add(name, TE_KERNELS.get(name, 1), reads, fresh + changed)
        return out

    def _gemm(self, name: str, args: Any) -> None:
        a, transposed, b = args[0], args[1], args[2]
        pairs = [(a, b)] if name == "generic_gemm" else zip(a, b, strict=True)
        for left, right in pairs:
            if not left.numel() or not right.numel():
                continue
            # op(B) @ op(A): the columns of D are A's rows if A is transposed.
            columns = left.shape[0] if transposed else left.shape[-1]
            self._totals.gemm_kernels += 1
            self._totals.gemm_flops += 2 * right.numel() * columns

    def compiled(self, name: str, run: Callable[..., Any], inputs: Any) -> Any:
        """Half of a compiled function, or all of one without gradients; it may do nothing."""
        self._worked = False
        with self.quiet():
            out = run(*inputs)
        if not self._worked:
            return out
        reads = tensors_of(inputs)
        known = {storage(x) for x in reads}
        fresh = [x for x in tensors_of(out) if storage(x) not in known]
        self.add(name, 1, reads, fresh)
        return out


class _Kept:
    """What stands for a tensor that the graph keeps: it lives as long as the graph does."""

    def __init__(self, tensor: torch.Tensor):
        self.tensor = tensor


class _Operations(TorchDispatchMode):
    def __init__(self, counter: Counter):
        super().__init__()
        self.counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        self.counter.operation(func, args, kwargs, out)
        return out


_active: Counter | None = None


def compile_counted(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """In place of torch.compile, before anything that uses it is imported."""
    if function is None:
        return functools.partial(compile_counted, **options)
    name = function.__name__
    halves: dict[Any, Callable[..., Any]] = {}

    def count(part: str, run: Callable[..., Any], inputs: Any) -> Any:
        return run(*inputs) if _active is None else _active.compiled(part, run, inputs)

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = tree_flatten((args, kwargs))
        places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor)]
        tensors = [leaves[i] for i in places]

        def call(*given: torch.Tensor) -> Any:
            own = list(leaves)
            for i, x in zip(places, given, strict=True):
                own[i] = x
            own_args, own_kwargs = tree_unflatten(own, tree)
            return function(*own_args, **own_kwargs)

        if not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
            return count(name, call, tensors)
        key = tuple(map(_trait, leaves))
        if key not in halves:
            halves[key] = _split(name, call, count)
        return halves[key](*tensors)

    return wrapper


def _trait(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.requires_grad
    return leaf if isinstance(leaf, bool | int | float | str | None) else id(leaf)


def _split(name: str, call: Callable[..., Any], count: Callable[..., Any]) -> Callable[..., Any]:
    """`call` as Inductor would run it: a forward and a backward graph, each one step."""
    from functorch.compile import (
        aot_function,
        make_boxed_func,
        min_cut_rematerialization_partition,
    )
    from torch._inductor.decomposition import select_decomp_table

    def half(part: str) -> Callable[..., Any]:
        def compiler(graph: torch.fx.GraphModule, inputs: Any) -> Any:
            return make_boxed_func(lambda *given: count(part, graph.forward, given))

        return compiler

    return aot_function(
        call,
        fw_compiler=half(name),
        bw_compiler=half(f"{name} backward"),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )


def _shapes(tensors: list[torch.Tensor]) -> str:
    return " ".join(f"{str(x.dtype)[6:]}{list(x.shape)}" for x in tensors)
