"""The language model: its loss, its cache, its files and what it generates."""

import dataclasses
import json
import math

import pytest
import torch
from torch import nn

from remora.models import (
    MOM_1_3B,
    MOM_340M,
    MOM_TINY,
    LanguageModel,
    LanguageModelConfig,
    convert_released_mom,
    register_mixer,
    sample,
)
from remora.modules import Cache

MIXER = {"head_dim": 8, "num_heads": 2, "num_v_heads": 4, "expand_v": 1.0}
CONFIG = LanguageModelConfig(
    vocab_size=50, hidden_size=24, num_layers=2, mixer_options=MIXER, intermediate_size=40, initializer_range=0.3
)


@pytest.fixture
def model():
    return LanguageModel(CONFIG)


@pytest.fixture
def tokens():
    return torch.randint(50, (2, 9))


def test_loss_is_the_mean_cross_entropy_of_the_targets_that_count(model, tokens):
    targets = torch.randint(50, (2, 9))
    targets[0, :4] = -100
    logits, loss = model(tokens, targets)
    assert logits.shape == (2, 9, 50)
    log_probability = logits.double().log_softmax(-1)
    expected = -torch.stack([log_probability[b, t, targets[b, t]] for b in range(2) for t in range(9) if b or t > 3])
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-6)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_initial_weights(tokens):
    config = LanguageModelConfig(hidden_size=64, num_layers=8, mixer_options=MIXER)
    model = LanguageModel(config)
    assert model.embeddings.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].mlp.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.layers[3].mlp.down_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.05)
    assert model.layers[3].attn.o_proj.weight.std().item() == pytest.approx(0.02 / 4, rel=0.1)
    with torch.no_grad():
        assert model(tokens, tokens).loss.item() == pytest.approx(math.log(256), rel=0.01)


@pytest.mark.parametrize("mode", ["chunk", "fused_recurrent"])
def test_prefill_and_decode_equal_the_full_forward(tokens, mode):
    model = LanguageModel(dataclasses.replace(CONFIG, mixer_options=MIXER | {"mode": mode}))
    cache = Cache()
    with torch.no_grad():
        whole = model(tokens).logits
        outputs = [model(tokens[:, :5], cache=cache).logits]
        assert len(cache) == 2
        size = cache.num_bytes
        outputs += [model(tokens[:, t : t + 1], cache=cache).logits for t in range(5, 9)]
    assert cache.num_bytes == size
    torch.testing.assert_close(torch.cat(outputs, dim=1), whole, rtol=1e-3, atol=1e-4)


def test_last_token_only(model, tokens):
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, last_token_only=True).logits, model(tokens).logits[:, -1:])


def test_packed_sequences_equal_separate_ones(model):
    row = torch.randint(50, (1, 10))
    cu_seqlens = torch.tensor([0, 4, 4, 5, 10])
    with torch.no_grad():
        packed = model(row, cu_seqlens=cu_seqlens).logits
        alone = torch.cat([model(row[:, a:b]).logits for a, b in ((0, 4), (4, 5), (5, 10))], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_saved_and_loaded_models_agree_bitwise(tmp_path, tokens, tie):
    model = LanguageModel(dataclasses.replace(CONFIG, tie_embeddings=tie))
    assert (model.lm_head is None) == tie
    model.save_pretrained(tmp_path / "model")
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    random_state = torch.get_rng_state()
    loaded = LanguageModel.from_pretrained(tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), random_state)
    assert loaded.config == model.config
    assert all(p.requires_grad for p in loaded.parameters())
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    half = LanguageModel.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half(tokens).logits.dtype == torch.bfloat16


def test_a_failed_save_leaves_the_old_model(tmp_path, model, monkeypatch):
    model.save_pretrained(tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def write_half(weights, path, metadata):
        path.write_bytes(b"half a file")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", write_half)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_config_round_trip_and_errors(tmp_path):
    assert LanguageModelConfig.from_json(CONFIG.to_json()) == CONFIG
    with pytest.raises(ValueError, match="unknown names in the model configuration: width"):
        LanguageModelConfig.from_json(json.dumps({"width": 3}))
    with pytest.raises(ValueError, match=r"mixer must be one of \[.*'gated_delta_net'.*\], got 'attention'"):
        LanguageModelConfig(mixer="attention")
    with pytest.raises(ValueError, match="num_layers must be positive, got 0"):
        LanguageModelConfig(num_layers=0)
    with pytest.raises(FileNotFoundError):
        LanguageModel.from_pretrained(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path, model):
    model.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(dataclasses.replace(CONFIG, num_layers=3).to_json())
    with pytest.raises(RuntimeError, match="Missing key"):
        LanguageModel.from_pretrained(tmp_path)


def test_any_registered_mixer_can_be_used(tokens):
    name = "running_mean_of_this_test"

    class RunningMean(nn.Module):
        def __init__(self, hidden_size, layer_idx, norm_eps, gain):
            super().__init__()
            self.gain = gain

        def forward(self, hidden_states, cache=None, cu_seqlens=None):
            count = torch.arange(1, hidden_states.shape[1] + 1)[:, None]
            return self.gain * hidden_states.cumsum(dim=1) / count

    register_mixer(name)(RunningMean)
    with pytest.raises(ValueError, match="already registered"):
        register_mixer(name)(RunningMean)
    model = LanguageModel(dataclasses.replace(CONFIG, mixer=name, mixer_options={"gain": 0.5}))
    assert model.layers[1].attn.gain == 0.5
    assert model(tokens).logits.shape == (2, 9, 50)


def released_mom(config, single=False, num_memories=4, old=False):
    """Random weights in the layout of the released checkpoints."""
    D, options = config.hidden_size, config.mixer_options
    H, width = options["num_heads"], options["num_heads"] * options["head_dim"]
    sizes = {"k": width, "v": width, "a": H, "b": H}
    shapes = {"embeddings.weight": [config.vocab_size, D], "norm.weight": [D]}
    for layer in range(config.num_layers):
        attn = {"q_proj.weight": [width, D], "gate.weight": [num_memories, D], "g_proj.weight": [width, D]}
        attn |= {"o_proj.weight": [D, width], "o_norm.weight": [options["head_dim"]], "A_log": [H], "dt_bias": [H]}
        attn |= {f"{name}_conv1d.weight": [width, 1, 4] for name in "qkv"} | ({"D": [H]} if old else {})
        attn |= {f"shared_{name}.weight": [size, D] for name, size in sizes.items()}
        if not single:
            pairs = [(name, size, m) for name, size in sizes.items() for m in range(num_memories)]
            attn |= {f"{name}_proj.{m}.weight": [size, D] for name, size, m in pairs}
        shapes |= {f"layers.{layer}.attn.{name}": shape for name, shape in attn.items()}
        shapes |= {f"layers.{layer}.{name}_norm.weight": [D] for name in ("attn", "mlp")}
        inner = config.intermediate_size
        mlp = {"gate_proj": [inner, D], "up_proj": [inner, D], "down_proj": [D, inner]}
        shapes |= {f"layers.{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
    weights = {f"model.{name}": torch.randn(shape) * 0.1 for name, shape in shapes.items()}
    if not config.tie_embeddings:
        weights["lm_head.weight"] = torch.randn(config.vocab_size, D)
    return weights


class TestMixtureOfMemories:
    def test_sizes_of_the_paper(self):
        """The released models count 0.5 and 1.62 thousand million parameters."""
        for config, expected in ((MOM_340M, 512_351_424), (MOM_1_3B, 1_618_419_904)):
            with torch.device("meta"):
                model = LanguageModel(config)
                assert model.num_parameters == expected
                released = released_mom(config)
                assert sum(tensor.numel() for tensor in released.values()) == expected
                model.load_state_dict(convert_released_mom(released), assign=True)

    @pytest.mark.parametrize("old", [False, True], ids=["current", "with_unused_D"])
    @pytest.mark.parametrize("single", [False, True], ids=["per_memory", "single"])
    def test_released_weights_load(self, single, old):
        config = dataclasses.replace(MOM_TINY, mixer_options=MOM_TINY.mixer_options | {"single_kv_proj": single})
        released = released_mom(config, single, old=old)
        model = LanguageModel(config)
        model.load_state_dict(convert_released_mom(released))
        layer = model.layers[1].attn
        parts = [weight.split(layer.projected_sizes) for weight in layer.memory_proj.weight]
        assert len(parts) == (1 if single else 5)
        prefix = "model.layers.1.attn."
        for idx, name in enumerate("kvab"):
            assert torch.equal(parts[-1][idx], released[f"{prefix}shared_{name}.weight"])
            if not single:
                for m in range(4):
                    assert torch.equal(parts[m][idx], released[f"{prefix}{name}_proj.{m}.weight"])
        assert torch.equal(layer.router.weight, released[f"{prefix}gate.weight"])
        assert torch.equal(layer.g_proj.weight, released[f"{prefix}g_proj.weight"])

    def test_incomplete_weights_are_refused(self):
        released = released_mom(MOM_TINY)
        del released["model.layers.0.attn.b_proj.2.weight"]
        with pytest.raises(ValueError, match=r"layers\.0\.attn are incomplete: b_proj\.2 missing"):
            convert_released_mom(released)

    def test_decodes_like_the_full_forward_and_reports_its_routing(self):
        model = LanguageModel(dataclasses.replace(MOM_TINY, initializer_range=0.3))
        tokens = torch.randint(256, (2, 9))
        result = model.generate(tokens, 4, temperature=0)
        with torch.no_grad():
            expected = model(result[:, :-1]).logits[:, 8:].argmax(-1)
        assert torch.equal(result[:, 9:], expected)
        assert [int(routing.hits.sum()) for routing in model.routing] == [2 * 2 * 12] * 2

    def test_all_parameters_learn(self):
        model = LanguageModel(dataclasses.replace(MOM_TINY, initializer_range=0.3))
        tokens = torch.randint(256, (2, 30))
        model(tokens, tokens).loss.backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


class TestGenerate:
    def test_greedy_takes_the_most_likely_token_of_the_full_forward(self, model, tokens):
        result = model.generate(tokens, 5, temperature=0)
        assert torch.equal(result[:, :9], tokens)
        for _ in range(5):
            with torch.no_grad():
                tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(result, tokens)

    def test_a_seed_repeats_the_draw(self, model, tokens):
        first = model.generate(tokens, 12, temperature=2.0, seed=1)
        assert torch.equal(model.generate(tokens, 12, temperature=2.0, seed=1), first)
        assert not torch.equal(model.generate(tokens, 12, temperature=2.0, seed=2), first)

    def test_top_k_of_one_is_greedy(self, model, tokens):
        assert torch.equal(model.generate(tokens, 4, top_k=1), model.generate(tokens, 4, temperature=0))

    def test_zero_new_tokens(self, model, tokens):
        assert torch.equal(model.generate(tokens, 0), tokens)

    def test_refuses_an_empty_prompt(self, model):
        with pytest.raises(ValueError, match="at least one token"):
            model.generate(torch.empty(1, 0, dtype=torch.int64), 3)


def test_forward_refuses_what_does_not_fit(model, tokens):
    with pytest.raises(ValueError, match=r"input_ids must be \[B, T\], got \[9\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"targets must be \[2, 9\] like input_ids, got \[2, 8\]"):
        model(tokens, tokens[:, :8])


class TestSample:
    PROBABILITIES = torch.tensor([0.1, 0.4, 0.2, 0.3])

    def frequencies(self, **options):
        generator = torch.Generator().manual_seed(0)
        logits = self.PROBABILITIES.log().expand(20000, 4)
        return torch.bincount(sample(logits, generator=generator, **options), minlength=4) / 20000

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, [0.1, 0.4, 0.2, 0.3]),
            ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
            ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
            ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
            ({"top_p": 0.75}, [0, 4 / 9, 2 / 9, 3 / 9]),
            ({"top_p": 0.01}, [0, 1, 0, 0]),
            ({"top_k": 3, "top_p": 0.6}, [0, 4 / 7, 0, 3 / 7]),
            ({"temperature": 0.0}, [0, 1, 0, 0]),
        ],
        ids=str,
    )
    def test_follows_the_distribution(self, options, expected):
        expected = torch.tensor(expected, dtype=torch.float32)
        frequencies = self.frequencies(**options)
        assert torch.equal(frequencies > 0, expected > 0)
        torch.testing.assert_close(frequencies, expected, rtol=0, atol=0.02)

    @pytest.mark.parametrize("options", [{"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}], ids=str)
    def test_refuses_options_out_of_range(self, options):
        with pytest.raises(ValueError, match=next(iter(options))):
            sample(torch.zeros(1, 4), **options)
