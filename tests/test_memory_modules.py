"""Product-key memory layers: against their definitions, initialisation, shared tables, row gradients, decoding."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F

from remora.models import ULTRAMEM_V2_1B, ULTRAMEM_V2_227M, ULTRAMEM_V2_TINY, LanguageModel, LanguageModelConfig
from remora.models.memories import make_memories
from remora.modules import PEER, MemoryPlus, MemoryTable, ProductKeyMemory, UltraMem, UltraMemV2
from remora.optim import SparseAdamW, row_gradient

D, NUM_KEYS, TOPK = 16, 8, 4

LAYERS = {
    "product_key_memory": lambda **o: ProductKeyMemory(D, NUM_KEYS, TOPK, 2, 4, query_norm="rms", **o),
    "memory_plus": lambda **o: MemoryPlus(D, NUM_KEYS, TOPK, 2, 4, qk_norm=True, **o),
    "peer": lambda **o: PEER(D, NUM_KEYS, TOPK, 2, 4, query_norm="layer", **o),
    "ultra_mem": lambda **o: UltraMem(D, NUM_KEYS, TOPK, 2, 4, 8, candidates=4, **o),
    "ultra_mem_v2": lambda **o: UltraMemV2(D, NUM_KEYS, TOPK, 4, 8, 8, candidates=4, **o),
}


def product_key_weights(retrieval, x):
    """Weights of all n^2 slots, `[T, H, n^2]`, zero for those that are not chosen."""
    query = retrieval.query_norm(retrieval.query_proj(x).view(-1, retrieval.num_heads, 2, retrieval.key_dim))
    scores = torch.einsum("thad,hand->than", query, retrieval.key_norm(retrieval.keys))
    grid = (scores[:, :, 0, :, None] + scores[:, :, 1, None, :]).flatten(2)
    kth = grid.topk(retrieval.topk, -1).values[..., -1:]
    return grid.masked_fill(grid < kth, -torch.inf).softmax(-1)


def tucker_weights(retrieval, x):
    """Scores of all n^2 slots, `[T, H, h, n^2]`, zero for those that are not chosen."""
    H, n, r = retrieval.num_heads, retrieval.num_keys, retrieval.rank
    query = retrieval.query_norm(retrieval.query_proj(x).view(-1, *retrieval.query_shape))
    query = query.repeat_interleave(H // query.shape[1], 1).expand(-1, -1, -1, r, -1)
    keys = retrieval.key_norm(retrieval.keys.transpose(-1, -2)).transpose(-1, -2)
    scores = torch.einsum("thard,handr->thanr", query, keys)
    grid = torch.einsum("thir,chrs,thjs->thcij", scores[:, :, 0], retrieval.core, scores[:, :, 1])
    rows = (scores[:, :, 0] * retrieval.u[:, None]).sum(-1)
    columns = (scores[:, :, 1] * retrieval.t[:, None]).sum(-1)
    allowed = torch.zeros(*rows.shape, n, dtype=torch.bool)
    row_kept = rows >= rows.topk(retrieval.candidates, -1).values[..., -1:]
    column_kept = columns >= columns.topk(retrieval.candidates, -1).values[..., -1:]
    allowed = row_kept[..., :, None] & column_kept[..., None, :]
    total = grid.sum(2).masked_fill(~allowed, -torch.inf).flatten(2)
    kth = total.topk(retrieval.topk, -1).values[..., -1:]
    return grid.flatten(3) * (total >= kth)[:, :, None]


def definition(layer, x):
    """The layer's formula over all slots."""
    if isinstance(layer, (UltraMem, UltraMemV2)):
        weights = tucker_weights(layer.retrieval, x).sum(1)  # [T, h, n^2]
    else:
        weights = product_key_weights(layer.retrieval, x).sum(1)  # [T, n^2]
    if isinstance(layer, PEER):
        down, up = layer.table.weight.chunk(2, 1)
        return (weights * F.gelu(x @ down.T)) @ up
    if isinstance(layer, UltraMemV2):
        z = layer.down_proj(x) @ layer.table.weight[:, : layer.down_proj.out_features].T
        up = layer.table.weight[:, layer.down_proj.out_features :].unflatten(1, (weights.shape[1], -1))
        return layer.out_proj(torch.einsum("tcn,ncd->tcd", weights * z[:, None], up).flatten(1))
    if isinstance(layer, UltraMem):
        virtual = torch.zeros_like(weights).index_add_(2, layer.permutation.long(), weights)
        virtual = virtual.unflatten(2, (layer.expansion, -1))
        values = layer.table.weight.unflatten(1, (weights.shape[1], -1))
        return layer.out_proj(torch.einsum("tcen,ncd->tecd", virtual, values).flatten(1))
    y = weights @ layer.table.weight
    return layer.out_proj(y * F.silu(layer.gate_proj(x))) if isinstance(layer, MemoryPlus) else y


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", LAYERS)
def test_layer_is_its_definition(name):
    layer = LAYERS[name]().double()
    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    have, want = layer(x), definition(layer, x.flatten(0, 1)).view(2, 5, -1)
    torch.testing.assert_close(have, want)
    d = torch.randn_like(have)
    grads = [torch.autograd.grad(y, parameters, d, allow_unused=True) for y in (have, want)]
    for (parameter, _), a, b in zip([("x", x), *layer.named_parameters()], *grads, strict=True):
        torch.testing.assert_close(a, b, msg=lambda m, p=parameter: f"{p}: {m}")


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", LAYERS)
def test_row_gradients_are_the_dense_ones(name):
    sparse = LAYERS[name](sparse_grad=True)
    dense = copy.deepcopy(sparse)
    tables = [module for module in dense.modules() if isinstance(module, MemoryTable)]
    for table in tables:
        table.sparse_grad = False
    x, d = torch.randn(7, D), None
    for layer in (sparse, dense):
        for _ in range(2):
            y = layer(x)
            d = torch.randn_like(y) if d is None else d
            y.backward(d)
    for (name, a), b in zip(sparse.named_parameters(), dense.parameters(), strict=True):
        gradient = row_gradient(a)
        if gradient is None:
            torch.testing.assert_close(a.grad, b.grad, msg=lambda m, n=name: f"{n}: {m}")
            continue
        assert a.grad is None
        have = torch.zeros_like(b)
        count = int(gradient.num_rows)
        have[gradient.rows[:count].long()] = gradient.values[:count]
        torch.testing.assert_close(have, b.grad, msg=lambda m, n=name: f"{n}: {m}")
    assert sum(row_gradient(p) is not None for p in sparse.parameters()) == len(tables)


@pytest.mark.cpu_only
@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_tokens_are_decoded_apart(name):
    layer = LAYERS[name]().eval()
    x = torch.randn(1, 9, D)
    whole = layer(x)
    for t in range(9):
        torch.testing.assert_close(layer(x[:, t : t + 1]), whole[:, t : t + 1])


@pytest.mark.sim_only
@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("tokens", [1, 64])
def test_decoding_launches(name, tokens):
    from remora.testing import sim

    layer = LAYERS[name]().eval()
    x = torch.randn(tokens, D)
    layer(x)
    sim.reset_stats()
    layer(x)
    # A bilinear form takes the selection from the candidates' pairs on top.
    most = 3 if name.startswith("ultra_mem") else 2
    assert sum(counters["launches"] for counters in sim.stats().values()) <= most


@pytest.mark.cpu_only
@torch.no_grad()
def test_initial_variance_is_that_of_a_feed_forward_layer():
    """Measured over draws of the layer, within the deviation that few draws leave."""
    L, kappa, ratios, means = 4, 8 / 3, [], []
    for seed in range(4):
        torch.manual_seed(seed)
        layer = UltraMemV2(128, 48, 16, 32, 32, 32, num_layers=L, ffn_expansion=kappa)
        x = torch.randn(256, 128)
        ratios.append(float(layer(x).var()) / (0.064 * kappa / (2 * L)))
        means.append(float(layer.retrieval(x)[1].mean()))
    assert 0.6 < sum(ratios) / 4 < 1.6, ratios
    assert 0.8 < sum(means) / 4 < 1.25, means


def test_kept_scores_set_the_gain():
    layer = UltraMemV2(64, 32, 8, 16, 16, 16)
    factor = 0.2 * (8 / 3) * 64 / (8 * (1 + layer.retrieval.score_variance) * 16 * 16)
    assert math.isclose(layer.table_std**4, factor, rel_tol=1e-6)
    assert math.isclose(float(layer.table.weight.detach().std()), layer.table_std, rel_tol=0.05)


@pytest.mark.cpu_only
def test_the_pair_follows_the_cores():
    layer = UltraMemV2(D, NUM_KEYS, TOPK, 4, 8, 8)
    before = layer.retrieval.u.clone()
    layer(torch.randn(3, D))
    assert torch.equal(layer.retrieval.u, before)
    with torch.no_grad():
        layer.retrieval.core.mul_(torch.tensor([[1.0, 3.0], [2.0, 0.5]]))
    layer.eval()(torch.randn(3, D))
    assert torch.equal(layer.retrieval.u, before)
    layer.train()(torch.randn(3, D))
    assert not torch.equal(layer.retrieval.u, before)
    assert "retrieval.u" in layer.state_dict()


@pytest.mark.cpu_only
def test_shared_tables():
    pool = MemoryTable(NUM_KEYS**2, D)
    a, b = (ProductKeyMemory(D, NUM_KEYS, TOPK, 2, 4, query_norm="rms", table=pool) for _ in range(2))
    (a(torch.randn(3, D)).sum() + b(torch.randn(3, D)).sum()).backward()
    assert pool.weight.grad is not None
    for sharing, rows in (("ring", 4 * NUM_KEYS**2 // 2), ("block", NUM_KEYS**2)):
        options = {"num_keys": NUM_KEYS, "topk": TOPK, "key_dim": 4, "down_dim": 8, "up_dim": 8}
        layers = make_memories("ultramem_v2", D, 4, 2.0, options | {"sharing": sharing, "group": 2})
        assert layers[0].table.num_rows == rows
        assert layers[0].table is layers[1].table
        assert (layers[0].table is layers[2].table) == (sharing == "ring")
    # The last layer of a ring reads the last piece and, around the end, the first.
    layers = make_memories("ultramem_v2", D, 4, 2.0, options | {"sharing": "ring", "group": 2})
    layers[3](torch.randn(200, D)).sum().backward()
    touched = layers[3].table.weight.grad.abs().sum(1).view(4, -1).sum(1) > 0
    assert touched.tolist() == [True, False, False, True]


def test_sizes_of_the_papers_models():
    for config, tables, rest in ((ULTRAMEM_V2_227M, 995e6, 227e6), (ULTRAMEM_V2_1B, 5.14e9, None)):
        with torch.device("meta"):
            model = LanguageModel(config)
        in_tables = sum(p.numel() for m in model.modules() if isinstance(m, MemoryTable) for p in m.parameters())
        assert abs(in_tables / tables - 1) < 0.001
        if rest is not None:
            assert abs((model.num_parameters - in_tables) / rest - 1) < 0.02, model.num_parameters - in_tables


@pytest.mark.cpu_only
def test_model_trains_and_is_saved(tmp_path):
    import dataclasses

    options = ULTRAMEM_V2_TINY.memory_options | {"sharing": "ring", "group": 2, "sparse_grad": True}
    model = LanguageModel(dataclasses.replace(ULTRAMEM_V2_TINY, memory_options=options))
    assert LanguageModelConfig.from_json(model.config.to_json()) == model.config
    optimizer = SparseAdamW(model.parameters(), lr=1e-2)
    tokens = torch.randint(256, (4, 33))
    losses = []
    for _ in range(25):
        loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.6 * losses[0]
    model.save_pretrained(tmp_path)
    loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded.layers[0].memory.table.weight is loaded.layers[1].memory.table.weight
    with torch.no_grad():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
        prompt = tokens[:1, :5]
        assert torch.equal(loaded.generate(prompt, 4, 0.0), model.generate(prompt, 4, 0.0))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: MemoryTable(0, 4), "num_rows"),
        (lambda: ProductKeyMemory(D, NUM_KEYS, topk=NUM_KEYS**2 + 1), "topk"),
        (lambda: ProductKeyMemory(D, NUM_KEYS, query_norm="x"), "query_norm"),
        (lambda: ProductKeyMemory(D, NUM_KEYS, activation="x"), "activation"),
        (lambda: ProductKeyMemory(D, NUM_KEYS, TOPK, table=MemoryTable(3, D)), "table"),
        (lambda: PEER(D, NUM_KEYS, TOPK, table=MemoryTable(3, 2 * D)), "table"),
        (lambda: UltraMem(D, NUM_KEYS, TOPK, expansion=5), "expansion"),
        (lambda: UltraMemV2(D, NUM_KEYS, TOPK, up_dim=7), "num_cores"),
        (lambda: make_memories("x", D, 2, 2.0, {}), "memory"),
        (lambda: make_memories("memory_plus", D, 2, 2.0, {"sharing": "ring"}), "sharing"),
        (lambda: make_memories("ultramem_v2", D, 3, 2.0, {"sharing": "block", "group": 2}), "group"),
        (lambda: MemoryPlus(D, NUM_KEYS, TOPK)(torch.randn(3, D + 1)), "hidden_states"),
    ],
)
def test_errors(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_meta_device_needs_no_kernels():
    with torch.device("meta"):
        layer = UltraMemV2(D, NUM_KEYS, TOPK)
    assert layer.out_proj.weight.is_meta


@pytest.mark.cpu_only
def test_training_resumes_to_the_bit(tmp_path):
    from remora.train import TrainConfig, Trainer, resumed_config

    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 200)
    config = TrainConfig(
        data=str(tmp_path / "text.txt"), memory="ultramem_v2", memory_num_keys=8, memory_topk=2, hidden_size=16,
        num_layers=2, num_heads=2, head_dim=8, intermediate_size=24, steps=6, batch_size=2, seq_len=16, warmup_steps=2,
        eval_every=0, eval_bytes=64, checkpoint_every=0, device="cpu",
    )  # fmt: skip
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    Trainer(config, straight).run()
    Trainer(config, stopped).run(until=3)
    resumed = Trainer(resumed_config(stopped, {}), stopped, resume=True)
    assert isinstance(resumed.optimizer, SparseAdamW)
    resumed.run()
    assert (stopped / "model.safetensors").read_bytes() == (straight / "model.safetensors").read_bytes()
