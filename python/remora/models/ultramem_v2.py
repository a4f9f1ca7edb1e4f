"""Models of the UltraMemV2 paper: configurations."""

from __future__ import annotations

from typing import Any

from remora.models.language_model import LanguageModelConfig


def _ultramem_v2(memory: dict[str, Any], **sizes: int) -> LanguageModelConfig:
    return LanguageModelConfig(
        mixer_options={"num_heads": sizes["hidden_size"] // 128, "head_dim": 128, "expand_v": 1.0},
        memory="ultramem_v2",
        memory_options=memory,
        **sizes,  # type: ignore[arg-type]
    )


#: The memory of "227M/1.2B" (Huang et al., 2025): L = 20, D = 768, n = 360, k = 32, ds = dp = dv = 192; 995 M
#: parameters in its tables. Vocabulary and inner width, which the paper leaves open, are chosen so that 227 M stand
#: outside of the tables; tokens are mixed by gated delta rules.
ULTRAMEM_V2_227M = _ultramem_v2(
    {"num_keys": 360, "topk": 32, "key_dim": 192, "down_dim": 192, "up_dim": 192},
    vocab_size=50304, hidden_size=768, num_layers=20, intermediate_size=1536,
)  # fmt: skip
#: The memory of "1B/7B": L = 16, D = 2048, n = 528, k = 128, ds = 512, dp = 384, dv = 768; 5.1 G parameters in
#: its tables.
ULTRAMEM_V2_1B = _ultramem_v2(
    {"num_keys": 528, "topk": 128, "key_dim": 512, "down_dim": 384, "up_dim": 768},
    vocab_size=50304, hidden_size=2048, num_layers=16, intermediate_size=5632,
)  # fmt: skip
#: The same architecture over bytes, small enough for a test.
ULTRAMEM_V2_TINY = LanguageModelConfig(
    vocab_size=256,
    hidden_size=32,
    num_layers=2,
    mixer_options={"num_heads": 2, "head_dim": 8, "expand_v": 1.0},
    intermediate_size=48,
    memory="ultramem_v2",
    memory_options={"num_keys": 12, "topk": 4, "key_dim": 8, "down_dim": 8, "up_dim": 8},
)
