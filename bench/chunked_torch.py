"""The recurrences as a competent user would write them in plain PyTorch: chunks, batched products, and for the gated
delta rule one triangular solve.
"""

import torch
from torch import Tensor


def split(x: Tensor, chunk: int) -> Tensor:
    """[B, T, H, ...] as [B H, N, C, ...], padded to whole chunks."""
    pad = -x.shape[1] % chunk
    x = torch.nn.functional.pad(x, (0,) * (2 * (x.ndim - 2)) + (0, pad)) if pad else x
    return x.transpose(1, 2).reshape(x.shape[0] * x.shape[2], -1, chunk, *x.shape[3:])


def decays(g: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of the gates [B H, N, C] within chunks, and the decays between their tokens."""
    G, chunk = g.float().cumsum(-1), g.shape[-1]
    lower = torch.ones(chunk, chunk, dtype=torch.bool, device=g.device).tril()
    return G, (G.unsqueeze(-1) - G.unsqueeze(-2)).masked_fill(~lower, -torch.inf).exp()


def chunked_simple_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor, scale: float, chunk: int = 64) -> Tensor:
    """[B, T, H, D] inputs; products in the dtype of q, gates and state in float32; differentiable."""
    B, T, H, K = q.shape
    V, dtype = v.shape[-1], q.dtype
    q, k, v, g = (split(x, chunk) for x in (q * scale, k, v, g))
    G, decay = decays(g)
    inside = (decay * (q @ k.transpose(-1, -2)).float()).to(dtype) @ v
    writes = (k * (G[..., -1:] - G).exp().unsqueeze(-1)).to(dtype).transpose(-1, -2) @ v
    last = G[..., -1].exp()[..., None, None]
    state, states = torch.zeros(B * H, K, V, dtype=torch.float32, device=q.device), []
    for write, factor in zip(writes.float().unbind(1), last.unbind(1), strict=True):
        states.append(state)
        state = state * factor + write
    o = inside + (q * G.exp().unsqueeze(-1)).to(dtype) @ torch.stack(states, 1).to(dtype)
    return o.reshape(B, H, -1, V)[:, :, :T].transpose(1, 2)


def chunked_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, scale: float, chunk: int = 64
) -> Tensor:
    """[B, T, H, D] inputs; products in the dtype of q, gates, solve and state in float32; differentiable."""
    B, T, H, K = q.shape
    V, dtype = v.shape[-1], q.dtype
    q, k, v, g, beta = (split(x, chunk) for x in (q * scale, k, v, g, beta))
    G, decay = decays(g)
    beta = beta.float().unsqueeze(-1)
    kt = k.transpose(-1, -2)
    system = beta * decay * (k @ kt).float()
    attention = (decay * (q @ kt).float()).to(dtype)
    right = torch.cat([beta * v.float(), beta * G.exp().unsqueeze(-1) * k.float()], -1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    u, w = solved[..., :V], solved[..., V:].to(dtype)
    q = (q * G.exp().unsqueeze(-1)).to(dtype)
    kd = (k * (G[..., -1:] - G).exp().unsqueeze(-1)).to(dtype).transpose(-1, -2)
    last = G[..., -1].exp()[..., None, None]

    state = torch.zeros(B * H, K, V, dtype=torch.float32, device=q.device)
    out = []
    for w_n, u_n, q_n, a_n, k_n, l_n in zip(*(x.unbind(1) for x in (w, u, q, attention, kd, last)), strict=True):
        s = state.to(dtype)
        new = (u_n - (w_n @ s).float()).to(dtype)
        out.append(q_n @ s + a_n @ new)
        state = state * l_n + (k_n @ new).float()
    return torch.stack(out, 1).reshape(B, H, -1, V)[:, :, :T].transpose(1, 2)


def simple_gla_step_(q: Tensor, k: Tensor, v: Tensor, g: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token, the state [B, H, K, V] in place."""
    q, k, v = (x.squeeze(1).float() for x in (q, k, v))
    state.mul_(g.squeeze(1).exp()[..., None, None]).addcmul_(k.unsqueeze(-1), v.unsqueeze(-2))
    return ((q * scale).unsqueeze(-2) @ state).squeeze(-2).unsqueeze(1)


def step_(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor, scale: float) -> Tensor:
    """One token, the state [B, H, K, V] in place."""
    q, k, v = (x.squeeze(1).float() for x in (q, k, v))
    state.mul_(g.squeeze(1).exp()[..., None, None])
    new = beta.squeeze(1)[..., None] * (v - (k.unsqueeze(-2) @ state).squeeze(-2))
    state.addcmul_(k.unsqueeze(-1), new.unsqueeze(-2))
    return ((q * scale).unsqueeze(-2) @ state).squeeze(-2).unsqueeze(1)
