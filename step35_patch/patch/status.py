"""The report that `step35_patch.status()` gives: what is wrapped, what waits, what was refused."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TargetStatus:
    """One target in a `Status`.

    Attributes:
        module: Megatron's module.
        attribute: Name of the callable in it.
        state: "waiting" (for the module's import), "wrapped", "missing" (this Megatron-Core has no
            such module or name), "refused" (see `reason`), "replaced" (somebody else's object
            stands where the wrapper was), or "off".
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
        padded_logits: "masked" or "kept".
        targets: What is wrapped, or will be.
    """

    version: str
    megatron_version: str | None
    tested: str
    state: str
    config: str | None
    gate_layout: str
    window: str
    padded_logits: str
    targets: tuple[TargetStatus, ...]

    def __str__(self) -> str:
        lines = [
            f"step35_patch {self.version}, Megatron-Core "
            f"{self.megatron_version or 'not imported'} (tested: {self.tested})"
        ]
        if self.state == "active":
            lines.append(
                f"active: config {self.config}, gate layout {self.gate_layout}, "
                f"window {self.window}, padded logits {self.padded_logits}"
            )
        else:
            lines.append({"inert": "inert: no config is given", "off": "off"}[self.state])
        lines += [f"  {target}" for target in self.targets]
        # All targets of a module are refused for the same reason.
        reasons = dict.fromkeys(target.reason for target in self.targets if target.reason)
        return "\n".join([*lines, *(f"refused: {reason}" for reason in reasons)])
