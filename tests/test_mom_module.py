"""The Mixture-of-Memories layer: against its formula, packed, masked, in decoding, and causality."""

import math

import pytest
import torch
from torch.nn import functional as F

from remora.modules import Cache, MixtureOfMemories

D = 24
SMALL = {"hidden_size": D, "head_dim": 8, "num_heads": 2, "expand_v": 2.0, "num_memories": 4, "topk": 2, "layer_idx": 0}
VARIANTS = {
    "base": {},
    "no_shared": {"shared_memory": False},
    "single_kv": {"single_kv_proj": True},
    "top_1": {"topk": 1},
    "all": {"topk": 4},
    "no_gate": {"use_gate": False},
    "bias": {"conv_bias": True},
    "simple_gla": {"mixer": "simple_gla"},
    "simple_gla, one kv": {"mixer": "simple_gla", "single_kv_proj": True, "shared_memory": False},
}
each_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS.keys())


def make(**options):
    layer = MixtureOfMemories(**(SMALL | options))
    with torch.no_grad():
        layer.router.weight.normal_()
    return layer


def split(layer, weight):
    """k, v, a and, with a write strength, b of one memory's stacked projection."""
    return weight.split(layer.projected_sizes)


def convolve(x, conv):
    width = conv.kernel_size
    padded = F.pad(x, (0, 0, width - 1, 0))
    y = sum(padded[j : j + x.shape[0]] * conv.weight[:, 0, j] for j in range(width))
    return F.silu(y if conv.bias is None else y + conv.bias)


def read_one(layer, x, weight):
    """One memory over the tokens `x` `[L, D]` that reach it, as the docstring writes it: reads `[L, H, V]`."""
    H, K, V = layer.num_heads, layer.head_k_dim, layer.head_v_dim
    parts = split(layer, weight)
    q = convolve(x @ layer.q_proj.weight.mT, layer.q_conv1d).view(-1, H, K)
    k = convolve(x @ parts[0].mT, layer.k_conv1d).view(-1, H, K)
    v = convolve(x @ parts[1].mT, layer.v_conv1d).view(-1, H, V)
    if layer.mixer == "gated_delta_rule":
        q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    decay = torch.exp(-layer.A_log.exp() * F.softplus(x @ parts[2].mT + layer.dt_bias))
    state = x.new_zeros(H, K, V)
    reads = []
    for t in range(x.shape[0]):
        state = state * decay[t, :, None, None]
        write = v[t]
        if layer.mixer == "gated_delta_rule":
            beta = torch.sigmoid(x[t] @ parts[3].mT)
            write = beta[:, None] * (v[t] - torch.einsum("hkv,hk->hv", state, k[t]))
        state = state + torch.einsum("hk,hv->hkv", k[t], write)
        reads.append(torch.einsum("hkv,hk->hv", state, q[t]) * K**-0.5)
    return torch.stack(reads) if reads else x.new_zeros(0, H, V)


def reference(layer, x, dropped=()):
    """The whole layer, memory by memory; `dropped` names (sequence, memory, rank) that no memory takes."""
    outputs = []
    for idx, row in enumerate(x):
        logits = row @ layer.router.weight.mT
        chosen = logits.topk(layer.topk, dim=-1)
        weights = chosen.values.softmax(-1)
        o = row.new_zeros(row.shape[0], layer.num_heads, layer.head_v_dim)
        projections = layer.memory_proj.weight
        for memory in range(layer.num_memories):
            tokens, choices = (chosen.indices == memory).nonzero(as_tuple=True)
            keep = [rank for rank in range(len(tokens)) if (idx, memory, rank) not in dropped]
            tokens, choices = tokens[keep], choices[keep]
            reads = read_one(layer, row[tokens], projections[0 if layer.single_kv_proj else memory])
            o = o.index_add(0, tokens, weights[tokens, choices][:, None, None] * reads)
        if layer.shared_memory:
            o = o + read_one(layer, row, projections[-1])
        o = o / (o.square().mean(-1, keepdim=True) + layer.o_norm.eps).sqrt() * layer.o_norm.weight
        if hasattr(layer, "g_proj"):
            o = o * F.silu(row @ layer.g_proj.weight.mT).view(o.shape)
        outputs.append(o.flatten(-2) @ layer.o_proj.weight.mT)
    return torch.stack(outputs)


@each_variant
def test_follows_its_formula(options):
    layer = make(**options)
    x = torch.randn(2, 11, D, requires_grad=True)
    y, expected = layer(x), reference(layer, x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    d_y = torch.randn_like(y)
    leaves = {"x": x, **dict(layer.named_parameters())}
    ours = torch.autograd.grad(y, leaves.values(), d_y)
    theirs = torch.autograd.grad(expected, leaves.values(), d_y)
    for name, a, b in zip(leaves, ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}")


def test_routing_is_reported():
    layer = make()
    x = torch.randn(2, 11, D)
    layer(x)
    logits = x @ layer.router.weight.mT
    hits = torch.bincount(logits.topk(2, dim=-1).indices.flatten(), minlength=4)
    assert torch.equal(layer.routing.hits.long(), hits)
    balance = 4 * (hits / 22 * logits.softmax(-1).mean((0, 1))).sum()
    torch.testing.assert_close(layer.routing.balance_loss, balance)
    torch.testing.assert_close(layer.routing.z_loss, logits.logsumexp(-1).square().mean())
    layer.routing.balance_loss.backward()
    assert layer.router.weight.grad.abs().max() > 0


@each_variant
def test_prefill_and_decode_equal_the_whole(options):
    layer = make(**options)
    x = torch.randn(2, 12, D)
    cache = Cache()
    with torch.no_grad():
        whole = layer(x)
        outputs = [layer(x[:, :5], cache=cache), layer(x[:, 5:8], cache=cache)]
        outputs += [layer(x[:, t : t + 1], cache=cache) for t in range(8, 12)]
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-5)


def test_decode_works_in_place_and_touches_the_chosen_memories_only():
    layer = make()
    cache = Cache()
    x = torch.randn(2, 4, D)
    with torch.no_grad():
        layer(x[:, :3], cache=cache)
        state = cache.get(0)
        tensors = [*state.conv_states, state.recurrent_state]
        before = [t.clone() for t in tensors]
        layer(x[:, 3:], cache=cache)
    assert cache.get(0) is state
    chosen = (x[:, 3] @ layer.router.weight.mT).topk(2, dim=-1).indices
    for old, tensor, now in zip(before, tensors, [*state.conv_states, state.recurrent_state]):
        assert now is tensor
        changed = (old != tensor).flatten(2).any(-1)
        assert changed[:, -1].all()
        assert torch.equal(changed[:, :4], torch.zeros(2, 4, dtype=torch.bool).scatter(1, chosen, True))


def test_packed_sequences_equal_separate_ones():
    layer = make()
    lengths = [5, 0, 1, 6, 0]
    x, more = torch.randn(1, 12, D), torch.randn(5, 1, D)
    cache = Cache()
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    with torch.no_grad():
        y = layer(x, cache=cache, cu_seqlens=bounds)
        decoded = layer(more, cache=cache)
        for idx, piece in enumerate(x.split(lengths, dim=1)):
            alone = layer(torch.cat([piece, more[idx : idx + 1]], dim=1))
            together = torch.cat([y.split(lengths, dim=1)[idx], decoded[idx : idx + 1]], dim=1)
            torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_reaches_nothing(side):
    layer = make()
    x = torch.randn(2, 9, D)
    mask = torch.ones(2, 9, dtype=torch.int64)
    tokens = slice(3, 9) if side == "left" else slice(0, 6)
    mask[1] = 0
    mask[1, tokens] = 1
    with torch.no_grad():
        cache = Cache()
        y = layer(x, cache=cache, attention_mask=mask)
        hits = layer.routing.hits.sum()
        torch.testing.assert_close(y[0], layer(x[:1])[0], rtol=1e-4, atol=1e-5)
        alone = Cache()
        torch.testing.assert_close(y[1:, tokens], layer(x[1:, tokens], cache=alone), rtol=1e-4, atol=1e-5)
        assert hits == 15 * layer.topk
        more = torch.randn(2, 1, D)
        torch.testing.assert_close(layer(more, cache=cache)[1:], layer(more[1:], cache=alone), rtol=1e-4, atol=1e-5)
        x[1, mask[1] == 0] = 7.0
        torch.testing.assert_close(layer(x, attention_mask=mask)[1, tokens], y[1, tokens])


def test_later_tokens_and_other_sequences_do_not_matter():
    layer = make()
    x = torch.randn(3, 10, D)
    with torch.no_grad():
        y = layer(x)
        other = x.clone()
        other[:, 6:] = torch.randn(3, 4, D)
        torch.testing.assert_close(layer(other)[:, :6], y[:, :6], rtol=1e-5, atol=1e-6)
        other = torch.randn(3, 10, D)
        other[1] = x[1]
        torch.testing.assert_close(layer(other)[1], y[1], rtol=1e-5, atol=1e-6)


def test_the_released_convolution_leaks_in_training_only():
    layer, leaky = make(), make(conv_across_segments=True)
    leaky.load_state_dict(layer.state_dict())
    x = torch.randn(2, 10, D)
    with torch.no_grad():
        expected = layer(x)
        assert not torch.allclose(leaky(x), expected, atol=1e-3)
        # What the window does: one pass over the tokens of memory 0 of all sequences, then of memory 1, and so on.
        chosen = (x.flatten(0, 1) @ layer.router.weight.mT).topk(2, dim=-1).indices
        memory_major = [2 * 10 * j + t for m in range(4) for t in range(20) for j in range(2) if chosen[t, j] == m]
        rows, bounds = leaky._released_segments(chosen.view(2, 10, 2).int(), None, None)
        assert rows[:40].tolist() == memory_major
        assert bounds.tolist() == [0, 40, 50, 60]
        torch.testing.assert_close(leaky.eval()(x), expected)


@pytest.mark.parametrize("drop", ["newest", "oldest"])
def test_capacity_keeps_so_many_tokens_of_each_memory(drop):
    layer = make(capacity=3, drop=drop)
    x = torch.randn(2, 12, D)
    chosen = (x @ layer.router.weight.mT).topk(2, dim=-1).indices
    lengths = [torch.bincount(row.flatten(), minlength=4).tolist() for row in chosen]
    dropped = {
        (n, m, rank)
        for n in range(2)
        for m in range(4)
        for rank in (range(3, 12) if drop == "newest" else range(lengths[n][m] - 3))
    }
    torch.testing.assert_close(layer(x), reference(layer, x, dropped), rtol=1e-4, atol=1e-5)
    layer.capacity = 12
    torch.testing.assert_close(layer(x), reference(layer, x), rtol=1e-4, atol=1e-5)


def test_gradients_are_the_same_in_every_run():
    layer = make()
    x = torch.randn(4, 40, D, requires_grad=True)
    leaves = [x, *layer.parameters()]
    first, second = (torch.autograd.grad(layer(x).square().sum(), leaves) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_decode_step_launches_few_operators():
    layer = make()
    cache = Cache()
    calls = []

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "remora":
                calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with torch.no_grad():
        layer(torch.randn(2, 3, D), cache=cache)
        with Count():
            layer(torch.randn(2, 1, D), cache=cache)
    assert 1 <= len(calls) <= 4, calls


@pytest.mark.sim_only
@pytest.mark.parametrize("num_memories", [2, 7])
def test_a_decode_step_is_four_launches(num_memories):
    """Router, convolutions of q, k and v together, recurrence, weighted sum."""
    from remora.testing import sim

    layer = make(num_memories=num_memories)
    cache = Cache()
    with torch.no_grad():
        layer(torch.randn(2, 3, D), cache=cache)
        sim.reset_stats()
        layer(torch.randn(2, 1, D), cache=cache)
    assert sum(kernel["launches"] for kernel in sim.stats().values()) == 4


@pytest.mark.sim_only
@pytest.mark.parametrize("mixer", ["gated_delta_rule", "simple_gla"])
def test_launches_of_the_layer_do_not_depend_on_the_number_of_memories(mixer):
    from remora.testing import sim

    counts = []
    for num_memories in (2, 7):
        layer = make(num_memories=num_memories, mixer=mixer)
        x = torch.randn(2, 20, D, requires_grad=True)
        sim.reset_stats()
        y = layer(x).square().sum() + layer.routing.balance_loss + layer.routing.z_loss
        forward = sum(kernel["launches"] for kernel in sim.stats().values())
        sim.reset_stats()
        torch.autograd.grad(y, [x, *layer.parameters()])
        counts.append((forward, sum(kernel["launches"] for kernel in sim.stats().values())))
    assert counts[0] == counts[1]


def test_under_autocast():
    layer = make()
    x = torch.randn(2, 6, D)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert y.isfinite().all()


def test_compiles_to_one_graph():
    layer = make()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, 9, D, requires_grad=True)
    y, expected = compiled(x), layer(x)
    torch.testing.assert_close(y, expected)
    d_y = torch.randn_like(y)
    leaves = [x, *layer.parameters()]
    torch.testing.assert_close(torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(expected, leaves, d_y))


def test_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match=r"topk must be in 1 \.\.\. num_memories=4, got 5"):
        make(topk=5)
    with pytest.raises(ValueError, match="must be positive, got 0, 8, 2 and 4"):
        make(hidden_size=0)
    with pytest.raises(ValueError, match="must be a positive integer, got 8"):
        make(expand_v=1.3)
    with pytest.raises(ValueError, match="mixer must be one of"):
        make(mixer="attention")
    with pytest.raises(ValueError, match="capacity must be positive or None, got 0"):
        make(capacity=0)
    with pytest.raises(ValueError, match="drop must be one of"):
        make(drop="some")
    with pytest.raises(ValueError, match=r"hidden_states must be \[B, T, 24\], got \[3, 24\]"):
        make()(torch.randn(3, D))
    with pytest.raises(ValueError, match=r"attention_mask must be \[2, 3\], got \[2, 4\]"):
        make()(torch.randn(2, 3, D), attention_mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="needs a layer_idx"):
        make(layer_idx=None)(torch.randn(1, 3, D), cache=Cache())


def test_decay_starts_in_its_range():
    layer = MixtureOfMemories(D, head_dim=1, num_heads=2000)
    rate = layer.A_log.detach().exp()
    assert 0 < rate.min() < 0.1
    assert 15.9 < rate.max() <= 16 + 1e-4
    assert F.softplus(layer.dt_bias.detach()).log().mean() == pytest.approx(math.log(0.01), abs=0.15)
