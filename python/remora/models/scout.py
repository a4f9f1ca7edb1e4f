"""Models of the SCOUT paper: configurations."""

from __future__ import annotations

from typing import Any

from remora.models.language_model import LanguageModelConfig


def _scout(mixer: str, mixer_options: dict[str, Any], **sizes: int | bool) -> LanguageModelConfig:
    attention = {"num_heads": sizes["hidden_size"] // 64, "stride": 10}
    return LanguageModelConfig(
        vocab_size=32000,
        mixer=mixer,
        mixer_options=mixer_options | ({"num_heads": attention["num_heads"]} if mixer != "mamba" else {}),
        segment_attention=attention,
        norm_eps=1e-6,
        **sizes,  # type: ignore[arg-type]
    )


_WINDOW, _STATES = {"window": 1024}, {"expand": 2, "state_size": 16, "dt_rank": 128, "conv_size": 4}

#: Jafari et al. (2025): 469 M parameters, tokens mixed by attention over a window.
SCOUT_SWA_470M = _scout(
    "sliding_window_attention", _WINDOW, hidden_size=1024, num_layers=17, intermediate_size=2816, tie_embeddings=True
)
#: 430 M parameters, tokens mixed by Mamba.
SCOUT_MAMBA_430M = _scout(
    "mamba", _STATES, hidden_size=1024, num_layers=14, intermediate_size=2816, tie_embeddings=True
)
#: 1.57 G parameters.
SCOUT_SWA_1_57B = _scout("sliding_window_attention", _WINDOW, hidden_size=2048, num_layers=14, intermediate_size=5632)
#: 1.59 G parameters.
SCOUT_MAMBA_1_59B = _scout("mamba", _STATES, hidden_size=2048, num_layers=13, intermediate_size=5632)
#: The same architecture over bytes, small enough for a test.
SCOUT_TINY = LanguageModelConfig(
    vocab_size=256,
    hidden_size=32,
    num_layers=2,
    mixer="sliding_window_attention",
    mixer_options={"num_heads": 2, "window": 8},
    intermediate_size=48,
    segment_attention={"num_heads": 2, "stride": 4},
    norm_eps=1e-6,
)
