"""LoRA adapters in the format of PEFT, for vLLM.

Sources: vllm/config/lora.py (MaxLoRARanks) and vllm/lora/peft_helper.py of vLLM 0.32.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from labctl_workers.record import ModelRef, Refusal, parse_json, read_bytes

CONFIG = "adapter_config.json"
# vLLM sets memory aside for one of these ranks.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
CONFIG_BYTES_AT_MOST = 2**20
MERGE = "merge the adapter into the model (peft: merge_and_unload), and use the result as the model"


def rank_of(adapter: ModelRef) -> int:
    """The smallest of vLLM's ranks that holds the adapter. Raises Refusal for an adapter that vLLM cannot run."""
    try:
        config = parse_json(read_bytes(Path(adapter.path or "") / CONFIG, CONFIG_BYTES_AT_MOST))
    except (OSError, ValueError) as error:
        raise Refusal("adapter", f"cannot read {CONFIG} of {adapter.name}: {error}", "repair the adapter") from None
    if not isinstance(config, Mapping) or config.get("peft_type") != "LORA":
        raise Refusal("adapter", f"not a LoRA adapter: {adapter.name}", "give the folder of a LoRA adapter of PEFT")
    for feature in ("use_dora", "modules_to_save", "lora_bias"):
        if config.get(feature):
            raise Refusal("adapter", f"vLLM does not support {feature}, which {adapter.name} has", MERGE)
    pattern = config.get("rank_pattern")
    ranks = [config.get("r"), *(pattern.values() if isinstance(pattern, Mapping) else ())]
    most = max((rank for rank in ranks if isinstance(rank, int)), default=0)
    holds = next((rank for rank in RANKS if 0 < most <= rank), None)
    if holds is None:
        raise Refusal("adapter", f"vLLM runs adapters of rank 1 to {RANKS[-1]}: {adapter.name} has {most}", MERGE)
    return holds
