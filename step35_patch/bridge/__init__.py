"""Step-3.5 for Megatron-Bridge: importing this registers it with AutoBridge.

    import step35_patch.bridge
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained("/models/Step-3.5-Flash", trust_remote_code=True)
    provider = bridge.to_megatron_provider()        # a Step35BridgeProvider

Where the package is active and has a config, the import of Megatron-Bridge does it by itself. It
needs the extra `bridge`.
"""

from step35_patch.bridge.adapter_folder import save_adapters
from step35_patch.bridge.canonical import Step35CanonicalLoRA
from step35_patch.bridge.conversion import Step35Bridge
from step35_patch.bridge.provider import Step35BridgeProvider

__all__ = ["Step35Bridge", "Step35BridgeProvider", "Step35CanonicalLoRA", "save_adapters"]
