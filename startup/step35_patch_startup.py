"""What an interpreter runs when it starts, through a1_step35_patch.pth or a1_step35_patch.start.

It lies beside the package, not in it: importing the package is what activates it, and a `.start`
file imports its module whether STEP35_PATCH is set or not.
"""

import os


def start() -> None:
    """Activate step35_patch if STEP35_PATCH says so.

    Raises:
        SystemExit: It can't be activated. Any other exception would only be printed by `site`, and
            the program would go on and train unpatched.
    """
    if os.environ.get("STEP35_PATCH", "0") in ("", "0"):
        return
    try:
        import step35_patch  # noqa: F401
    except Exception as error:
        raise SystemExit(
            f"STEP35_PATCH={os.environ['STEP35_PATCH']}, but step35_patch cannot be activated: "
            f"{error}"
        ) from None
