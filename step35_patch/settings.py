"""What was asked for in this process: the config, and the choices that go with it.

`step35_patch.patch.activation` and Megatron's command line write it, everything else reads it. The
config that STEP35_CONFIG names is read when somebody first asks for it, so that an interpreter's
start stays cheap; so are the named tuples here, which unlike dataclasses load nothing.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    from step35_patch.config.model import Step35Config, Window

GateLayout = Literal["headwise", "expanded"]
PaddedLogits = Literal["masked", "kept"]
GATE_LAYOUTS: tuple[GateLayout, ...] = ("headwise", "expanded")
WINDOWS: tuple[Window, ...] = ("hf", "steptron")
PADDED_LOGITS: tuple[PaddedLogits, ...] = ("masked", "kept")
# What the variables with a fixed choice may say; empty is as good as unset.
_LEGAL: dict[str, tuple[str, ...]] = {
    "STEP35_PATCH": ("0", "1"),
    "STEP35_ALLOW_UNTESTED": ("0", "1"),
    "STEP35_GATE_LAYOUT": GATE_LAYOUTS,
    "STEP35_WINDOW": WINDOWS,
    "STEP35_PADDED_LOGITS": PADDED_LOGITS,
}
# All that are read.
VARIABLES = (*_LEGAL, "STEP35_CONFIG", "STEP35_ACCEPT_CHANGED")


class Step35ActivationError(ImportError):
    """Megatron-Core cannot be patched, or a STEP35_ variable is wrong. Says what to do."""


class Settings(NamedTuple):
    """The process-wide model: what a Step-3.5 model is built from.

    Attributes:
        config: The validated Hugging Face config.
        gate_layout: "headwise" or "expanded".
        window: "hf" (a sliding layer's query sees W keys) or "steptron" (W + 1 keys).
        padded_logits: "masked" or "kept" (see `step35_patch.model.padded_vocabulary`).
        source: Path of the config, or "<object>" for one that was handed over.
    """

    config: Step35Config
    gate_layout: GateLayout
    window: Window
    padded_logits: PaddedLogits
    source: str


class Request(NamedTuple):
    """What `ask_for` was asked for.

    Attributes:
        enabled: Whether the package is on at all.
        gate_layout: "headwise" or "expanded".
        window: "hf" or "steptron".
        padded_logits: "masked" or "kept".
        path: Of a config that nobody has asked for yet; None once it is read.
        settings: The process-wide model, or None without a config and until it is read.
    """

    enabled: bool = False
    gate_layout: GateLayout = GATE_LAYOUTS[0]
    window: Window = WINDOWS[0]
    padded_logits: PaddedLogits = PADDED_LOGITS[0]
    path: str | None = None
    settings: Settings | None = None

    @property
    def source(self) -> str | None:
        """Path of the config, read or not, "<object>" for one that was handed over, or None."""
        return self.path if self.settings is None else self.settings.source


_request = Request()
_lock = threading.RLock()


def ask_for(
    config: str | os.PathLike[str] | Mapping[str, Any] | Step35Config | None,
    gate_layout: str | None,
    window: str | None,
    padded_logits: str | None,
) -> None:
    """Make this the process-wide model, and the package enabled.

    Args:
        config: As for `step35_patch.activate`.
        gate_layout: As there.
        window: As there.
        padded_logits: As there.

    Raises:
        ValueError: An argument has no legal value, or is a config that is wrong
            (Step35ConfigError). Nothing is changed then.
        Step35ActivationError: A STEP35_ variable has no legal value; nothing is changed then.
    """
    global _request
    request = _requested(config, gate_layout, window, padded_logits)
    with _lock:
        _request = request


def switch_off() -> None:
    """Forget what was asked for."""
    global _request
    with _lock:
        _request = Request()


def enabled() -> bool:
    """Whether the package is on, with a config or without."""
    return _request.enabled


def request() -> Request:
    """What was asked for, as it is known now: nothing is read for it."""
    return _request


def active() -> Settings | None:
    """The process-wide settings, or None while the package is inert or off.

    Raises:
        Step35ConfigError: The config named by STEP35_CONFIG is not usable.
    """
    global _request
    if _request.path is not None:
        with _lock:
            if _request.path is not None:  # no other thread was faster
                settings = _settings(_request.path, _request)
                _request = _request._replace(settings=settings, path=None)
    return _request.settings


def variable_problems() -> dict[str, str]:
    """What is wrong with the STEP35_ variables of this process, by the variable's name.

    Whether the config that STEP35_CONFIG names is legal is not looked at.
    """
    problems = {}
    for name, legal in _LEGAL.items():
        try:
            _choice(name, os.environ.get(name), legal)
        except ValueError as error:
            problems[name] = str(error)
    path = os.environ.get("STEP35_CONFIG")
    if path and not os.path.exists(path):
        problems["STEP35_CONFIG"] = (
            "STEP35_CONFIG: expected the path of a config.json or of a folder with one, found "
            f"{path!r}, which does not exist. Correct it, or unset it to leave the patch inert."
        )
    return problems


def _requested(
    config: str | os.PathLike[str] | Mapping[str, Any] | Step35Config | None,
    gate_layout: str | None,
    window: str | None,
    padded_logits: str | None,
) -> Request:
    """The arguments of `ask_for`, checked, completed from the environment, and if given read."""
    asked_gate_layout = _choice("gate_layout", gate_layout, GATE_LAYOUTS)
    asked_window = _choice("window", window, WINDOWS)
    asked_padded_logits = _choice("padded_logits", padded_logits, PADDED_LOGITS)
    problems = variable_problems()
    if config is not None:
        problems.pop("STEP35_CONFIG", None)
    if problems:
        raise Step35ActivationError("\n".join(problems.values()))
    default_gate_layout = _choice("", os.environ.get("STEP35_GATE_LAYOUT"), GATE_LAYOUTS)
    default_window = _choice("", os.environ.get("STEP35_WINDOW"), WINDOWS)
    default_padded_logits = _choice("", os.environ.get("STEP35_PADDED_LOGITS"), PADDED_LOGITS)
    request = Request(
        enabled=True,
        gate_layout=asked_gate_layout or default_gate_layout or GATE_LAYOUTS[0],
        window=asked_window or default_window or WINDOWS[0],
        padded_logits=asked_padded_logits or default_padded_logits or PADDED_LOGITS[0],
    )
    if config is not None:
        return request._replace(settings=_settings(config, request))
    if not (path := os.environ.get("STEP35_CONFIG")):
        return request
    # Absolute, because it is read later, perhaps in another working directory.
    return request._replace(path=os.path.abspath(path))


def _choice[Choice: str](name: str, found: str | None, legal: tuple[Choice, ...]) -> Choice | None:
    """`found` if it is legal, None if it is None or empty."""
    if not found:
        return None
    for choice in legal:
        if choice == found:
            return choice
    raise ValueError(f"{name}: expected {' or '.join(map(repr, legal))}, found {found!r}")


def _settings(
    config: str | os.PathLike[str] | Mapping[str, Any] | Step35Config, request: Request
) -> Settings:
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
    return Settings(config, request.gate_layout, request.window, request.padded_logits, source)
