"""Models of the Mixture-of-Memories paper: configurations, and the weights of the released checkpoints."""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from remora.models.language_model import LanguageModelConfig

# The released layers' names of key, value, decay and write-strength projections: one per memory, and the shared one's.
_PER_MEMORY = ("k_proj", "v_proj", "a_proj", "b_proj")
_SHARED = ("shared_k", "shared_v", "shared_a", "shared_b")
_LAYER = re.compile(r"(layers\.\d+\.attn\.)(.+)")
# Older checkpoints hold a parameter that no computation reads.
_UNUSED = frozenset({"D"})


def _mom(**sizes: int | bool) -> LanguageModelConfig:
    options = {"num_heads": 4, "head_dim": 256, "expand_v": 1.0, "num_memories": 4, "topk": 2}
    return LanguageModelConfig(
        vocab_size=32000,
        num_layers=24,
        mixer="mixture_of_memories",
        mixer_options=options,
        norm_eps=1e-6,
        **sizes,  # type: ignore[arg-type]
    )


#: Du et al. (2025), "340M": the size of the model around the memories; with four memories and a shared one it has 511 M
#: parameters.
MOM_340M = _mom(hidden_size=1024, intermediate_size=2048, tie_embeddings=True)
#: Du et al. (2025), "1.3B"; 1.62 G parameters.
MOM_1_3B = _mom(hidden_size=2048, intermediate_size=5632)
#: The same architecture over bytes, small enough for a test.
MOM_TINY = LanguageModelConfig(
    vocab_size=256,
    hidden_size=32,
    num_layers=2,
    mixer="mixture_of_memories",
    mixer_options={"num_heads": 2, "head_dim": 8, "expand_v": 1.0, "num_memories": 4, "topk": 2},
    intermediate_size=48,
)


def convert_released_mom(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename and stack the weights of a released Mixture-of-Memories checkpoint for `LanguageModel.load_state_dict`.

    Understood are the layouts of the paper's own repository and of flash-linear-attention: a `model.` prefix before all
    but the output layer, per layer `gate` (the router), one `k_proj`, `v_proj`, `a_proj`, `b_proj` per memory and
    `shared_k`, `shared_v`, `shared_a`, `shared_b`. With one set of projections for all memories only the latter exist.

    Args:
        weights: name and tensor, as in the checkpoint's files.

    Returns:
        name and tensor, as `LanguageModel` of the same configuration has them.

    Raises:
        ValueError: a layer has projections for some memories only.
    """
    result: dict[str, Tensor] = {}
    layers: dict[str, dict[str, Tensor]] = {}
    for full_name, tensor in weights.items():
        name = full_name.removeprefix("model.")
        match = _LAYER.fullmatch(name)
        part = match[2].split(".")[0] if match else ""
        if match and part in (*_PER_MEMORY, *_SHARED):
            layers.setdefault(match[1], {})[match[2].removesuffix(".weight")] = tensor
        elif match and part == "gate":
            result[f"{match[1]}router.weight"] = tensor
        elif not (match and match[2] in _UNUSED):
            result[name] = tensor
    if "lm_head.weight" in result and result["lm_head.weight"] is result.get("embeddings.weight"):
        del result["lm_head.weight"]
    for prefix, parts in layers.items():
        result[f"{prefix}memory_proj.weight"] = _stack(prefix, parts)
    return result


def _stack(prefix: str, parts: Mapping[str, Tensor]) -> Tensor:
    numbers = sorted({int(name.split(".")[1]) for name in parts if "." in name})
    groups = [[f"{part}.{number}" for part in _PER_MEMORY] for number in numbers]
    if any(name in parts for name in _SHARED):
        groups.append(list(_SHARED))
    wanted = {name for group in groups for name in group}
    if numbers != list(range(len(numbers))) or wanted != set(parts):
        missing = ", ".join(sorted(wanted - set(parts))) or f"memories before {numbers[-1]}"
        raise ValueError(f"weights of {prefix.rstrip('.')} are incomplete: {missing} missing")
    return torch.stack([torch.cat([parts[name] for name in group]) for group in groups])
