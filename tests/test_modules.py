"""Layers: against their formulas, packed against separate sequences, token by token against all at once."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from remora.modules import (
    Cache,
    GatedDeltaNet,
    GatedRMSNorm,
    GroupedLinear,
    RMSNorm,
    ShortConvolution,
    SwiGLU,
    grouped_linear,
)

D = 24
SMALL = {"hidden_size": D, "head_dim": 8, "num_heads": 2, "expand_v": 2.0, "layer_idx": 0}


def pieces(x, lengths):
    return list(x.split(lengths, dim=1))


def offsets(lengths, dtype=torch.int64):
    return torch.tensor([0, *lengths], dtype=dtype).cumsum(0).to(dtype)


class TestShortConvolution:
    @pytest.mark.parametrize("bias", [False, True], ids=["no_bias", "bias"])
    @pytest.mark.parametrize("kernel_size", [1, 2, 4])
    def test_is_a_causal_depthwise_convolution(self, kernel_size, bias):
        layer = ShortConvolution(D, kernel_size, bias)
        conv = nn.Conv1d(D, D, kernel_size, groups=D, bias=bias)
        conv.load_state_dict(layer.state_dict())
        x = torch.randn(2, 9, D, requires_grad=True)
        expected = F.silu(conv(F.pad(x.mT, (kernel_size - 1, 0))).mT)
        y, final_state = layer(x)
        assert final_state is None
        torch.testing.assert_close(y, expected)
        d_y = torch.randn_like(y)
        ours = torch.autograd.grad(y, [x, *layer.parameters()], d_y)
        theirs = torch.autograd.grad(expected, [x, *conv.parameters()], d_y)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)

    def test_without_activation(self):
        layer = ShortConvolution(D, 1, activation=None)
        x = torch.randn(1, 3, D)
        assert torch.equal(layer(x)[0], x * layer.weight[:, 0, 0])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
    @pytest.mark.parametrize("lengths", [[5, 0, 1, 2, 7, 0, 0], [3], [0, 0, 4]], ids=["many", "one", "empty_first"])
    @pytest.mark.parametrize("kernel_size", [1, 3, 4])
    def test_packed_sequences_equal_separate_ones(self, kernel_size, lengths, dtype):
        layer = ShortConvolution(D, kernel_size)
        x = torch.randn(1, sum(lengths), D, dtype=dtype)
        state = torch.randn(len(lengths), kernel_size - 1, D, dtype=dtype)
        y, final_state = layer(x, state, True, offsets(lengths, torch.int32))
        for idx, piece in enumerate(pieces(x, lengths)):
            expected, expected_state = layer(piece, state[idx : idx + 1], True)
            torch.testing.assert_close(pieces(y, lengths)[idx], expected)
            assert torch.equal(final_state[idx : idx + 1], expected_state)

    def test_the_window_does_not_cross_a_boundary(self):
        layer = ShortConvolution(D)
        x = torch.randn(1, 8, D)
        cu_seqlens = torch.tensor([0, 4, 8])
        y = layer(x, cu_seqlens=cu_seqlens)[0]
        poisoned = x.clone()
        poisoned[:, :4] = math.nan
        assert torch.equal(layer(poisoned, cu_seqlens=cu_seqlens)[0][:, 4:], y[:, 4:])
        x.requires_grad_()
        (d_x,) = torch.autograd.grad(layer(x, cu_seqlens=cu_seqlens)[0][:, 4:].sum(), x)
        assert torch.equal(d_x[:, :4], torch.zeros(1, 4, D))
        assert d_x[:, 4:].abs().min() > 0

    def test_later_tokens_do_not_reach_earlier_ones(self):
        layer = ShortConvolution(D)
        x = torch.randn(2, 8, D)
        y = layer(x)[0]
        x[:, 5:] = math.nan
        assert torch.equal(layer(x)[0][:, :5], y[:, :5])

    @pytest.mark.parametrize("step", [1, 2, 5])
    def test_piece_by_piece_equals_all_at_once(self, step):
        layer = ShortConvolution(D)
        x = torch.randn(2, 11, D)
        whole, whole_state = layer(x, output_final_state=True)
        outputs, state = [], None
        for piece in x.split(step, dim=1):
            y, state = layer(piece, state, output_final_state=True)
            outputs.append(y)
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole)
        assert torch.equal(state, whole_state)

    def test_refuses_what_does_not_fit(self):
        layer = ShortConvolution(D)
        with pytest.raises(ValueError, match=r"x must be \[B, T, 24\], got \[2, 3, 5\]"):
            layer(torch.randn(2, 3, 5))
        with pytest.raises(ValueError, match="batch size of x must be 1, got 2"):
            layer(torch.randn(2, 3, D), cu_seqlens=torch.tensor([0, 3]))
        with pytest.raises(ValueError, match=r"conv_state must be \[2, 3, 24\], got \[1, 3, 24\]"):
            layer(torch.randn(2, 3, D), torch.zeros(1, 3, D))
        with pytest.raises(ValueError, match=r"kernel_size must be in 1\.\.\.8, got 0"):
            ShortConvolution(4, 0)
        with pytest.raises(ValueError, match="activation must be one of"):
            ShortConvolution(4, activation="relu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_rms_norms(dtype):
    x, gate = torch.randn(2, 5, D).to(dtype), torch.randn(2, 5, D).to(dtype)
    plain, gated = RMSNorm(D, eps=1e-3), GatedRMSNorm(D, eps=1e-3)
    with torch.no_grad():
        plain.weight.normal_()
        gated.weight.normal_()
    normalised = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt()
    z = gate.double()
    for y, expected in (
        (plain(x), normalised * plain.weight.double()),
        (gated(x, gate), normalised * gated.weight.double() * z * torch.sigmoid(z)),
    ):
        assert y.dtype == dtype
        torch.testing.assert_close(y, expected.to(dtype))


def test_swiglu():
    layer = SwiGLU(D, 40)
    x = torch.randn(2, 3, D)
    gate, up = x @ layer.gate_proj.weight.mT, x @ layer.up_proj.weight.mT
    torch.testing.assert_close(layer(x), (gate * torch.sigmoid(gate) * up) @ layer.down_proj.weight.mT)
    assert SwiGLU(768).up_proj.out_features == 2048
    assert SwiGLU(100).up_proj.out_features == 512
    with pytest.raises(ValueError, match="must be positive, got 4 and 0"):
        SwiGLU(4, 0)


class TestGroupedLinear:
    ORDER = torch.tensor([4, 2, 9, 11, 6, 5, 7, 8, 10, 0, 1, 3])  # three choices of four rows
    ENDS = torch.tensor([2, 2, 5, 9, 11], dtype=torch.int32)  # the last choice is of no group

    @pytest.fixture(params=["by group", "grouped product"])
    def path(self, request, monkeypatch):
        """Both ways, the one of CUDA on the CPU."""
        if request.param == "grouped product":
            monkeypatch.setattr(grouped_linear, "_takes_grouped_product", lambda x: x.dtype != torch.float64)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("sizes", [(24, [32, 8]), (5, [3, 4])], ids=str)
    @pytest.mark.parametrize("whole", [False, True], ids=["", "a group of all rows"])
    def test_is_one_linear_map_per_choice(self, path, dtype, sizes, whole):
        order, ends = self.ORDER, self.ENDS
        if whole:
            order, ends = torch.tensor([2, 1, 4, 5, 6, 7, 0, 3]), torch.tensor([0, 2, 6, 6, 8], dtype=torch.int32)
        layer = GroupedLinear(5, sizes[0], sum(sizes[1])).to(dtype)
        x = torch.randn(4, sizes[0], dtype=dtype, requires_grad=True)
        y = torch.cat(layer(x, order.int(), order.argsort().int(), ends, sizes[1]), dim=-1).unflatten(0, (-1, 4))
        group = torch.searchsorted(ends.long(), torch.arange(len(order)), right=True)[order.argsort()].view(-1, 4)
        is_chosen = (group < 5)[..., None]
        every = torch.einsum("gof,rf->gro", layer.weight, x)
        expected = every[group.clamp(max=4), torch.arange(4)]
        tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {}
        y, expected = y.masked_fill(~is_chosen, 0), expected.masked_fill(~is_chosen, 0)
        torch.testing.assert_close(y, expected, **tolerance)
        d_y = torch.randn_like(y)
        leaves = [x, layer.weight]
        ours = torch.autograd.grad(y, leaves, d_y)
        torch.testing.assert_close(ours, torch.autograd.grad(expected, leaves, d_y), **tolerance)
        empty = 1 if not whole else 0
        assert torch.equal(ours[1][empty], torch.zeros_like(ours[1][empty]))

    def test_compiles_to_one_graph(self):
        layer = GroupedLinear(5, 8, 16)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(4, 8, requires_grad=True)
        call = (x, self.ORDER.int(), self.ORDER.argsort().int(), self.ENDS, [10, 6])
        y, expected = (torch.cat(f(*call), dim=-1) for f in (compiled, layer))
        torch.testing.assert_close(y, expected)
        leaves = [x, layer.weight]
        ours, theirs = (torch.autograd.grad(z, leaves, torch.ones_like(z)) for z in (y, expected))
        torch.testing.assert_close(ours, theirs)


def reference(layer, x):
    """The layer as its docstring writes it, token by token."""

    def convolve(x, conv):
        width = conv.kernel_size
        padded = F.pad(x, (0, 0, width - 1, 0))
        return F.silu(sum(padded[:, j : j + x.shape[1]] * conv.weight[:, 0, j] for j in range(width)))

    B, T, _ = x.shape
    H, HV, K, V = layer.num_heads, layer.num_v_heads, layer.head_k_dim, layer.head_v_dim
    q = convolve(x @ layer.q_proj.weight.mT, layer.q_conv1d).view(B, T, H, K).repeat_interleave(HV // H, dim=2)
    k = convolve(x @ layer.k_proj.weight.mT, layer.k_conv1d).view(B, T, H, K).repeat_interleave(HV // H, dim=2)
    v = convolve(x @ layer.v_proj.weight.mT, layer.v_conv1d).view(B, T, HV, V)
    q, k = (y / (y.square().sum(-1, keepdim=True) + 1e-6).sqrt() for y in (q, k))
    beta = torch.sigmoid(x @ layer.b_proj.weight.mT) * (2 if layer.allow_neg_eigval else 1)
    decay = torch.exp(-layer.A_log.exp() * F.softplus(x @ layer.a_proj.weight.mT + layer.dt_bias))
    state = x.new_zeros(B, HV, K, V)
    outputs = []
    for t in range(T):
        state = state * decay[:, t, :, None, None]
        error = v[:, t] - torch.einsum("bhkv,bhk->bhv", state, k[:, t])
        state = state + torch.einsum("bhk,bhv->bhkv", k[:, t], beta[:, t, :, None] * error)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]) * K**-0.5)
    o = torch.stack(outputs, dim=1)
    o = o / (o.square().mean(-1, keepdim=True) + layer.o_norm.eps).sqrt() * layer.o_norm.weight
    if layer.use_gate:
        o = o * F.silu(x @ layer.g_proj.weight.mT).view(B, T, HV, V)
    return o.flatten(-2) @ layer.o_proj.weight.mT


class TestGatedDeltaNet:
    @pytest.mark.parametrize(
        "options",
        [{}, {"num_v_heads": 4}, {"allow_neg_eigval": True}, {"use_gate": False}, {"mode": "fused_recurrent"}],
        ids=["base", "grouped_values", "negative_eigenvalues", "no_output_gate", "recurrent"],
    )
    def test_follows_its_formula(self, options):
        layer = GatedDeltaNet(**SMALL, **options)
        x = torch.randn(2, 7, D, requires_grad=True)
        y, expected = layer(x), reference(layer, x)
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
        d_y = torch.randn_like(y)
        leaves = {"x": x, **dict(layer.named_parameters())}
        ours = torch.autograd.grad(y, leaves.values(), d_y)
        theirs = torch.autograd.grad(expected, leaves.values(), d_y)
        for name, a, b in zip(leaves, ours, theirs):
            torch.testing.assert_close(
                a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item(), msg=lambda m, n=name: f"{n}: {m}"
            )

    def test_without_short_convolution(self):
        layer = GatedDeltaNet(**SMALL, use_short_conv=False)
        identity = GatedDeltaNet(**SMALL, conv_size=1)
        weights = layer.state_dict() | {f"{n}_conv1d.weight": torch.ones(s, 1, 1) for n, s in zip("qkv", (16, 16, 32))}
        identity.load_state_dict(weights)
        x = torch.randn(1, 5, D)
        torch.testing.assert_close(layer(x), identity(x))
        cache = Cache()
        layer(x, cache=cache)
        assert cache.get(0).conv_states == ()

    def test_parameter_names_are_those_of_the_field(self):
        layer = GatedDeltaNet(**SMALL, num_v_heads=4)
        shapes = {name: list(p.shape) for name, p in layer.named_parameters()}
        assert shapes == {
            "A_log": [4],
            "dt_bias": [4],
            "q_proj.weight": [16, D],
            "k_proj.weight": [16, D],
            "v_proj.weight": [64, D],
            "a_proj.weight": [4, D],
            "b_proj.weight": [4, D],
            "g_proj.weight": [64, D],
            "q_conv1d.weight": [16, 1, 4],
            "k_conv1d.weight": [16, 1, 4],
            "v_conv1d.weight": [64, 1, 4],
            "o_norm.weight": [16],
            "o_proj.weight": [D, 64],
        }

    def test_gate_starts_in_its_range(self):
        layer = GatedDeltaNet(D, head_dim=1, num_heads=2000, expand_v=1.0)
        rate, step = layer.A_log.detach().exp(), F.softplus(layer.dt_bias.detach())
        assert 0 < rate.min() < 0.1
        assert 15.9 < rate.max() <= 16 + 1e-4
        assert rate.mean() == pytest.approx(8, abs=0.5)
        assert 0.99e-3 < step.min() < 1.1e-3
        assert 0.09 < step.max() <= 0.1001
        assert step.log().mean() == pytest.approx(math.log(0.01), abs=0.15)

    @pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
    def test_prefill_and_decode_equal_the_whole(self, mode):
        layer = GatedDeltaNet(**SMALL, num_v_heads=4, mode=mode)
        x = torch.randn(2, 9, D)
        cache = Cache()
        with torch.no_grad():
            whole = layer(x)
            outputs = [layer(x[:, :4], cache=cache), layer(x[:, 4:6], cache=cache)]
            outputs += [layer(x[:, t : t + 1], cache=cache) for t in range(6, 9)]
        torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-4, atol=1e-5)

    def test_decode_works_in_place(self):
        layer = GatedDeltaNet(**SMALL)
        cache = Cache()
        with torch.no_grad():
            layer(torch.randn(2, 3, D), cache=cache)
            state = cache.get(0)
            tensors = [*state.conv_states, state.recurrent_state]
            before = [t.clone() for t in tensors]
            layer(torch.randn(2, 1, D), cache=cache)
        assert cache.get(0) is state
        for old, tensor, now in zip(before, tensors, [*state.conv_states, state.recurrent_state]):
            assert now is tensor
            assert not torch.equal(old, tensor)
        assert cache.num_bytes == sum(t.nbytes for t in tensors)

    def test_a_step_with_gradients_equals_one_without(self):
        layer = GatedDeltaNet(**SMALL)
        x = torch.randn(2, 4, D)
        outputs = []
        for enabled in (True, False):
            cache = Cache()
            with torch.set_grad_enabled(enabled):
                layer(x[:, :3], cache=cache)
                outputs.append(layer(x[:, 3:], cache=cache))
        assert outputs[0].requires_grad
        torch.testing.assert_close(outputs[0].detach(), outputs[1], rtol=1e-4, atol=1e-5)

    def test_packed_sequences_equal_separate_ones(self):
        layer = GatedDeltaNet(**SMALL)
        lengths = [5, 0, 1, 6, 0]
        x, more = torch.randn(1, 12, D), torch.randn(5, 1, D)
        cache = Cache()
        with torch.no_grad():
            y = layer(x, cache=cache, cu_seqlens=offsets(lengths))
            decoded = layer(more, cache=cache)
            for idx, piece in enumerate(pieces(x, lengths)):
                alone = layer(torch.cat([piece, more[idx : idx + 1]], dim=1))
                together = torch.cat([pieces(y, lengths)[idx], decoded[idx : idx + 1]], dim=1)
                torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)

    def test_compiles_to_one_graph(self):
        layer = GatedDeltaNet(**SMALL)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        x = torch.randn(1, 9, D, requires_grad=True)
        for cu_seqlens in (None, torch.tensor([0, 4, 9])):
            y, expected = compiled(x, cu_seqlens=cu_seqlens), layer(x, cu_seqlens=cu_seqlens)
            torch.testing.assert_close(y, expected)
            d_y = torch.randn_like(y)
            leaves = [x, *layer.parameters()]
            torch.testing.assert_close(torch.autograd.grad(y, leaves, d_y), torch.autograd.grad(expected, leaves, d_y))

    def test_under_autocast(self):
        layer = GatedDeltaNet(**SMALL)
        x = torch.randn(2, 6, D)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        assert y.dtype == torch.bfloat16
        with torch.no_grad():
            expected = layer(x)
        error = (y.float() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert error < 0.02

    def test_refuses_what_does_not_fit(self):
        with pytest.raises(ValueError, match="num_v_heads must be a multiple of num_heads=2, got 3"):
            GatedDeltaNet(**SMALL, num_v_heads=3)
        with pytest.raises(ValueError, match="must be a positive integer, got 8"):
            GatedDeltaNet(**(SMALL | {"expand_v": 1.3}))
        with pytest.raises(ValueError, match="must be positive, got 0, 8, 2 and 2"):
            GatedDeltaNet(**(SMALL | {"hidden_size": 0}))
        with pytest.raises(ValueError, match="mode must be one of"):
            GatedDeltaNet(**SMALL, mode="parallel")
        layer = GatedDeltaNet(**SMALL)
        with pytest.raises(ValueError, match=r"hidden_states must be \[B, T, 24\], got \[3, 24\]"):
            layer(torch.randn(3, D))
        layer = GatedDeltaNet(**(SMALL | {"layer_idx": None}))
        with pytest.raises(ValueError, match="needs a layer_idx"):
            layer(torch.randn(1, 3, D), cache=Cache())
