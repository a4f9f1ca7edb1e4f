"""UltraMem layers: memories found by Tucker-decomposed query-key retrieval."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from remora.modules.memory_table import MemoryTable
from remora.modules.normalization import RMSNorm
from remora.ops import tucker_pair, tucker_topk


class TuckerRetrieval(nn.Module):
    """Queries, sub-keys of rank r and cores: which slots a token reads, and the scores that are their weights.

        R[i] = <q_0, K_0[i]>, C[j] = <q_1, K_1[j]> in R^r, q and K RMS-normalised
        S_c[i, j] = R[i]^T core_c C[j]          the k best of sum_c S_c for each of H heads

    The gains of the normalisations start so that the mean kept score is one: scores of a random input are drawn with
    the initial cores, and `score_variance` keeps the variance of those that were kept.

    Args:
        hidden_size: `D`.
        num_keys: `n`; there are `n^2` slots.
        topk: `k`.
        num_heads: `H`.
        key_dim: `ds`.
        rank: `r`.
        num_cores: `h`, scores per slot.
        query_per_rank: whether every rank has its own query (UltraMemV2), or all share one.
        heads_per_query: heads that share a query.
        candidates, signs: as in `remora.ops.tucker_topk`.

    Raises:
        ValueError: a size is not positive, or sizes do not fit.
    """

    u: Tensor
    t: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_keys: int,
        topk: int,
        num_heads: int,
        key_dim: int,
        *,
        rank: int = 2,
        num_cores: int = 2,
        query_per_rank: bool = True,
        heads_per_query: int = 1,
        candidates: int = 128,
        signs: str = "positive",
    ) -> None:
        super().__init__()
        sizes = {"hidden_size": hidden_size, "num_keys": num_keys, "topk": topk, "num_heads": num_heads,
                 "key_dim": key_dim, "rank": rank, "num_cores": num_cores, "heads_per_query": heads_per_query,
                 "candidates": candidates}  # fmt: skip
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} must be positive, got {size}")
        if num_heads % heads_per_query:
            raise ValueError(f"heads_per_query must divide num_heads = {num_heads}, got {heads_per_query}")
        self.num_keys, self.topk, self.num_heads, self.key_dim = num_keys, topk, num_heads, key_dim
        self.rank, self.candidates, self.signs = rank, min(candidates, num_keys), signs
        self.query_shape = (num_heads // heads_per_query, 2, rank if query_per_rank else 1, key_dim)
        self.query_proj = nn.Linear(hidden_size, math.prod(self.query_shape), bias=False)
        self.query_norm = RMSNorm(key_dim)
        self.key_norm = RMSNorm(key_dim)
        self.keys = nn.Parameter(torch.empty(num_heads, 2, num_keys, key_dim, rank))
        self.core = nn.Parameter(torch.empty(num_cores, num_heads, rank, rank))
        self.register_buffer("u", torch.empty(num_heads, rank))
        self.register_buffer("t", torch.empty(num_heads, rank))
        self.score_variance = 1.0
        self._pair_version = -1
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal queries and sub-keys, uniform cores, gains for a mean kept score of one."""
        nn.init.normal_(self.query_proj.weight, std=math.sqrt(2 / (5 * self.query_proj.in_features)))
        nn.init.normal_(self.keys, std=self.key_dim**-0.5)
        nn.init.uniform_(self.core)
        if self.core.is_meta:
            return
        pair = tucker_pair(self.core)
        self.u.copy_(pair.u)
        self.t.copy_(pair.t)
        self._pair_version = self.core._version
        mean, second = kept_score_moments(self.core, self.u, self.t, self.num_keys, self.topk, self.candidates)
        # Scores are products of a row's and a column's, each of deviation gain_q * gain_k * sqrt(ds).
        gain = (mean**-0.5 / math.sqrt(self.key_dim)) ** 0.5
        nn.init.constant_(self.query_norm.weight, gain)
        nn.init.constant_(self.key_norm.weight, gain)
        self.score_variance = second / mean**2 - 1

    @torch.no_grad()
    def refresh_pair(self) -> None:
        """Bring the candidates' directions u and t up to the cores, their signs continued."""
        pair = tucker_pair(self.core, (self.u, self.t))
        self.u.copy_(pair.u)
        self.t.copy_(pair.t)
        self._pair_version = self.core._version

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Choose slots for tokens `x` `[T, D]`: indices `[T, H * k]` int32 and scores `[T, H * k, h]`."""
        if self.training and self._pair_version != self.core._version:
            self.refresh_pair()
        query = self.query_norm(self.query_proj(x).view(-1, *self.query_shape))
        keys = self.key_norm(self.keys.transpose(-1, -2)).transpose(-1, -2).to(query.dtype)
        scores, slots = tucker_topk(
            query, keys, self.core, self.u, self.t, self.topk, candidates=self.candidates, signs=self.signs
        )
        return slots.flatten(1), scores.flatten(1, 2)


def kept_score_moments(
    core: Tensor, u: Tensor, t: Tensor, num_keys: int, topk: int, candidates: int, samples: int = 64
) -> tuple[float, float]:
    """First and second moment of the scores that are kept, for row and column scores drawn from N(0, 1).

    Args:
        core: `[h, H, r, r]`.
        u, t: `[H, r]`.
        num_keys, topk, candidates: `n`, `k`, `k1`.
        samples: tokens to draw, from a generator of their own.
    """
    generator = torch.Generator().manual_seed(0)
    H, r = u.shape
    rows, columns = (torch.randn(samples, H, num_keys, r, generator=generator) for _ in range(2))
    core, u, t = core.float().cpu(), u.float().cpu(), t.float().cpu()

    def best(x: Tensor, direction: Tensor) -> Tensor:
        index = torch.einsum("thnr,hr->thn", x, direction).topk(candidates, -1).indices
        return x.gather(2, index[..., None].expand(-1, -1, -1, r))

    rows, columns = best(rows, u), best(columns, t)
    left = torch.einsum("thir,chrs->tchis", rows, core)
    scores = torch.einsum("tchis,thjs->tchij", left, columns).flatten(3)
    chosen = scores.sum(1).topk(topk, -1).indices
    kept = scores.gather(3, chosen[:, None].expand(-1, core.shape[0], -1, -1))
    return float(kept.mean()), float(kept.square().mean())


class UltraMem(nn.Module):
    """Memory with Tucker-decomposed retrieval, several scores per value and virtual expansion.

        virt = permutation(slot)     e, s = virt div N, virt mod N
        out = sum_e W_e^T sum_{m: e_m = e} S_m V[s_m]     column block c of a value weighed by S_c

    Keys address `E N` virtual slots; each of the `N` values is read through `E` projections.

    Source: Huang et al., "Ultra-Sparse Memory Network" (ICLR 2025).

    Args:
        hidden_size: `D`.
        num_keys: `n`; `n^2` virtual slots.
        topk, num_heads: `k`, `H`. Two heads share a query.
        key_dim: `ds`; default `D / 2`.
        value_dim: `dv`; default `D / 2`. The cores divide it.
        expansion: `E`, divides `n^2`.
        rank, num_cores, candidates, signs: as in `TuckerRetrieval`.
        num_layers: `L` of the model, for the initial size of the values.
        table: a `MemoryTable` of `n^2 / E` rows to share; default a new one.
        sparse_grad: of a new table.

    Raises:
        ValueError: a size or option does not fit.
    """

    permutation: Tensor

    def __init__(
        self,
        hidden_size: int,
        num_keys: int = 512,
        topk: int = 32,
        num_heads: int = 2,
        key_dim: int | None = None,
        value_dim: int | None = None,
        *,
        expansion: int = 4,
        rank: int = 2,
        num_cores: int = 2,
        candidates: int = 128,
        signs: str = "positive",
        num_layers: int = 1,
        table: MemoryTable | None = None,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        half = max(1, hidden_size // 2)
        value_dim = half if value_dim is None else value_dim
        num_slots = num_keys**2
        if expansion < 1 or num_slots % expansion:
            raise ValueError(f"expansion must divide num_keys^2 = {num_slots}, got {expansion}")
        if value_dim % num_cores:
            raise ValueError(f"num_cores must divide value_dim = {value_dim}, got {num_cores}")
        self.hidden_size, self.expansion, self.num_layers = hidden_size, expansion, num_layers
        self.retrieval = TuckerRetrieval(
            hidden_size, num_keys, topk, num_heads, half if key_dim is None else key_dim, rank=rank,
            num_cores=num_cores, query_per_rank=False, heads_per_query=2 if num_heads % 2 == 0 else 1,
            candidates=candidates, signs=signs,
        )  # fmt: skip
        rows = num_slots // expansion
        self.table = MemoryTable(rows, value_dim, sparse_grad=sparse_grad) if table is None else table
        if self.table.num_rows < rows or self.table.dim != value_dim:
            raise ValueError(f"table must have {rows} rows of {value_dim}, got {self.table}")
        # Slots that read the same value stand anywhere in the grid of keys.
        order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(0), device="cpu").int()
        self.register_buffer("permutation", order, persistent=False)
        self.out_proj = nn.Linear(expansion * value_dim, hidden_size, bias=False)
        self.reset_parameters(reset_table=table is None)

    @torch.no_grad()
    def reset_parameters(self, reset_table: bool = True) -> None:
        """Values of variance `E / (2 k H L)`, so that the layer's output has variance `1 / (2 L)`."""
        lookups = self.retrieval.topk * self.retrieval.num_heads
        if reset_table:
            self.table.reset_parameters(math.sqrt(self.expansion / (2 * lookups * self.num_layers)))
        nn.init.normal_(self.out_proj.weight, std=self.out_proj.in_features**-0.5)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to `hidden_states` `[..., D]`. There is no state between calls."""
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states must be [..., {self.hidden_size}], got {list(hidden_states.shape)}")
        slots, scores = self.retrieval(hidden_states.flatten(0, -2))
        indices = self.permutation[slots]
        y = self.table.bag(
            indices, scores, groups=self.expansion, layer_rows=self.retrieval.num_keys**2 // self.expansion
        )
        out: Tensor = self.out_proj(y.flatten(1).to(self.out_proj.weight.dtype))
        return out.view(hidden_states.shape).to(hidden_states.dtype)


class UltraMemV2(nn.Module):
    """Memory of experts of one hidden unit without activation, found by Tucker-decomposed retrieval.

        out = W_v^T sum_m <U[s_m], W_p x> S_m V[s_m]     column block c of V weighed by S_c

    Source: Huang et al., "UltraMemV2" (2025). The layer stands beside the feed-forward layer of every block and
    reads the same input.

    Args:
        hidden_size: `D`.
        num_keys, topk: `n`, `k`.
        key_dim: `ds`; default `D / 4`.
        down_dim, up_dim: `dp`, `dv`; default `D / 4`. The cores divide `dv`.
        num_heads, rank, num_cores, candidates, signs: as in `TuckerRetrieval`.
        num_layers, ffn_expansion: `L` of the model and the inner width of its feed-forward layers over `D`, for the
            initial size of the table.
        table: a `MemoryTable` of at least `n^2` rows of `dp + dv`, U and V side by side, to share with other layers;
            default a new one.
        offset: row of `table` that slot 0 reads; rows wrap around at the end (a ring of layers).
        sparse_grad: of a new table.

    Raises:
        ValueError: a size or option does not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_keys: int = 360,
        topk: int = 32,
        key_dim: int | None = None,
        down_dim: int | None = None,
        up_dim: int | None = None,
        *,
        num_heads: int = 1,
        rank: int = 2,
        num_cores: int = 2,
        candidates: int = 128,
        signs: str = "positive",
        num_layers: int = 1,
        ffn_expansion: float = 8 / 3,
        table: MemoryTable | None = None,
        offset: int = 0,
        sparse_grad: bool = False,
    ) -> None:
        super().__init__()
        quarter = max(1, hidden_size // 4)
        down_dim, up_dim = quarter if down_dim is None else down_dim, quarter if up_dim is None else up_dim
        if up_dim % num_cores:
            raise ValueError(f"num_cores must divide up_dim = {up_dim}, got {num_cores}")
        self.hidden_size, self.num_layers, self.ffn_expansion, self.offset = (
            hidden_size, num_layers, ffn_expansion, offset,
        )  # fmt: skip
        self.retrieval = TuckerRetrieval(
            hidden_size, num_keys, topk, num_heads, quarter if key_dim is None else key_dim, rank=rank,
            num_cores=num_cores, candidates=candidates, signs=signs,
        )  # fmt: skip
        self.table = MemoryTable(num_keys**2, down_dim + up_dim, sparse_grad=sparse_grad) if table is None else table
        if self.table.num_rows < num_keys**2 or self.table.dim != down_dim + up_dim:
            raise ValueError(f"table must have {num_keys**2} rows of {down_dim + up_dim}, got {self.table}")
        self.down_proj = nn.Linear(hidden_size, down_dim, bias=False)
        self.out_proj = nn.Linear(up_dim, hidden_size, bias=False)
        self.reset_parameters(reset_table=table is None)

    @property
    def table_std(self) -> float:
        """The table's initial deviation, which gives this layer's output the variance `0.064 kappa / (2 L)` of a
        feed-forward layer's:

            sigma^4 = 0.2 kappa D / (k H (1 + score variance) dp dv L)
        """
        retrieval = self.retrieval
        lookups = retrieval.topk * retrieval.num_heads * (1 + retrieval.score_variance)
        width = self.down_proj.out_features * self.out_proj.in_features * self.num_layers
        return float((0.2 * self.ffn_expansion * self.hidden_size / (lookups * width)) ** 0.25)

    @torch.no_grad()
    def reset_parameters(self, reset_table: bool = True) -> None:
        """Projections of variance `2 / (5 D)`, a table of deviation `table_std`."""
        for projection in (self.down_proj, self.out_proj):
            nn.init.normal_(projection.weight, std=math.sqrt(2 / (5 * self.hidden_size)))
        if reset_table:
            self.table.reset_parameters(self.table_std)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to `hidden_states` `[..., D]`. There is no state between calls."""
        if hidden_states.shape[-1] != self.hidden_size:
            raise ValueError(f"hidden_states must be [..., {self.hidden_size}], got {list(hidden_states.shape)}")
        x = hidden_states.flatten(0, -2)
        slots, scores = self.retrieval(x)
        y = self.table.experts(
            slots, self.down_proj(x), scores, layer_rows=self.retrieval.num_keys**2, offset=self.offset
        )
        out: Tensor = self.out_proj(y.to(self.out_proj.weight.dtype))
        return out.view(hidden_states.shape).to(hidden_states.dtype)
