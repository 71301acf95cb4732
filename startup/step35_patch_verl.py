"""What verl imports in its driver and in each Ray worker, by the entry points `verl.plugins`.

verl imports an entry point and does not call it, and passes over its exceptions: the work is done
by the import, and what goes wrong ends the process. It lies beside the package, whose import may go
wrong.
"""

import importlib
import os
import sys

# Of Megatron-Bridge, whose import takes long, and not all of verl's processes do it.
BRIDGE = "megatron.bridge.models"


def start() -> None:
    """Activate step35_patch, unless STEP35_PATCH is 0.

    Raises:
        SystemExit: It can't be activated.
    """
    if os.environ.get("STEP35_PATCH", "1") in ("", "0"):
        return
    try:
        import step35_patch  # noqa: F401

        _wait_for_bridge()
    except Exception as error:
        raise SystemExit(
            f"step35_patch, a plug-in of verl here, cannot be activated: {error}\n"
            "Correct it; or set STEP35_PATCH=0, which leaves Megatron-Core as it is."
        ) from None


def _wait_for_bridge() -> None:
    import wrapt

    wrapt.register_post_import_hook(_bridge_imported, BRIDGE)


def _bridge_imported(module) -> None:
    """Put this package's Step-3.5 in place of Megatron-Bridge's, which computes another model."""
    try:
        importlib.import_module("step35_patch.bridge")
    except BaseException:
        # A second import must not succeed without it.
        sys.modules.pop(BRIDGE, None)
        _wait_for_bridge()
        raise


start()
