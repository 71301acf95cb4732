"""Puts wrappers in the place of Megatron's callables, finds copies, and puts the originals back.

A module that did ``from m import f`` before ``m.f`` was wrapped keeps the old ``f``. Such copies
are found by identity in the globals of all imported modules, and so are, when the originals are
put back, the copies of the wrappers that were made since.

Nothing here locks: `step35_patch.patch.activation` does.
"""

import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Self, SupportsIndex

import wrapt

from step35_patch.patch.targets import Hook, Target

_MISSING = object()


class PatchedFunction(wrapt.FunctionWrapper):  # type: ignore[type-arg]  # in wrapt's stubs only
    """A wrapt wrapper that copies and pickles as the function that it stands for does.

    wrapt refuses both. A plain function is copied as itself and pickled by its name, and
    Megatron's users keep builders in configs that are deep-copied.
    """

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce_ex__(self, protocol: SupportsIndex) -> str:
        return self.__qualname__


@dataclass(slots=True, eq=False)
class Patch:
    """A target as it was found, and what stands for it. `copies` are named "module.name"."""

    target: Target
    owner: ModuleType | type
    name: str
    original: Any
    wrapper: PatchedFunction
    copies: tuple[str, ...] = ()

    @property
    def in_place(self) -> bool:
        """Whether the wrapper is there, by itself or inside somebody else's wrapper."""
        found = vars(self.owner).get(self.name)
        while found is not None and found is not self.wrapper:
            found = getattr(found, "__wrapped__", None)
        return found is not None


# All that were ever made, oldest first: a module that is reloaded has new originals, while the
# wrappers of its old ones live on in other modules.
_patches: list[Patch] = []


def missing(module: ModuleType, targets: Iterable[Target]) -> list[Target]:
    """Those of a module's targets that it does not define."""
    return [target for target in targets if _find(module, target.attribute)[2] is _MISSING]


def find(module: ModuleType, attribute: str) -> Any:
    """What a module defines as "name" or "Class.name", wrapped or not; None if it does not."""
    found = _find(module, attribute)[2]
    return None if found is _MISSING else found


def patch_of(target: Target) -> Patch | None:
    """The latest patch of a target, or None if there never was one."""
    return next((patch for patch in reversed(_patches) if patch.target == target), None)


def install(
    module: ModuleType,
    targets: Iterable[Target],
    hook_of: Callable[[Target], Hook],
    enabled: Callable[[], bool],
) -> None:
    """Wrap those of a module's targets that it defines, and rebind the copies of the originals.

    A wrapper that is in place stays. One that was taken out by `restore` is used again, so that
    a copy which escaped `restore` (in a closure or a functools.partial) never ends up inside a
    second one.

    Args:
        module: The imported module.
        targets: The targets of that module.
        hook_of: Gives what stands around a target; asked when the target is called, not before.
        enabled: Asked at each call; while it says no, a wrapper passes the call through.
    """
    put: list[Patch] = []
    for target in targets:
        owner, name, found = _find(module, target.attribute)
        if found is _MISSING:
            continue
        patch = patch_of(target)
        if patch is not None and patch.owner is owner and patch.in_place:
            continue
        if patch is None or patch.original is not found:
            wrapper = PatchedFunction(found, _call_of(target, hook_of), enabled)
            patch = Patch(target, owner, name, found, wrapper)
            _patches.append(patch)
        setattr(owner, name, patch.wrapper)
        put.append(patch)
    places = _exchange({id(patch.original): patch.wrapper for patch in put})
    for patch in put:
        patch.copies = tuple(places[id(patch.original)])


def restore() -> None:
    """Put every original back where a wrapper is, in the targets' places and in copies."""
    for patch in _patches:
        if vars(patch.owner).get(patch.name) is patch.wrapper:
            setattr(patch.owner, patch.name, patch.original)
        patch.copies = ()
    _exchange({id(patch.wrapper): patch.original for patch in _patches})


def _find(module: ModuleType, attribute: str) -> tuple[Any, str, Any]:
    """Owner, last name and object of "name" or "Class.name"; the object only if the owner's own."""
    owner: Any = module
    *path, name = attribute.split(".")
    for part in path:
        owner = vars(owner).get(part)
        if owner is None:
            return None, name, _MISSING
    return owner, name, vars(owner).get(name, _MISSING)


def _call_of(target: Target, hook_of: Callable[[Target], Hook]) -> Hook:
    def call(
        wrapped: Callable[..., Any], instance: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        return hook_of(target)(wrapped, instance, args, kwargs)

    return call


def _exchange(new_by_id: Mapping[int, Any]) -> dict[int, list[str]]:
    """Rebind each global that is one of the objects named by id; where, by the old object's id."""
    places = defaultdict(list)
    for module_name, module in list(sys.modules.items()):
        for name, value in list(_globals_of(module).items()):
            if id(value) in new_by_id:
                _globals_of(module)[name] = new_by_id[id(value)]
                places[id(value)].append(f"{module_name}.{name}")
    return places


def _globals_of(module: Any) -> dict[str, Any]:
    try:
        # Not vars(): a lazily loaded module would be loaded by it.
        found = object.__getattribute__(module, "__dict__")
    except AttributeError:  # None, or an object without one, in a module's place
        return {}
    return found if isinstance(found, dict) else {}
