"""Which Megatron-Core is there, and whether this package is tested with it."""

import contextlib
import importlib
import os
import sys

from step35_patch.patch.notices import warn
from step35_patch.patch.targets import TESTED
from step35_patch.settings import Step35ActivationError


def megatron_version() -> str | None:
    """The version of the Megatron-Core that is imported, or None."""
    return getattr(sys.modules.get("megatron.core.package_info"), "__version__", None)


def is_tested(version: str) -> bool:
    """Whether a Megatron-Core version is among the tested ones (`targets.TESTED`)."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion

    try:
        return SpecifierSet(TESTED).contains(version, prereleases=True)
    except InvalidVersion:
        return False


def check_version(module: str) -> None:
    """Refuse a Megatron-Core that is not tested, unless STEP35_ALLOW_UNTESTED=1.

    Args:
        module: Megatron's module whose import asks, for the message.

    Raises:
        Step35ActivationError: It is not tested.
    """
    # A target may be imported by megatron.core before this is.
    with contextlib.suppress(ImportError):
        importlib.import_module("megatron.core.package_info")
    version = megatron_version()
    if version is not None and is_tested(version):
        return
    found = f"Megatron-Core {version or 'of unknown version'}"
    problem = f"found {found}, step35_patch is tested with {TESTED}"
    if os.environ.get("STEP35_ALLOW_UNTESTED") == "1":
        warn(f"{problem}; going on, because STEP35_ALLOW_UNTESTED=1")
        return
    raise Step35ActivationError(
        f"{module}: {problem}. Install one of these (pip install 'megatron-core{TESTED}'), look "
        "for a newer step35-patch, or set STEP35_ALLOW_UNTESTED=1 to go on with this one.",
        name=module,
    )
