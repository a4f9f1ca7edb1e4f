"""Optimizers on row gradients: from a backward pass to the step, merged, clipped, saved and resumed."""

import copy

import pytest
import torch
from torch import nn

from remora.ops import memory_bag, slot_plan
from remora.optim import RowwiseAdagrad, RowwiseAdamW, SparseAdamW, clip_grad_norm_, record_rows, row_gradient

OPTIMIZERS = {
    "adamw": lambda p, **o: SparseAdamW(p, lr=0.05, **o),
    "catchup": lambda p, **o: SparseAdamW(p, lr=0.05, mode="catchup", **o),
    "dense": lambda p, **o: SparseAdamW(p, lr=0.05, mode="dense", **o),
    "rowwise": lambda p, **o: RowwiseAdamW(p, lr=0.05, **o),
    "adagrad": lambda p, **o: RowwiseAdagrad(p, lr=0.05, **o),
}


class Reader(nn.Module):
    """A table read twice, and a dense layer behind it."""

    def __init__(self, N=60, d=8, sparse=True, dtype=torch.float32):
        super().__init__()
        self.table = nn.Parameter(torch.randn(N, d).to(dtype))
        self.linear = nn.Linear(d, 3)
        self.sparse = sparse

    def read(self, indices, weights):
        if not self.sparse:
            return memory_bag(indices, self.table, weights)
        plan = slot_plan(indices, self.table.shape[0])
        return memory_bag(indices, self.table, weights, plan=plan, row_grad=record_rows(self.table, plan))

    def forward(self, batch):
        y = self.read(*batch[0]) + self.read(*batch[1])
        return self.linear(y.float()).square().mean()


def batch(seed, N=60):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randint(-1, N // 2, (5, 4), generator=generator), torch.randn(5, 4, generator=generator))
        for _ in range(2)
    ]


def dense(gradient, N):
    count = int(gradient.num_rows)
    rows, values = gradient.rows[:count].long(), gradient.values[:count]
    assert torch.equal(rows, rows.unique())
    return torch.zeros(N, values.shape[1]).index_copy_(0, rows, values)


def test_parts_are_merged():
    """Two reads and two micro-batches leave the gradient that a dense table gets."""
    sparse = Reader()
    plain = copy.deepcopy(sparse)
    plain.sparse = False
    for seed in (0, 1):
        sparse(batch(seed)).backward()
        plain(batch(seed)).backward()
    assert sparse.table.grad is None
    gradient = row_gradient(sparse.table)
    torch.testing.assert_close(dense(gradient, 60), plain.table.grad)
    again = row_gradient(sparse.table)
    assert torch.equal(again.values, gradient.values)
    sparse(batch(2)).backward()
    plain(batch(2)).backward()
    torch.testing.assert_close(dense(row_gradient(sparse.table), 60), plain.table.grad)


@pytest.mark.parametrize("max_norm", [0.05, 100.0])
def test_clipping_is_that_of_dense_gradients(max_norm):
    sparse = Reader()
    plain = copy.deepcopy(sparse)
    plain.sparse = False
    sparse(batch(0)).backward()
    plain(batch(0)).backward()
    have = clip_grad_norm_(sparse.parameters(), max_norm)
    want = nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
    torch.testing.assert_close(have, want)
    torch.testing.assert_close(sparse.linear.weight.grad, plain.linear.weight.grad)
    gradient = row_gradient(sparse.table)
    torch.testing.assert_close(dense(gradient, 60) * gradient.scale, plain.table.grad)
    assert clip_grad_norm_([], 1.0) == 0
    with pytest.raises(ValueError, match="max_norm"):
        clip_grad_norm_([], 0.0)


def train(model, optimizer, seeds):
    for seed in seeds:
        model(batch(seed)).backward()
        clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()


def test_dense_mode_trains_like_adamw():
    sparse = Reader()
    plain = copy.deepcopy(sparse)
    plain.sparse = False
    train(sparse, SparseAdamW(sparse.parameters(), lr=0.05, mode="dense"), range(6))
    train(plain, torch.optim.AdamW(plain.parameters(), lr=0.05), range(6))
    torch.testing.assert_close(sparse.table, plain.table, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sparse.linear.weight, plain.linear.weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_resumed_run_has_the_bits_of_one_that_was_not_interrupted(name, dtype):
    options = {"stochastic_rounding": dtype is torch.bfloat16, "seed": 3}
    start = Reader(dtype=dtype)
    whole = copy.deepcopy(start)
    train(whole, OPTIMIZERS[name](whole.parameters(), **options), range(6))
    first = copy.deepcopy(start)
    optimizer = OPTIMIZERS[name](first.parameters(), **options)
    train(first, optimizer, range(3))
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    train(first, optimizer, range(9, 12))  # what is loaded must not share memory with a run that goes on
    second = Reader(dtype=dtype)
    second.load_state_dict(saved[0])
    optimizer = OPTIMIZERS[name](second.parameters(), **options)
    optimizer.load_state_dict(saved[1])
    train(second, optimizer, range(3, 6))
    for a, b in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    states = [state for state in optimizer.state.values() if "exp_avg" in state]
    assert all(state["exp_avg"].dtype == torch.float32 for state in states)


def test_lazy_rows_stay_and_catch_up_brings_them_level():
    """Rows that nothing reads keep their bits; after catch_up they have decayed like those of dense AdamW."""
    lazy, late, full = (Reader() for _ in range(3))
    for model in (late, full):
        model.load_state_dict(lazy.state_dict())
    before = lazy.table.detach().clone()
    train(lazy, SparseAdamW(lazy.parameters(), lr=0.05, weight_decay=0.5), range(4))
    assert torch.equal(lazy.table[30:], before[30:])
    optimizer = SparseAdamW(late.parameters(), lr=0.05, weight_decay=0.5, mode="catchup")
    train(late, optimizer, range(4))
    assert torch.equal(late.table[30:], before[30:])
    optimizer.catch_up()
    train(full, SparseAdamW(full.parameters(), lr=0.05, weight_decay=0.5, mode="dense"), range(4))
    torch.testing.assert_close(late.table[30:], full.table[30:])
    optimizer.catch_up()
    torch.testing.assert_close(late.table[30:], full.table[30:])


def test_embedding_with_sparse_gradients():
    embedding = nn.Embedding(20, 6, sparse=True)
    plain = nn.Embedding(20, 6)
    plain.load_state_dict(embedding.state_dict())
    tokens = torch.tensor([3, 3, 9])
    for module in (embedding, plain):
        module(tokens).square().sum().backward()
    SparseAdamW(embedding.parameters(), lr=0.1, mode="dense").step()
    torch.optim.AdamW(plain.parameters(), lr=0.1).step()
    torch.testing.assert_close(embedding.weight, plain.weight)


@pytest.mark.parametrize(
    "options", [{"mode": "x"}, {"betas": (1.0, 0.9)}, {"lr": -1.0}, {"eps": -1.0}, {"weight_decay": -1.0}]
)
def test_errors(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SparseAdamW([nn.Parameter(torch.zeros(2, 2))], **options)
