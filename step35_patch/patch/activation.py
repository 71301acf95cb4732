"""Switches the package on and off: import hooks, refusals, and the report on them.

Importing `step35_patch` calls `activate_on_import()`, which leaves a finder that waits for the
import of megatron. When that begins, each module with targets (`step35_patch.patch.targets`) gets a
wrapt post-import hook; one that is imported already is patched at once. The Hugging Face config
named by STEP35_CONFIG is read when the first such module is imported, so that the interpreter's
start stays cheap; without a config the wrappers pass their calls through.

A refusal (an untested Megatron-Core, a missing target, a broken config) is an exception out of the
import of Megatron's module, and of each further attempt to import it: a program that catches the
first one must not go on unpatched. wrapt's hooks fire once, so a hook that raises takes the module
out of sys.modules and registers itself again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import ModuleType
from typing import TYPE_CHECKING, Any

from step35_patch import settings
from step35_patch._version import __version__
from step35_patch.patch.megatron_version import check_version, megatron_version
from step35_patch.patch.notices import warn
from step35_patch.patch.targets import TARGETS, TESTED, Hook, Target
from step35_patch.settings import Step35ActivationError

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec

    from step35_patch.config.model import Step35Config
    from step35_patch.patch.contract import Drift
    from step35_patch.patch.status import Status, TargetStatus

# The module that site runs through a1_step35_patch.pth (or .start) when an interpreter starts.
STARTUP_MODULE = "step35_patch_startup"
# What the wrappers call, by the name in `Target.wrapper`. Imported with the first call: it imports
# much of Megatron-Core, which is not possible while a target's module is being imported.
_HOOKS = "step35_patch.patch.hooks"

_lock = threading.RLock()
_armed: set[str] = set()  # modules whose hook waits for their import
_arming = ""  # the one whose hook is being left
_followers: dict[str, Callable[[ModuleType], None]] = {}  # see activate_on_import
_refusals: dict[str, str] = {}  # module: why its last import was refused


def activate(
    config: str | os.PathLike[str] | Mapping[str, Any] | Step35Config | None = None,
    *,
    gate_layout: str | None = None,
    window: str | None = None,
    padded_logits: str | None = None,
) -> None:
    """Patch Megatron-Core in this process, now or when it is imported. Twice is the same as once.

    Args:
        config: The model: path of a config.json or of a folder with one, its contents as a
            mapping, or a Step35Config. None means STEP35_CONFIG; if that is not set either, the
            patch is inert, except for models that bring a config of their own
            (Step35ModelProvider).
        gate_layout: "headwise" or "expanded"; None means STEP35_GATE_LAYOUT, else "headwise".
        window: "hf" or "steptron"; None means STEP35_WINDOW, else "hf".
        padded_logits: "masked" or "kept": what becomes of the logits' columns that only pad the
            vocabulary; None means STEP35_PADDED_LOGITS, else "masked".

    Raises:
        ValueError: An argument has no legal value; or the config is wrong (Step35ConfigError, for
            a config that comes as an argument). Nothing is changed then.
        Step35ActivationError: A STEP35_ variable has no legal value (nothing is changed then), or
            Megatron-Core is imported already and is not one that can be patched.
    """
    settings.ask_for(config, gate_layout, window, padded_logits)
    with _lock:
        _go_first()
    if "megatron" in sys.modules:
        _cover_targets()


def activate_on_import(followers: Mapping[str, Callable[[ModuleType], None]]) -> None:
    """What the package's import calls: `activate`, with a warning if the start-up file did not.

    Args:
        followers: By the name of a module that is no target, what to call with it once it is
            imported, and with each further activation.

    Raises:
        Step35ActivationError: As `activate`. Not in `step35-patch doctor`, which stays as it is: it
            has to start where nothing else does, and looks at other processes.
    """
    if _is_doctor(sys.orig_argv):
        return
    _followers.update(followers)
    activate()
    if os.environ.get("STEP35_PATCH") == "1" and STARTUP_MODULE not in sys.modules:
        warn(
            "STEP35_PATCH=1, but this interpreter started without a1_step35_patch.pth (python -S, "
            "an embedded interpreter, or a package that is not installed): activated by this "
            "import instead. Processes that never import step35_patch stay unpatched."
        )


def _is_doctor(command: Sequence[str]) -> bool:
    """Whether a process was started as `step35-patch doctor`; sys.argv is not set yet."""
    return any(
        word == "doctor"
        # The installed command, or `python -m` with the module of it.
        and (
            os.path.basename(program) == "step35-patch"
            or program.split(".") == ["step35_patch", "cli"]
        )
        for program, word in pairwise(command)
    )


def deactivate() -> None:
    """Put back every object that was replaced; modules imported later stay as they are."""
    with _lock:
        settings.switch_off()
        _refusals.clear()
        if (patcher := sys.modules.get("step35_patch.patch.patcher")) is not None:
            patcher.restore()


def _targets_of(module: str) -> list[Target]:
    return [target for target in TARGETS if target.module == module]


class _MegatronFinder:
    """On sys.meta_path: leaves the hooks when the import of megatron begins, and has them called.

    Not earlier, because wrapt may not be importable while a1_step35_patch.pth runs: `site` adds the
    folders of a user's or of a virtual environment's packages before those of the system.

    wrapt's own finder imports a module's package in the middle of a search, which waits for ever
    where another thread is importing that package: importlib lets one thread search at a time.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname == "megatron" and settings.enabled():
            _cover_targets()
        if fullname not in _armed and fullname not in _followers:
            return None
        for finder in tuple(sys.meta_path):
            if finder is self or type(finder).__module__ == "wrapt.importer":
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None:
                    # It is one by what it answers, not by its class: that takes long to import.
                    spec.loader = _TellingLoader(spec.loader)  # type: ignore[assignment]
                return spec
        return None


class _TellingLoader:
    """A module's loader, which tells wrapt that the module is there."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._loader.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        import wrapt

        # Others look at what a module was loaded by: for its source, or its data.
        module.__loader__ = self._loader
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        wrapt.notify_module_loaded(module)


_finder = _MegatronFinder()


def _cover_targets() -> None:
    """Leave a hook for each module with targets that is not imported; patch those that are."""
    global _arming
    import wrapt

    modules = dict.fromkeys(target.module for target in TARGETS)
    with _lock:
        # Hooks first: whatever is refused below, the rest must not be imported unpatched.
        for name in modules:
            if name not in sys.modules and name not in _armed:
                _armed.add(name)
                _arming = name
                wrapt.register_post_import_hook(_imported, name)
        _arming = ""
        _go_first()
        passed = _passed_by()
    # Another thread may be in the middle of importing one: wait for that, without our lock.
    imported = [
        importlib.import_module(name)
        for name in modules
        if name in sys.modules and (name not in _armed or name in passed)
    ]
    with _lock:
        # The hook of those that another thread began to import before it was left never comes.
        for module in [module for module in imported if module.__name__ in passed]:
            if module.__name__ not in _armed or _is_being_imported(module):
                imported.remove(module)
            else:
                _armed.discard(module.__name__)
        for module in imported:
            if _is_being_imported(module):
                raise Step35ActivationError(
                    f"{module.__name__}: step35_patch is activated in the middle of its import. "
                    "Import step35_patch before megatron, or after it.",
                    name=module.__name__,
                )
            _check(module)
        for module in imported:
            _wrap(module)
    for name in _followers:
        wrapt.register_post_import_hook(_follow, name)  # at once if it is imported


def _go_first() -> None:
    """Put the finder before all others, wrapt's among them."""
    if not sys.meta_path or sys.meta_path[0] is not _finder:
        with contextlib.suppress(ValueError):
            sys.meta_path.remove(_finder)
        sys.meta_path.insert(0, _finder)


def _passed_by() -> set[str]:
    """The modules that are there, or on their way, while their hook still waits.

    What somebody put there by hand, without a spec, is no module of Megatron's.
    """
    return {name for name in _armed if getattr(sys.modules.get(name), "__spec__", None)}


def _is_being_imported(module: ModuleType) -> bool:
    return getattr(module.__spec__, "_initializing", False)


def _follow(module: ModuleType) -> None:
    """The post-import hook of a module with a follower."""
    if settings.enabled():
        _followers[module.__name__](module)


def _imported(module: ModuleType) -> None:
    """The post-import hook."""
    name = module.__name__
    with _lock:
        _armed.discard(name)
        # Called while it is being left: another thread has just begun to import the module.
        if name == _arming or not settings.enabled():
            return
        try:
            _check(module)
        except BaseException:
            import wrapt

            parent, _, leaf = name.rpartition(".")
            if vars(sys.modules[parent]).get(leaf) is module:
                delattr(sys.modules[parent], leaf)
            # Before registering: a hook for a module that is there fires at once.
            sys.modules.pop(name, None)
            _armed.add(name)
            wrapt.register_post_import_hook(_imported, name)
            raise
        _wrap(module)


def _check(module: ModuleType) -> None:
    """Refuse a module with targets, or find that it can be patched.

    Raises:
        Step35ActivationError: Megatron-Core is untested, or a required target is missing.
        Step35ConfigError: The config is not usable.
    """
    from step35_patch.patch import contract, patcher

    try:
        check_version(module.__name__)
        targets = _targets_of(module.__name__)
        _check_targets(module, patcher.missing(module, targets))
        _check_contract(module, contract.drifts(module, targets))
        settings.active()
    except Exception as error:
        _refusals[module.__name__] = str(error)
        raise
    _refusals.pop(module.__name__, None)


def _wrap(module: ModuleType) -> None:
    from step35_patch.patch import patcher

    patcher.install(module, _targets_of(module.__name__), _hook_of, settings.enabled)


def _hook_of(target: Target) -> Hook:
    if _passed_by():
        _cover_targets()
    hook: Hook = getattr(importlib.import_module(_HOOKS), target.wrapper)
    return hook


def _check_targets(module: ModuleType, missing: list[Target]) -> None:
    names = [target.attribute for target in missing if target.required]
    if not names:
        return
    raise Step35ActivationError(
        f"{module.__name__}: expected {', '.join(names)}, found no such name in Megatron-Core "
        f"{megatron_version()} (tested: {TESTED}). Install a tested one "
        f"(pip install 'megatron-core{TESTED}') or look for a newer step35-patch.",
        name=module.__name__,
    )


def _check_contract(module: ModuleType, drifts: Sequence[Drift]) -> None:
    if not drifts:
        return
    shown = "; ".join(drift.what for drift in drifts)
    known = f"Megatron-Core {megatron_version()} is not what step35_patch knows ({TESTED})"
    if os.environ.get("STEP35_ALLOW_UNTESTED") == "1" and all(drift.reports for drift in drifts):
        warn(f"{module.__name__}: {known}: {shown}; going on, because only reports depend on it")
        return
    raise Step35ActivationError(
        f"{module.__name__}: {known}: {shown}. Install a released one (pip install "
        f"'megatron-core{TESTED}'), or look for a newer step35-patch.",
        name=module.__name__,
    )


def status() -> Status:
    """What is patched in this process, what waits, and what was refused and why."""
    from step35_patch.patch.status import Status

    with _lock:
        request = settings.request()
        state = "inert" if request.source is None else "active"
        return Status(
            version=__version__,
            megatron_version=megatron_version(),
            tested=TESTED,
            state=state if request.enabled else "off",
            config=request.source,
            gate_layout=request.gate_layout,
            window=request.window,
            padded_logits=request.padded_logits,
            targets=tuple(map(_target_status, TARGETS)),
        )


def _has_no_module(target: Target) -> bool:
    """Whether this Megatron-Core is known not to have a target's module; nothing is imported."""
    package = target.module.rpartition(".")[0]
    return package in sys.modules and importlib.util.find_spec(target.module) is None


def _target_status(target: Target) -> TargetStatus:
    from step35_patch.patch import patcher
    from step35_patch.patch.status import TargetStatus

    patch = patcher.patch_of(target)
    module = sys.modules.get(target.module)
    reason = _refusals.get(target.module, "")
    if not settings.enabled():
        state = "off"
    elif reason:
        state = "refused"
    elif module is None and _has_no_module(target):
        state = "missing"
    elif module is None or target.module in _armed:
        state = "waiting"
    elif patcher.missing(module, [target]):
        state = "missing"
    else:
        state = "wrapped" if patch is not None and patch.in_place else "replaced"
    copies = patch.copies if patch is not None else ()
    return TargetStatus(target.module, target.attribute, state, reason, copies)
