"""Switches the package on and off: settings, import hooks, refusals, and the report on them.

Importing `step35_patch` calls `activate()`. For each module with targets (`step35_patch.patch.targets`)
it leaves a wrapt post-import hook, or patches the module at once if it is imported already. The
Hugging Face config named by STEP35_CONFIG is read when the first such module is imported, so that
the interpreter's start stays cheap; without a config the wrappers pass their calls through.

A refusal (an untested Megatron-Core, a missing target, a broken config) is an exception out of the
import of Megatron's module, and of each further attempt to import it: a program that catches the
first one must not go on unpatched. wrapt's hooks fire once, so a hook that raises takes the module
out of sys.modules and registers itself again.
"""

import contextlib
import importlib
import os
import sys
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import TYPE_CHECKING, Any

from step35_patch.patch.targets import TARGETS, TESTED, Target

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config

GATE_LAYOUTS = ("headwise", "expanded")
WINDOWS = ("hf", "steptron")

# The module that site runs through a1_step35_patch.pth (or .start) when an interpreter starts.
STARTUP_MODULE = "step35_patch_startup"


class Step35ActivationError(ImportError):
    """Megatron-Core cannot be patched, or a STEP35_ variable is wrong. Says what to do."""


@dataclass(frozen=True)
class Settings:
    """The process-wide model: what a Step-3.5 model is built from.

    Attributes:
        config: The validated Hugging Face config.
        gate_layout: "headwise" or "expanded".
        window: "hf" (a sliding layer's query sees W keys) or "steptron" (W + 1 keys).
        source: Path of the config, or "<object>" for one that was handed over.
    """

    config: "Step35Config"
    gate_layout: str
    window: str
    source: str


@dataclass(frozen=True)
class _State:
    """What `activate` was asked for. `path` is set as long as its config is unread."""

    enabled: bool = False
    gate_layout: str = GATE_LAYOUTS[0]
    window: str = WINDOWS[0]
    path: str | None = None
    settings: Settings | None = None


_state = _State()
_lock = threading.RLock()
_armed: set[str] = set()  # modules whose hook waits for their import
_refusals: dict[str, str] = {}  # module: why its last import was refused


def activate(
    config: "str | os.PathLike[str] | Mapping[str, Any] | Step35Config | None" = None,
    *,
    gate_layout: str | None = None,
    window: str | None = None,
) -> None:
    """Patch Megatron-Core in this process, now or when it is imported. Twice is the same as once.

    Args:
        config: The model: path of a config.json or of a folder with one, its contents as a
            mapping, or a Step35Config. None means STEP35_CONFIG; if that is not set either, the
            patch is inert, except for models that bring a config of their own
            (Step35ModelProvider).
        gate_layout: "headwise" or "expanded"; None means STEP35_GATE_LAYOUT, else "headwise".
        window: "hf" or "steptron"; None means STEP35_WINDOW, else "hf".

    Raises:
        ValueError: An argument has no legal value; or the config is wrong (Step35ConfigError, for
            a config that comes as an argument). Nothing is changed then.
        Step35ActivationError: A STEP35_ variable has no legal value (nothing is changed then), or
            Megatron-Core is imported already and is not one that can be patched.
    """
    global _state
    state = _requested(config, gate_layout, window)
    with _lock:
        _state = state
        if not any(isinstance(finder, _MegatronFinder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _MegatronFinder())
    if "megatron" in sys.modules:
        _cover_targets()


def activate_on_import() -> None:
    """`activate`, as the package's import calls it; says so if the interpreter's start should have."""
    activate()
    if os.environ.get("STEP35_PATCH") == "1" and STARTUP_MODULE not in sys.modules:
        warn(
            "STEP35_PATCH=1, but this interpreter started without a1_step35_patch.pth (python -S, an "
            "embedded interpreter, or a package that is not installed): activated by this import "
            "instead. Processes that never import step35_patch stay unpatched."
        )


def deactivate() -> None:
    """Put back every object that was replaced, everywhere. Modules imported later stay as they are."""
    global _state
    with _lock:
        _state = _State()
        _refusals.clear()
        if (rebind := sys.modules.get("step35_patch.patch.patcher")) is not None:
            rebind.restore()


def active() -> Settings | None:
    """The process-wide settings, or None while the patch is inert or off.

    Raises:
        Step35ConfigError: The config named by STEP35_CONFIG is not usable.
    """
    if _state.path is not None:
        with _lock:
            _read_config()
    return _state.settings


def _requested(config: Any, gate_layout: str | None, window: str | None) -> _State:
    """The arguments of `activate`, checked, completed from the environment, and if given read."""
    gate_layout = _choice("gate_layout", gate_layout, GATE_LAYOUTS)
    window = _choice("window", window, WINDOWS)
    try:
        for name in ("STEP35_PATCH", "STEP35_ALLOW_UNTESTED"):
            _choice(name, os.environ.get(name), ("0", "1"))
        default_gate_layout = _choice(
            "STEP35_GATE_LAYOUT", os.environ.get("STEP35_GATE_LAYOUT"), GATE_LAYOUTS
        )
        default_window = _choice("STEP35_WINDOW", os.environ.get("STEP35_WINDOW"), WINDOWS)
    except ValueError as error:
        raise Step35ActivationError(str(error)) from None
    state = _State(
        enabled=True,
        gate_layout=gate_layout or default_gate_layout or GATE_LAYOUTS[0],
        window=window or default_window or WINDOWS[0],
    )
    if config is not None:
        return replace(state, settings=_settings(config, state))
    if not (path := os.environ.get("STEP35_CONFIG")):
        return state
    if not os.path.exists(path):
        raise Step35ActivationError(
            "STEP35_CONFIG: expected the path of a config.json or of a folder with one, found "
            f"{path!r}, which does not exist. Correct it, or unset it to leave the patch inert."
        )
    # Absolute, because it is read later, perhaps in another working directory.
    return replace(state, path=os.path.abspath(path))


def _choice(name: str, found: str | None, legal: tuple[str, ...]) -> str | None:
    """`found` if it is legal, None if it is None or empty."""
    if not found:
        return None
    if found not in legal:
        raise ValueError(f"{name}: expected {' or '.join(map(repr, legal))}, found {found!r}")
    return found


def _settings(config: Any, state: _State) -> Settings:
    from step35_patch.config.model import Step35Config

    source = "<object>"
    if isinstance(config, str | os.PathLike):
        source = os.fspath(config)
        config = Step35Config.from_pretrained(config)
    elif isinstance(config, Mapping):
        config = Step35Config.from_dict(config)
    elif not isinstance(config, Step35Config):
        raise TypeError(
            f"config: expected a path, a mapping or a Step35Config, found a {type(config).__name__}"
        )
    return Settings(config, state.gate_layout, state.window, source)


def _read_config() -> None:
    """Read the config that STEP35_CONFIG named, unless that is done; the caller holds the lock."""
    global _state
    if _state.path is not None:
        _state = replace(_state, settings=_settings(_state.path, _state), path=None)


def _targets_of(module: str) -> list[Target]:
    return [target for target in TARGETS if target.module == module]


class _MegatronFinder:
    """On sys.meta_path: finds nothing, but leaves the hooks when the import of megatron begins.

    Not earlier, because wrapt may not be importable while a1_step35_patch.pth runs: `site` adds the
    folders of a user's or of a virtual environment's packages before those of the system.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "megatron" and _state.enabled:
            _cover_targets()


def _cover_targets() -> None:
    """Leave a hook for each module with targets that is not imported; patch those that are."""
    import wrapt

    modules = dict.fromkeys(target.module for target in TARGETS)
    with _lock:
        # Hooks first: whatever is refused below, the rest must not be imported unpatched.
        for name in modules:
            if name not in sys.modules and name not in _armed:
                _armed.add(name)
                wrapt.register_post_import_hook(_imported, name)
    # Another thread may be in the middle of importing one: wait for that, without our lock.
    imported = [
        importlib.import_module(name)
        for name in modules
        if name in sys.modules and name not in _armed
    ]
    with _lock:
        for module in imported:
            if getattr(module.__spec__, "_initializing", False):
                raise Step35ActivationError(
                    f"{module.__name__}: step35_patch is activated in the middle of its import. "
                    "Import step35_patch before megatron, or after it.",
                    name=module.__name__,
                )
            _check(module)
        for module in imported:
            _wrap(module)


def _imported(module: ModuleType) -> None:
    """The post-import hook."""
    name = module.__name__
    with _lock:
        _armed.discard(name)
        if not _state.enabled:
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
    from step35_patch.patch import patcher as rebind

    try:
        _check_version(module.__name__)
        _check_targets(module, rebind.missing(module, _targets_of(module.__name__)))
        _read_config()
    except Exception as error:
        _refusals[module.__name__] = str(error)
        raise
    _refusals.pop(module.__name__, None)


def _wrap(module: ModuleType) -> None:
    from step35_patch.patch import patcher as rebind

    rebind.install(module, _targets_of(module.__name__), lambda: _state.enabled)


def megatron_version() -> str | None:
    """The version of the Megatron-Core that is imported, or None."""
    return getattr(sys.modules.get("megatron.core.package_info"), "__version__", None)


def is_tested(version: str) -> bool:
    """Whether a Megatron-Core version is in the tested range (`step35_patch.patch.targets.TESTED`)."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(TESTED).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def _check_version(module: str) -> None:
    # A target may be imported by megatron.core before this is.
    with contextlib.suppress(ImportError):
        importlib.import_module("megatron.core.package_info")
    version = megatron_version()
    if version is not None and is_tested(version):
        return
    problem = f"found Megatron-Core {version or 'of unknown version'}, step35_patch is tested with {TESTED}"
    if os.environ.get("STEP35_ALLOW_UNTESTED") == "1":
        warn(f"{problem}; going on, because STEP35_ALLOW_UNTESTED=1")
        return
    raise Step35ActivationError(
        f"{module}: {problem}. Install one of these (pip install 'megatron-core{TESTED}'), look "
        "for a newer step35-patch, or set STEP35_ALLOW_UNTESTED=1 to go on with this one.",
        name=module,
    )


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


def warn(message: str) -> None:
    """A warning, from the first rank only."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(f"step35_patch: {message}", RuntimeWarning, stacklevel=3)


@dataclass(frozen=True)
class TargetStatus:
    """One target in a `Status`.

    Attributes:
        module: Megatron's module.
        attribute: Name of the callable in it.
        state: "waiting" (for the module's import), "wrapped", "missing" (this Megatron-Core has no
            such name), "refused" (see `reason`), "replaced" (somebody else's object stands where
            the wrapper was), or "off".
        reason: Why it was refused; else empty.
        copies: "module.name" of each copy, made before the patch, that was rebound.
    """

    module: str
    attribute: str
    state: str
    reason: str
    copies: tuple[str, ...]

    def __str__(self) -> str:
        copies = f" (copies rebound: {', '.join(self.copies)})" if self.copies else ""
        return f"{self.state:<8}  {self.module}.{self.attribute}{copies}"


@dataclass(frozen=True)
class Status:
    """What the package does in this process; `str()` gives a report for people.

    Attributes:
        version: This package's version.
        megatron_version: Megatron-Core's, or None if it is not imported.
        tested: The versions of Megatron-Core that are accepted (PEP 440 specifier).
        state: "active" (with a config), "inert" (without one) or "off".
        config: Path of the config, "<object>" for one that was handed over, or None.
        gate_layout: "headwise" or "expanded".
        window: "hf" or "steptron".
        targets: What is wrapped, or will be.
    """

    version: str
    megatron_version: str | None
    tested: str
    state: str
    config: str | None
    gate_layout: str
    window: str
    targets: tuple[TargetStatus, ...]

    def __str__(self) -> str:
        lines = [
            f"step35_patch {self.version}, Megatron-Core "
            f"{self.megatron_version or 'not imported'} (tested: {self.tested})"
        ]
        if self.state == "active":
            lines.append(
                f"active: config {self.config}, gate layout {self.gate_layout}, window {self.window}"
            )
        else:
            lines.append({"inert": "inert: no config is given", "off": "off"}[self.state])
        lines += [f"  {target}" for target in self.targets]
        # All targets of a module are refused for the same reason.
        reasons = dict.fromkeys(target.reason for target in self.targets if target.reason)
        return "\n".join([*lines, *(f"refused: {reason}" for reason in reasons)])


def status() -> Status:
    """What is patched in this process, what waits, and what was refused and why."""
    from step35_patch import __version__

    with _lock:
        settings = _state.settings
        config = settings.source if settings is not None else _state.path
        state = "off" if not _state.enabled else "inert" if config is None else "active"
        return Status(
            version=__version__,
            megatron_version=megatron_version(),
            tested=TESTED,
            state=state,
            config=config,
            gate_layout=_state.gate_layout,
            window=_state.window,
            targets=tuple(map(_target_status, TARGETS)),
        )


def _target_status(target: Target) -> TargetStatus:
    from step35_patch.patch import patcher as rebind

    patch = rebind.patch_of(target)
    module = sys.modules.get(target.module)
    reason = _refusals.get(target.module, "")
    if not _state.enabled:
        state = "off"
    elif reason:
        state = "refused"
    elif module is None or target.module in _armed:
        state = "waiting"
    elif rebind.missing(module, [target]):
        state = "missing"
    else:
        state = "wrapped" if patch is not None and patch.in_place else "replaced"
    copies = patch.copies if patch is not None else ()
    return TargetStatus(target.module, target.attribute, state, reason, copies)
