"""Segment-compressed attention, windows, Mamba, and SCOUT made of them: against plain torch, packed against separate
sequences, piece by piece against all at once.
"""

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from remora.models import (
    SCOUT_MAMBA_1_59B,
    SCOUT_MAMBA_430M,
    SCOUT_SWA_1_57B,
    SCOUT_SWA_470M,
    SCOUT_TINY,
    LanguageModel,
)
from remora.modules import (
    Cache,
    GatedDeltaNet,
    KeyValueCache,
    Mamba,
    SegmentCompressedAttention,
    SlidingWindowAttention,
)
from remora.modules.rotary import rotate, token_positions
from remora.train import TrainConfig, Trainer

D = 32
COMPRESSIONS = ("last", "mean", "max", "softmax")
compressions = pytest.mark.parametrize("compress", COMPRESSIONS)


def scout_attention(compress="last", **options):
    layer = SegmentCompressedAttention(
        D, 4, **{"num_kv_heads": 2, "stride": 4, "layer_idx": 0} | options, compress=compress
    )
    if compress == "softmax":
        torch.nn.init.normal_(layer.slot_bias)
    return layer


def window_attention(window=5, **options):
    return SlidingWindowAttention(D, 4, **{"num_kv_heads": 2, "window": window, "layer_idx": 0} | options)


def mamba(**options):
    return Mamba(D, **{"dt_rank": 4, "state_size": 5, "layer_idx": 0} | options)


def projected(layer, x):
    """q, k, v [B, H, T, D] of the formulas; grouped heads repeated."""
    positions = torch.arange(x.shape[1])
    heads = (-1, layer.head_dim)
    q = rotate(layer.q_proj(x).unflatten(-1, heads), positions, layer.rope_theta)
    k = rotate(layer.k_proj(x).unflatten(-1, heads), positions, layer.rope_theta)
    v = layer.v_proj(x).unflatten(-1, heads)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def repeated(x, layer):
    return x.repeat_interleave(layer.num_heads // layer.num_kv_heads, 1)


def compressed(layer, x, tokens):
    """The definition of a compressed key or value, [B, Hk, T, D] to [B, Hk, S, D]."""
    segments = x.shape[2] // layer.stride
    parts = x[:, :, : segments * layer.stride].unflatten(2, (segments, layer.stride))
    if layer.compress == "last":
        return parts[:, :, :, -1]
    if layer.compress == "mean":
        return parts.mean(3)
    if layer.compress == "max":
        return parts.amax(3)
    gate = layer.gate_proj(tokens).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    gate = gate[:, :, : segments * layer.stride].unflatten(2, (segments, layer.stride))
    weights = (gate + layer.slot_bias.transpose(0, 1)[None, :, None]).softmax(3)
    return (weights * parts).sum(3)


@compressions
@pytest.mark.parametrize("length", [3, 16, 23])
def test_segment_attention_is_masked_attention(compress, length):
    layer = scout_attention(compress)
    x = torch.randn(2, length, D, requires_grad=True)
    y = layer(x)
    q, k, v = projected(layer, x)
    keys = repeated(torch.cat([compressed(layer, k, x), k], 2), layer)
    values = repeated(torch.cat([compressed(layer, v, x), v], 2), layer)
    segments = length // layer.stride
    tokens = torch.arange(length)
    visible = torch.cat([torch.arange(segments) < tokens[:, None] // layer.stride, torch.eye(length).bool()], 1)
    o = F.scaled_dot_product_attention(q, keys, values, attn_mask=visible)
    expected = layer.o_proj(o.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    ours = torch.autograd.grad(y, [x, *layer.parameters()], dy, allow_unused=True)
    theirs = torch.autograd.grad(expected, [x, *layer.parameters()], dy, allow_unused=True)
    for have, want in zip(ours, theirs, strict=True):
        if have is None or want is None:  # without a whole segment nothing reads the gate
            assert not any(g is not None and g.any() for g in (have, want))
        else:
            torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("window", [1, 5, None])
def test_window_attention_is_banded_attention(window):
    layer = window_attention(window)
    x = torch.randn(2, 19, D, requires_grad=True)
    y = layer(x)
    q, k, v = projected(layer, x)
    gaps = torch.arange(19)[:, None] - torch.arange(19)
    visible = (gaps >= 0) & (gaps < (window or 19))
    o = F.scaled_dot_product_attention(q, repeated(k, layer), repeated(v, layer), attn_mask=visible)
    expected = layer.o_proj(o.transpose(1, 2).flatten(-2))
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    dy = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad(z, [x, *layer.parameters()], dy) for z in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_mamba_is_its_recurrence():
    layer = mamba()
    x = torch.randn(2, 9, D)
    u, z = layer.in_proj(x).chunk(2, -1)
    u = layer.conv1d(u)[0]
    step, B, C = layer.x_proj(u).split([4, 5, 5], -1)
    dt, A = F.softplus(layer.dt_proj(step)), -layer.A_log.exp()
    h = torch.zeros(2, 2 * D, 5)
    outputs = []
    for t in range(9):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        outputs.append(((h * C[:, t, None]).sum(-1) + layer.D * u[:, t]) * F.silu(z[:, t]))
    torch.testing.assert_close(layer(x), layer.out_proj(torch.stack(outputs, 1)), rtol=1e-4, atol=1e-5)
    step = F.softplus(Mamba(64).dt_proj.bias)
    assert 1e-3 * 0.99 < step.min() < step.max() < 1e-1 * 1.01


def test_rotation_depends_on_differences_of_positions():
    q, k = torch.randn(2, 1, 6, 1, 16, dtype=torch.float64)
    near, far = (rotate(q, p, 1e4) @ rotate(k, p, 1e4).mT for p in (torch.arange(6), torch.arange(100, 106)))
    torch.testing.assert_close(near, far)
    assert torch.equal(rotate(q[:, :1], torch.zeros(1), 1e4), q[:, :1])
    assert token_positions(7, 0, torch.tensor([0, 3, 3, 7]), q.device).tolist() == [0, 1, 2, 0, 1, 2, 3]


LAYERS = {
    **{f"segments, {compress}": (lambda c=compress: scout_attention(c)) for compress in COMPRESSIONS},
    "window": window_attention,
    "full attention": lambda: window_attention(None),
    "mamba": mamba,
}
layers = pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())


@layers
def test_packed_sequences_equal_separate_ones(make):
    layer = make()
    lengths = [9, 0, 3, 13]
    x = torch.randn(1, sum(lengths), D)
    packed = layer(x, cu_seqlens=torch.tensor([0, *lengths]).cumsum(0))
    alone = torch.cat([layer(piece) for piece in x.split(lengths, 1) if piece.shape[1]], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)


@layers
@pytest.mark.parametrize("lengths", [[1] * 21, [6, 1, 1, 9, 1, 3], [4, 4, 13]], ids=str)
def test_piece_by_piece_equals_all_at_once(make, lengths):
    """Prefill, prefill that continues a cache, and decode steps."""
    layer, cache = make(), Cache()
    x = torch.randn(2, sum(lengths), D)
    with torch.no_grad():
        outputs = [layer(piece, cache=cache) for piece in x.split(lengths, 1)]
        torch.testing.assert_close(torch.cat(outputs, 1), layer(x), rtol=1e-4, atol=1e-5)


@compressions
def test_the_cache_keeps_checkpoints_only(compress):
    layer, cache = scout_attention(compress), Cache()
    with torch.no_grad():
        layer(torch.randn(2, 23, D), cache=cache)
    state = cache.get(0, KeyValueCache)
    assert state.keys.shape == state.values.shape == (2, 5, 2, 8)
    assert [x.shape[1] for x in state.segment] == [3] * {"last": 0, "softmax": 3}.get(compress, 2)
    assert cache.num_bytes == sum(t.untyped_storage().nbytes() for t in state.tensors)
    window = window_attention()
    narrow = Cache()
    with torch.no_grad():
        for piece in torch.randn(2, 23, D).split([20, 1, 1, 1], 1):
            window(piece, cache=narrow)
    assert narrow.get(0, KeyValueCache).keys.shape == (2, 4, 2, 8)


def test_later_tokens_do_not_reach_earlier_ones():
    for make in LAYERS.values():
        layer = make()
        x = torch.randn(2, 21, D)
        with torch.no_grad():
            y = layer(x)
            x[:, 13:] = math.nan
            assert torch.equal(layer(x)[:, :13], y[:, :13])


def test_layers_refuse_what_does_not_fit():
    x = torch.randn(2, 8, D)
    with pytest.raises(ValueError, match=r"hidden_states must be \[B, T, 32\]"):
        scout_attention()(x[..., :5])
    with pytest.raises(ValueError, match="needs a layer_idx, got None"):
        scout_attention(layer_idx=None)(x, cache=Cache())
    with pytest.raises(ValueError, match="cu_seqlens and cache exclude each other"):
        window_attention()(x[:1], cache=Cache(), cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads=3, got 4"):
        scout_attention(num_kv_heads=3)
    with pytest.raises(ValueError, match="compress must be one of"):
        scout_attention("median")
    with pytest.raises(ValueError, match="stride must be positive, got 0"):
        scout_attention(stride=0)
    with pytest.raises(ValueError, match="head_dim must be even"):
        scout_attention(head_dim=3)
    with pytest.raises(ValueError, match="window must be positive or None, got 0"):
        window_attention(0)
    with pytest.raises(ValueError, match="dt_rank must be positive"):
        mamba(dt_rank=0)
    cache = Cache()
    layer = GatedDeltaNet(D, head_dim=8, num_heads=2, expand_v=1.0, layer_idx=0)
    layer(x, cache=cache)
    with pytest.raises(TypeError, match="the state of layer 0 must be a KeyValueCache, got a LayerCache"):
        scout_attention()(x, cache=cache)


class TestScout:
    def test_sizes_of_the_paper(self):
        """By the sums of their matrices; the released configurations are called 470m, 430m, 1.57b and 1.59b."""
        for config, millions in (
            (SCOUT_SWA_470M, 470), (SCOUT_MAMBA_430M, 431), (SCOUT_SWA_1_57B, 1570), (SCOUT_MAMBA_1_59B, 1593),
        ):  # fmt: skip
            D, inner = config.hidden_size, config.intermediate_size
            mixer = 4 * D * D
            if config.mixer == "mamba":
                E, N, rank = 2 * D, 16, 128
                mixer = 2 * D * E + (4 + 1) * E + E * (rank + 2 * N) + (rank + 1) * E + E * N + E + E * D
            block = mixer + 4 * D * D + 2 * 3 * D * inner + 4 * D
            expected = config.num_layers * block + D + 32000 * D * (1 if config.tie_embeddings else 2)
            with torch.device("meta"):
                assert LanguageModel(config).num_parameters == expected
            assert round(expected / 1e6) == millions

    @pytest.mark.parametrize("mixer", ["sliding_window_attention", "mamba", "gated_delta_net"])
    def test_any_mixer_decodes_as_it_reads(self, mixer):
        options = {"mamba": {"dt_rank": 4}, "gated_delta_net": {"num_heads": 2, "head_dim": 8, "expand_v": 1.0}}
        config = dataclasses.replace(
            SCOUT_TINY, mixer=mixer, mixer_options=options.get(mixer, SCOUT_TINY.mixer_options), initializer_range=0.2
        )
        model = LanguageModel(config)
        tokens, cache = torch.randint(256, (2, 23)), Cache()
        with torch.no_grad():
            whole = model(tokens).logits
            outputs = [model(piece, cache=cache).logits for piece in tokens.split([10, 6, *[1] * 7], 1)]
        assert len(cache) == 4
        torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-3, atol=1e-4)
        loss = model(tokens, tokens).loss
        loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())

    def test_packed_sequences_equal_separate_ones(self):
        model = LanguageModel(dataclasses.replace(SCOUT_TINY, initializer_range=0.2))
        row = torch.randint(256, (1, 20))
        with torch.no_grad():
            packed = model(row, cu_seqlens=torch.tensor([0, 9, 9, 20])).logits
            alone = torch.cat([model(row[:, :9]).logits, model(row[:, 9:]).logits], 1)
        torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-4)

    def test_saved_and_loaded_models_agree_bitwise(self, tmp_path):
        model = LanguageModel(
            dataclasses.replace(SCOUT_TINY, segment_attention={"num_heads": 2, "compress": "softmax"})
        )
        model.save_pretrained(tmp_path)
        loaded = LanguageModel.from_pretrained(tmp_path)
        tokens = torch.randint(256, (1, 30))
        with torch.no_grad():
            assert torch.equal(loaded(tokens).logits, model(tokens).logits)

    @pytest.mark.cpu_only
    def test_training(self, tmp_path):
        (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 400)
        config = TrainConfig(
            data=str(tmp_path / "text.txt"), mixer="sliding_window_attention", segment_stride=4, window=8,
            hidden_size=32, num_layers=1, num_heads=2, head_dim=16, intermediate_size=48, steps=25, batch_size=2,
            seq_len=48, eval_every=0, eval_bytes=256, warmup_steps=5, device="cpu",
        )  # fmt: skip
        trainer = Trainer(config, tmp_path / "run")
        assert not trainer.run()
        bits = [entry["train_bits_per_byte"] for entry in trainer.log if "train_bits_per_byte" in entry]
        assert bits[-1] < 0.6 * bits[0]
        loaded = LanguageModel.from_pretrained(tmp_path / "run")
        assert loaded.config.segment_attention == {"num_heads": 2, "head_dim": 16, "stride": 4, "compress": "last"}
        assert loaded.generate(torch.tensor([[116, 104]]), 12, temperature=0).shape == (1, 14)
