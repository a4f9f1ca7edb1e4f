"""Vector quantization: what users call. Arguments are checked and brought into the operators' form here.

Source: Lingle, "Transformer-VQ: Linear-Time Transformers via Vector Quantization", arXiv 2309.16354.
"""

from __future__ import annotations

import torch
from torch import Tensor

from remora import _ext
from remora.ops import check
from remora.ops.segment.segment_pool import segment_pool
from remora.ops.segment.vector_quantization import registration  # noqa: F401  (fakes and gradients)

MAX_CODES_CUDA = 2816  # of code_prefix_state, whose sums stay in shared memory


def _check_tokens(x: Tensor, name: str) -> Tensor:
    """A [B, H, T, D] tensor, with contiguous rows."""
    check.is_tensor(x, name)
    _ext.require_backend(x, name)
    check.has_dtype(x, name, check.FLOATS if _ext.runs_on_cpu_kernels(x) else check.FLOATS[1:])
    check.has_shape(x, name, "[B, H, T, D]", [None] * 4)
    return x if x.stride(3) == 1 else x.contiguous()


def _check_mask(mask: Tensor | None, like: Tensor) -> Tensor | None:
    if mask is None:
        return None
    check.is_tensor(mask, "mask")
    check.has_dtype(mask, "mask", (torch.bool,))
    check.has_shape(mask, "mask", "[B, T]", [like.shape[0], like.shape[2]])
    check.same_device(mask, "mask", like, "x")
    return mask


def _check_codes(idx: Tensor, like: Tensor, like_name: str) -> Tensor:
    check.is_tensor(idx, "idx")
    check.has_dtype(idx, "idx", (torch.int32, torch.int64))
    check.has_shape(idx, "idx", "[B, H, T]", like.shape[:3])
    check.same_device(idx, "idx", like, like_name)
    return idx


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def vq_assign(x: Tensor, codebook: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The nearest code of every token.

        idx_t = argmin_s |x_t - codebook_s|^2        err2_t = |x_t - codebook[idx_t]|^2

    The products with the codes never reach memory. Of codes whose distances are equal in the arithmetic of the kernel,
    |c|^2 / 2 - <x, c> in float32 (float64 for float64), the first is taken. err2 is differentiable by x (the commitment
    loss); codes follow by `vq_ema_`.

    Args:
        x: [B, H, T, D]; float32, bfloat16 or float16 (float64 on the CPU).
        codebook: [H, S, D] in the dtype of x.
        mask: [B, T] bool, False for tokens without a code.

    Returns:
        idx [B, H, T] int32, -1 without a code, and err2 [B, H, T] float32 (float64 for float64), 0 without one.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape or device is not allowed.
    """
    x = _check_tokens(x, "x")
    check.is_tensor(codebook, "codebook")
    check.has_dtype(codebook, "codebook", (x.dtype,))
    check.has_shape(codebook, "codebook", "[H, S, D]", [x.shape[1], None, x.shape[3]])
    check.same_device(codebook, "codebook", x, "x")
    check.in_range(codebook.shape[1], "the number of codes S", 1, 2**31 - 2)
    check.in_range(x.shape[3], "the channels D of x", 1, 2**30)
    mask = _check_mask(mask, x)
    err2, idx = torch.ops.remora.vq_assign(
        x, codebook.detach().contiguous(), None if mask is None else mask.to(torch.uint8).contiguous()
    )
    return idx, err2


@torch.no_grad()
def vq_ema_(csum: Tensor, ccount: Tensor, x: Tensor, idx: Tensor, decay: float, mask: Tensor | None = None) -> None:
    """Updates the moving averages of a codebook in place.

        csum_s   = decay csum_s   + (1 - decay) sum of the x_t with idx_t = s
        ccount_s = decay ccount_s + (1 - decay) how many there are

    over the batch, for every head; the codebook is csum / ccount. Tokens are sorted by code (stable) and summed up in
    their order by `segment_pool`: bitwise reproducible, no atomics, nothing waits for the device.

    Args:
        csum: [H, S, D] float32 (float64 for float64 x).
        ccount: [H, S], as csum.
        x: [B, H, T, D].
        idx: [B, H, T] int32 or int64; tokens whose code is outside 0 ... S - 1 do not count.
        decay: in 0 ... 1.
        mask: [B, T] bool, False for tokens that do not count.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device or value is not allowed.
    """
    x = _check_tokens(x, "x")
    B, H, T, D = x.shape
    for name, tensor in (("csum", csum), ("ccount", ccount)):
        check.is_tensor(tensor, name)
        check.has_dtype(tensor, name, (_wide(x),))
        check.same_device(tensor, name, x, "x")
    check.has_shape(csum, "csum", "[H, S, D]", [H, None, D])
    S = csum.shape[1]
    check.has_shape(ccount, "ccount", "[H, S]", [H, S])
    idx = _check_codes(idx, x, "x")
    mask = _check_mask(mask, x)
    if not 0 <= decay <= 1:
        raise ValueError(f"decay must be in 0 ... 1, got {decay}")
    # Behind the last code: tokens that do not count.
    codes = torch.where((idx >= 0) & (idx < S), idx, S)
    if mask is not None:
        codes = torch.where(mask[:, None], codes, S)
    codes, order = codes.transpose(0, 1).reshape(H, B * T).to(torch.int32).sort(dim=1, stable=True)
    rows = x.transpose(0, 1).reshape(H, B * T, D).gather(1, order[..., None].expand(-1, -1, D)).to(csum.dtype)
    sums = segment_pool(rows, mode="sum", segment_ids=codes, num_segments=S)
    bounds = torch.searchsorted(
        codes, torch.arange(S + 1, dtype=torch.int32, device=x.device).expand(H, -1).contiguous()
    )
    csum.mul_(decay).add_(sums, alpha=1 - decay)  # type: ignore[arg-type]
    ccount.mul_(decay).add_(bounds.diff(dim=1).to(ccount.dtype), alpha=1 - decay)


def code_prefix_state(
    idx: Tensor,
    v: Tensor,
    n_code: int,
    chunk: int,
    state: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Counts and mean values of the tokens of every code before each chunk: what attention over quantised keys reads of
    the past. Differentiable by v and by the mean of `state`.

    Border n is in front of token n * chunk; it counts all tokens before it, and `state` as if it had come before them.
    There are N = ceil(T / chunk). Sums are float32 (float64 for float64 v), in the order of the tokens. Attention of q
    over keys that are codes C[idx] is attention over the codes, softmax_s(<q, C_s> + log_count_s) mean_s.

    Args:
        idx: [B, H, T] int32 or int64, the code of every token; outside 0 ... n_code - 1: none.
        v: [B, H, T, D]; float32, bfloat16 or float16 (float64 on the CPU).
        n_code: S; on CUDA up to 2816.
        chunk: tokens from a border to the next.
        state: count [B, H, S] and mean [B, H, S, D] float32 (float64 for float64 v), as returned.

    Returns:
        log_count [B, H, N, S] float32 (float64 for float64 v), -inf of a code without tokens; mean [B, H, N, S, D] in
        the dtype of v, zero without tokens; and the state behind the last token.

    Raises:
        TypeError: an argument is not a tensor or has a dtype that is not allowed.
        ValueError: a shape, device or size is not allowed.
    """
    v = _check_tokens(v, "v")
    idx = _check_codes(idx, v, "v").clamp(-1, n_code).to(torch.int32).contiguous()
    check.in_range(n_code, "n_code", 1, 2**31 - 2 if _ext.runs_on_cpu_kernels(v) else MAX_CODES_CUDA)
    check.in_range(chunk, "chunk", 1, 2**31 - 1)
    count = mean = None
    if state is not None:
        B, H, _, D = v.shape
        count, mean = state
        for name, tensor, shape in (("count", count, [B, H, n_code]), ("mean", mean, [B, H, n_code, D])):
            check.is_tensor(tensor, f"the {name} of state")
            check.has_dtype(tensor, f"the {name} of state", (_wide(v),))
            check.has_shape(tensor, f"the {name} of state", "[B, H, S]" if name == "count" else "[B, H, S, D]", shape)
            check.same_device(tensor, f"the {name} of state", v, "v")
        count, mean = count.detach().contiguous(), mean.contiguous()
    log_count, means, final_count, final_mean = torch.ops.remora.code_prefix_fwd(idx, v, count, mean, n_code, chunk)
    return log_count, means, (final_count, final_mean)
