"""Attention over compressed segments, and over a window."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from remora.modules.cache import Cache, KeyValueCache
from remora.modules.rotary import rotate, token_positions
from remora.ops import prefix_attention, segment_pool

_pool = cast("Callable[..., Tensor]", segment_pool)  # a tensor, without return_arg

Compression = Literal["last", "mean", "max", "softmax"]


class _Attention(nn.Module):
    """Projections, heads and positions of an attention layer."""

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        rope_theta: float,
        layer_idx: int | None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if min(hidden_size, num_heads, num_kv_heads) < 1:
            raise ValueError(
                "hidden_size, num_heads and num_kv_heads must be positive, "
                f"got {hidden_size}, {num_heads} and {num_kv_heads}"
            )
        if num_heads % num_kv_heads != 0:
            raise ValueError(f"num_heads must be a multiple of num_kv_heads={num_kv_heads}, got {num_heads}")
        if head_dim is None and hidden_size % num_heads != 0:
            raise ValueError(f"hidden_size must be a multiple of num_heads={num_heads}, got {hidden_size}")
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2 != 0:
            raise ValueError(f"head_dim must be even and positive, got {head_dim}")
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.head_dim = head_dim
        self.rope_theta = rope_theta
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(hidden_size, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=False)

    def _past(self, hidden_states: Tensor, cache: Cache | None, cu_seqlens: Tensor | None) -> KeyValueCache | None:
        if hidden_states.dim() != 3 or hidden_states.shape[2] != self.hidden_size:
            raise ValueError(f"hidden_states must be [B, T, {self.hidden_size}], got {list(hidden_states.shape)}")
        if cache is None:
            return None
        if self.layer_idx is None:
            raise ValueError(f"a {type(self).__name__} called with a cache needs a layer_idx, got None")
        if cu_seqlens is not None:
            raise ValueError("cu_seqlens and cache exclude each other: the sequences of a cache have one length")
        return cache.get(self.layer_idx, KeyValueCache)

    def _project(
        self, hidden_states: Tensor, num_past: int, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return q `[B, T, H, D]` and k `[B, T, Hk, D]`, turned to their positions, and v."""
        heads = (-1, self.head_dim)
        q, k, v = (proj(hidden_states).unflatten(-1, heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        positions = token_positions(hidden_states.shape[1], num_past, cu_seqlens, hidden_states.device)
        return rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta), v


class SegmentCompressedAttention(_Attention):
    """Attention of every token over itself and one key and value of each whole segment of `stride` tokens before it.

        q, k, v = rope(W_q x), rope(W_k x), W_v x
        K_j, V_j = compression of the k, v of tokens j stride ... (j + 1) stride - 1
        y_t = W_o softmax(q_t [k_t, K_0 ... K_{floor(t / stride) - 1}] / sqrt(D)) [v_t, V_0 ...]

    Tokens of the unfinished segment do not see each other: a mixer before this layer carries them.

    Source: Jafari et al., "SCOUT: Toward Sub-Quadratic Attention via Segment Compression for Optimized Utility in
    Transformers" (2025), whose compression is `last`. The others are this package's.

    Args:
        hidden_size: `D_model`, the size of input and output.
        num_heads: `H`, the number of query heads.
        num_kv_heads: `Hk`, the number of key and value heads, which divides `H`; None means `H`.
        head_dim: `D`, even; None means `hidden_size / num_heads`.
        stride: tokens of a segment.
        compress: "last" keeps the key and value of a segment's last token; "mean", "max" and "softmax" pool them
            channel by channel. "softmax" weighs tokens by a gate, `W_g x` plus a bias of the place in the segment, the
            same for keys and values.
        rope_theta: base of the rotary embedding.
        layer_idx: the layer's key in a `Cache`; needed only for calls with one.

    Raises:
        ValueError: sizes do not fit, or `compress` is unknown.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        stride: int = 10,
        compress: Compression = "last",
        rope_theta: float = 1e6,
        layer_idx: int | None = None,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope_theta, layer_idx)
        if stride < 1:
            raise ValueError(f"stride must be positive, got {stride}")
        if compress not in get_args(Compression):
            raise ValueError(f"compress must be one of {get_args(Compression)}, got {compress!r}")
        self.stride = stride
        self.compress = compress
        if compress == "softmax":
            self.gate_proj = nn.Linear(hidden_size, self.num_kv_heads * self.head_dim, bias=False)
            self.slot_bias = nn.Parameter(torch.zeros(stride, self.num_kv_heads, self.head_dim))

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            hidden_states: `[B, T, D_model]`; `[1, T, D_model]` with `cu_seqlens`.
            cache: continue from, and update, this layer's state: the compressed keys and values, and unless
                `compress="last"` those of the unfinished segment.
            cu_seqlens: `[N + 1]` integer, boundaries of the sequences packed in one row; not with a cache.

        Returns:
            `[B, T, D_model]` like `hidden_states`.

        Raises:
            ValueError: a shape does not fit, or a cache is given to a layer without `layer_idx`.
        """
        past = self._past(hidden_states, cache, cu_seqlens)
        num_past = 0 if past is None else past.num_tokens
        q, k, v = self._project(hidden_states, num_past, cu_seqlens)
        tokens: tuple[Tensor, ...] = (k, v)
        if self.compress == "softmax":
            tokens = (k, v, self.gate_proj(hidden_states).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        if past is not None and past.segment:
            tokens = tuple(torch.cat([old, new], dim=1) for old, new in zip(past.segment, tokens, strict=True))
        keys, values = self._compressed(tokens, num_past, cu_seqlens)
        if past is not None:
            keys, values = torch.cat([past.keys, keys], dim=1), torch.cat([past.values, values], dim=1)
        if cache is not None and self.layer_idx is not None:
            num_tokens = num_past + hidden_states.shape[1]
            rest = num_tokens % self.stride if self.compress != "last" else 0
            segment = tuple(x[:, x.shape[1] - rest :].clone() for x in tokens) if rest else ()
            cache.set(self.layer_idx, KeyValueCache(keys, values, num_tokens, segment))
        o, _ = prefix_attention(
            q, keys, values, stride=self.stride, offset=1 - num_past, k_self=k, v_self=v, cu_seqlens=cu_seqlens
        )
        y: Tensor = self.o_proj(o.flatten(-2))
        return y

    def _compressed(self, tokens: tuple[Tensor, ...], num_past: int, cu_seqlens: Tensor | None) -> tuple[Tensor, ...]:
        """Keys and values of the segments that these tokens complete."""
        keys, values, *gate = tokens
        if self.compress == "last" and cu_seqlens is None:
            # Nothing is kept of an unfinished segment: its last token stands somewhere in these.
            first = self.stride - 1 - num_past % self.stride
            return tuple(_pool(x[:, first:], 1, self.stride, "last") for x in (keys, values))
        logits = {"gate": gate[0], "slot_bias": self.slot_bias} if gate else {}
        return tuple(_pool(x, self.stride, mode=self.compress, cu_seqlens=cu_seqlens, **logits) for x in (keys, values))


class SlidingWindowAttention(_Attention):
    """Causal attention of every token over the last `window` tokens, itself among them.

        y_t = W_o softmax(q_t [k_{t - window + 1} ... k_t] / sqrt(D)) [v_{t - window + 1} ... v_t]

    with q and k turned by the rotary embedding.

    Args:
        hidden_size: `D_model`, the size of input and output.
        num_heads: `H`, the number of query heads.
        num_kv_heads: `Hk`, the number of key and value heads, which divides `H`; None means `H`.
        head_dim: `D`, even; None means `hidden_size / num_heads`.
        window: tokens that a token sees; None: all before it, ordinary causal attention.
        rope_theta: base of the rotary embedding.
        layer_idx: the layer's key in a `Cache`; needed only for calls with one.
        norm_eps: not used; every mixer takes it.

    Raises:
        ValueError: sizes do not fit.
    """

    def __init__(
        self,
        hidden_size: int = 1024,
        num_heads: int = 16,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = 1024,
        rope_theta: float = 1e6,
        layer_idx: int | None = None,
        norm_eps: float = 1e-5,
    ) -> None:
        super().__init__(hidden_size, num_heads, num_kv_heads, head_dim, rope_theta, layer_idx)
        if window is not None and window < 1:
            raise ValueError(f"window must be positive or None, got {window}")
        self.window = window

    def forward(self, hidden_states: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            hidden_states: `[B, T, D_model]`; `[1, T, D_model]` with `cu_seqlens`.
            cache: continue from, and update, this layer's state: the keys and values of the last `window - 1` tokens.
            cu_seqlens: `[N + 1]` integer, boundaries of the sequences packed in one row; not with a cache.

        Returns:
            `[B, T, D_model]` like `hidden_states`.

        Raises:
            ValueError: a shape does not fit, or a cache is given to a layer without `layer_idx`.
        """
        past = self._past(hidden_states, cache, cu_seqlens)
        num_past = 0 if past is None else past.num_tokens
        q, k, v = self._project(hidden_states, num_past, cu_seqlens)
        num_kept = 0
        if past is not None:
            num_kept = past.keys.shape[1]
            k, v = torch.cat([past.keys, k], dim=1), torch.cat([past.values, v], dim=1)
        if cache is not None and self.layer_idx is not None:
            first = 0 if self.window is None else max(0, k.shape[1] - self.window + 1)
            keys, values = (x[:, first:].clone() if first else x for x in (k, v))
            cache.set(self.layer_idx, KeyValueCache(keys, values, num_past + hidden_states.shape[1]))
        o, _ = prefix_attention(
            q, k[:, :0], v[:, :0], window=max(1, k.shape[1]) if self.window is None else self.window,
            window_offset=-num_kept, k_win=k, v_win=v, cu_seqlens=cu_seqlens,
            cu_seqlens_k=None if cu_seqlens is None else torch.zeros_like(cu_seqlens),
        )  # fmt: skip
        y: Tensor = self.o_proj(o.flatten(-2))
        return y
