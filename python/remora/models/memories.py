"""Memory layers beside the feed-forward layers of a language model, and how layers share tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from remora.modules import MemoryPlus, MemoryTable, ProductKeyMemory, UltraMemV2

MEMORIES = ("product_key_memory", "memory_plus", "ultramem_v2")
SHARING = ("none", "ring", "block", "all")


def make_memories(
    name: str, hidden_size: int, num_layers: int, ffn_expansion: float, options: dict[str, Any]
) -> Sequence[nn.Module]:
    """One memory layer for every block.

    Args:
        name: "product_key_memory", "memory_plus" or "ultramem_v2".
        hidden_size, num_layers: `D`, `L`.
        ffn_expansion: inner width of the feed-forward layers over `D`, for the initialisation of UltraMemV2.
        options: keyword arguments of the layer, and `sharing` with `group` g:

            * "none": every layer has the `n^2` rows of its keys (default).
            * "ring" (UltraMemV2): a pool of `L n^2 / g` rows; layer l reads the g pieces from l on, around the end.
            * "block" (UltraMemV2): g neighbouring layers read the same `n^2` rows.
            * "all" (the others): all layers read the same `n^2` rows.

    Raises:
        ValueError: the name or the sharing is unknown, or sizes do not fit.
    """
    options = dict(options)
    sharing, group = options.pop("sharing", "none"), options.pop("group", 1)
    if name not in MEMORIES:
        raise ValueError(f"memory must be one of {MEMORIES}, got {name!r}")
    if sharing not in SHARING or (sharing in ("ring", "block")) != (name == "ultramem_v2" and sharing != "none"):
        raise ValueError(f"sharing must be one of {SHARING}, ring and block for ultramem_v2, got {sharing!r} of {name}")
    if name != "ultramem_v2":
        kind = ProductKeyMemory if name == "product_key_memory" else MemoryPlus
        first = kind(hidden_size, **options)
        shared: MemoryTable | None = first.table if sharing == "all" else None
        return [first, *(kind(hidden_size, table=shared, **options) for _ in range(num_layers - 1))]

    options |= {"num_layers": num_layers, "ffn_expansion": ffn_expansion}
    if sharing == "none":
        return [UltraMemV2(hidden_size, **options) for _ in range(num_layers)]
    slots = options.get("num_keys", 360) ** 2
    if group < 1 or num_layers % group or (sharing == "ring" and slots % group):
        raise ValueError(f"group must divide num_layers = {num_layers} (ring: and num_keys^2 = {slots}), got {group}")
    quarter = max(1, hidden_size // 4)
    sizes = options.get("down_dim") or quarter, options.get("up_dim") or quarter
    sparse_grad = options.pop("sparse_grad", False)

    def pool(rows: int) -> MemoryTable:
        return MemoryTable(rows, sum(sizes), sparse_grad=sparse_grad)

    if sharing == "ring":
        piece = slots // group
        ring = pool(num_layers * piece)
        layers = [UltraMemV2(hidden_size, table=ring, offset=i * piece, **options) for i in range(num_layers)]
    else:
        blocks = [pool(slots) for _ in range(num_layers // group)]
        layers = [UltraMemV2(hidden_size, table=blocks[i // group], **options) for i in range(num_layers)]
    for layer in layers:
        layer.table.reset_parameters(layer.table_std)
    return layers
