"""Product-key memory layers: the plain one, Memory+ and PEER."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from remora.modules.memory_table import MemoryTable
from remora.modules.normalization import RMSNorm
from remora.ops import pk_topk

QueryNorm = Literal["none", "batch", "layer", "rms"]
Activation = Literal["softmax", "relu", "sigmoid", "none"]


class ProductKeyRetrieval(nn.Module):
    """Queries, sub-keys and selection: which slots a token reads, and with what weights.

        q = norm(W_q x + b)     s = q_0 . K_0[i] + q_1 . K_1[j], the k best of n^2 slots for each of H heads
        p = softmax(s) over the k of a head, or relu(s), sigmoid(s), s

    Args:
        hidden_size: `D`.
        num_keys: `n`; there are `n^2` slots.
        topk: `k`, slots a head reads.
        num_heads: `H`.
        key_dim: `ds`, width of a sub-key and of half a query.
        query_norm: normalisation of queries: "none", "batch" over all tokens (not causal; running statistics in
            evaluation), "layer" or "rms" on each half.
        qk_norm: RMS-normalise half queries and sub-keys, with gains.
        activation: "softmax", "relu", "sigmoid" or "none".

    Raises:
        ValueError: a size is not positive, or an option is unknown.
    """

    def __init__(
        self,
        hidden_size: int,
        num_keys: int,
        topk: int,
        num_heads: int,
        key_dim: int,
        *,
        query_norm: QueryNorm = "none",
        qk_norm: bool = False,
        activation: Activation = "softmax",
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_keys": num_keys, "topk": topk, "num_heads": num_heads,
                 "key_dim": key_dim}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if topk > num_keys**2:
            raise ValueError(f"topk must be at most num_keys^2 = {num_keys**2}, got {topk}")
        for name, value, allowed in (("query_norm", query_norm, QueryNorm), ("activation", activation, Activation)):
            if value not in get_args(allowed):
                raise ValueError(f"{name} must be one of {get_args(allowed)}, got {value!r}")
        self.num_keys, self.topk, self.num_heads, self.key_dim = num_keys, topk, num_heads, key_dim
        self.activation = activation
        self.query_proj = nn.Linear(hidden_size, num_heads * 2 * key_dim)
        self.query_norm: nn.Module = nn.Identity()
        if query_norm == "batch":
            self.query_norm = nn.BatchNorm1d(num_heads * 2 * key_dim)
        elif query_norm == "layer":
            self.query_norm = nn.LayerNorm(key_dim)
        elif query_norm == "rms" or qk_norm:
            self.query_norm = RMSNorm(key_dim)
        self.key_norm = RMSNorm(key_dim) if qk_norm else nn.Identity()
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform queries, uniform sub-keys of bound `1 / sqrt(2 ds)` (Lample et al., 2019)."""
        nn.init.xavier_uniform_(self.query_proj.weight)
        nn.init.zeros_(self.query_proj.bias)
        nn.init.uniform_(self.keys, -1 / math.sqrt(2 * self.key_dim), 1 / math.sqrt(2 * self.key_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose slots for tokens `x` `[T, D]`: indices `[T, H * k]` int32 and weights `[T, H * k]`."""
        query = self.query_proj(x)
        if isinstance(self.query_norm, nn.BatchNorm1d):
            query = self.query_norm(query)
        query = query.view(-1, self.num_heads, 2, self.key_dim)
        if not isinstance(self.query_norm, nn.BatchNorm1d):
            query = self.query_norm(query)
        scores, slots = pk_topk(query, self.key_norm(self.keys).to(query.dtype), self.topk)
        if self.activation == "softmax":
            scores = scores.softmax(-1)
        elif self.activation == "relu":
            scores = scores.relu()
        elif self.activation == "sigmoid":
            scores = scores.sigmoid()
        return slots.flatten(1), scores.flatten(1)


class ProductKeyMemory(nn.Module):
    """Memory of `n^2` values, of which every token reads the `k` with the best keys, per head.

        y = sum over heads and slots of p V[slot]

    Source: Lample et al., "Large Memory Layers with Product Keys" (NeurIPS 2019).

    Args:
        hidden_size: `D`.
        num_keys, topk, num_heads: `n`, `k`, `H`.
        key_dim: `ds`; default `D / 2`.
        value_dim: `dv`, the size of the output; default `D`.
        table: a `MemoryTable` of at least `n^2` rows to share with other layers; default a new one.
        sparse_grad: of a new table.
        query_norm, qk_norm, activation: as in `ProductKeyRetrieval`.

    Raises:
        ValueError: a size or option does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_keys: int = 512,
        topk: int = 32,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        *,
        table: MemoryTable | None = None,
        sparse_grad: bool = False,
        query_norm: QueryNorm = "batch",
        qk_norm: bool = False,
        activation: Activation = "softmax",
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        value_dim = hidden_size if value_dim is None else value_dim
        self.retrieval = ProductKeyRetrieval(
            hidden_size, num_keys, topk, num_heads, max(1, hidden_size // 2) if key_dim is None else key_dim,
            query_norm=query_norm, qk_norm=qk_norm, activation=activation,
        )  # fmt: skip
        self.table = MemoryTable(num_keys**2, value_dim, sparse_grad=sparse_grad) if table is None else table
        if self.table.num_rows < num_keys**2 or self.table.dim != value_dim:
            raise ValueError(
                f"table must have {num_keys**2} rows of {value_dim}, got {self.table.num_rows} of {self.table.dim}"
            )

    def read(self, x: Tensor) -> Tensor:
        """Sums of values for tokens `[..., D]`, `[..., dv]` in the dtype of the table."""
        if x.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states must be [..., {self.hidden_size}], got {list(x.shape)}")
        indices, weights = self.retrieval(x.flatten(0, -2))
        return self.table.bag(indices, weights, layer_rows=self.retrieval.num_keys**2).view(*x.shape[:-1], -1)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Read the memory for `hidden_states` `[..., D]`; returns `[..., dv]`. There is no state between calls."""
        return self.read(hidden_states).to(hidden_states.dtype)


class MemoryPlus(ProductKeyMemory):
    """Product-key memory with a gate of the input and an output projection.

        out = W_2 (y * silu(W_1 x)),   y as in `ProductKeyMemory`

    Source: Berges et al., "Memory Layers at Scale" (2024). Several layers share one table there: make a `MemoryTable`
    and give it to all.

    Args:
        hidden_size: `D`.
        num_keys, topk, num_heads: `n`, `k`, `H`.
        key_dim: `ds`; default `D / 4`: keys of both halves are half as wide as the values.
        value_dim: `dv`; default `D`.
        table, sparse_grad, qk_norm: as in `ProductKeyMemory`.

    Raises:
        ValueError: a size or option does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_keys: int = 1024,
        topk: int = 32,
        num_heads: int = 4,
        key_dim: int | None = None,
        value_dim: int | None = None,
        *,
        table: MemoryTable | None = None,
        sparse_grad: bool = False,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(
            hidden_size, num_keys, topk, num_heads, max(1, hidden_size // 4) if key_dim is None else key_dim, value_dim,
            table=table, sparse_grad=sparse_grad, query_norm="none", qk_norm=qk_norm,
        )  # fmt: skip
        self.gate_proj = nn.Linear(hidden_size, self.table.dim)
        self.out_proj = nn.Linear(self.table.dim, hidden_size)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to `hidden_states` `[..., D]`."""
        values = self.read(hidden_states)
        gate = F.silu(self.gate_proj(hidden_states))
        out: Tensor = self.out_proj(values.to(gate.dtype) * gate)
        return out


class PEER(nn.Module):
    """Mixture of a million experts of one hidden unit each, found by product keys.

        out = sum over heads and slots of p act(<U[slot], x>) V[slot]

    Source: He, "Mixture of A Million Experts" (2024).

    Args:
        hidden_size: `D`.
        num_keys, topk, num_heads: `n`, `k`, `H`.
        key_dim: `ds`; default 128.
        table: a `MemoryTable` of at least `n^2` rows of `2 D`, U and V side by side, to share with other layers;
            default a new one.
        sparse_grad: of a new table.
        act: "gelu", "relu", "silu" or "identity".
        query_norm, activation: as in `ProductKeyRetrieval`.

    Raises:
        ValueError: a size or option does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_keys: int = 1024,
        topk: int = 16,
        num_heads: int = 8,
        key_dim: int = 128,
        *,
        table: MemoryTable | None = None,
        sparse_grad: bool = False,
        act: str = "gelu",
        query_norm: QueryNorm = "batch",
        activation: Activation = "softmax",
    ) -> None:
        super().__init__()
        self.hidden_size, self.act = hidden_size, act
        self.retrieval = ProductKeyRetrieval(
            hidden_size, num_keys, topk, num_heads, key_dim, query_norm=query_norm, activation=activation
        )
        if table is None:
            table = MemoryTable(num_keys**2, 2 * hidden_size, sparse_grad=sparse_grad)
            table.reset_parameters(hidden_size**-0.5)
        self.table = table
        if table.num_rows < num_keys**2 or table.dim != 2 * hidden_size:
            raise ValueError(f"table must have {num_keys**2} rows of {2 * hidden_size}, got {table}")

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to `hidden_states` `[..., D]`. There is no state between calls."""
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states must be [..., {self.hidden_size}], got {list(hidden_states.shape)}")
        x = hidden_states.flatten(0, -2)
        indices, weights = self.retrieval(x)
        y = self.table.experts(indices, x, weights, act=self.act, layer_rows=self.retrieval.num_keys**2)
        return y.view(hidden_states.shape).to(hidden_states.dtype)
