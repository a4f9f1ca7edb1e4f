"""A table split by columns over processes: forward, backward, optimizer and checkpoints against one process."""

import functools

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from remora.modules import MemoryTable
from remora.optim import SparseAdamW, row_gradient

pytestmark = pytest.mark.cpu_only

N, D, T, P, STEPS = 30, 16, 6, 4, 3


def inputs(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return (
        torch.randint(N, (T, P), generator=generator),
        torch.randn(T, P, generator=generator),
        torch.randn(T, D, generator=generator),
    )


def optimizer_of(table):
    return SparseAdamW(table.parameters(), lr=0.1, stochastic_rounding=True, seed=4)


def run(table, batches):
    """Outputs, gradients of the weights and of the table at every step."""
    optimizer = optimizer_of(table)
    results = []
    for indices, weights, d_out in batches:
        weights = weights.clone().requires_grad_()
        out = table.bag(indices, weights)
        out.backward(d_out.to(out.dtype))
        if table.sparse_grad:
            gradient = row_gradient(table.weight)
            count = int(gradient.num_rows)
            d_table = torch.zeros(N, gradient.values.shape[1])
            d_table[gradient.rows[:count].long()] = gradient.values[:count]
        else:
            d_table = table.weight.grad.clone()
        results.append([out.detach(), weights.grad, d_table])
        optimizer.step()
        optimizer.zero_grad()
    return results, optimizer


@functools.cache
def whole_table(dtype):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(7)).to(dtype)


def reference(world_size, dtype, sparse_grad):
    """One process with the tokens of all ranks."""
    table = MemoryTable(N, D, sparse_grad=sparse_grad).to(dtype)
    table.weight.data.copy_(whole_table(dtype))
    batches = [
        [torch.cat(parts) for parts in zip(*(inputs(rank, step) for rank in range(world_size)), strict=True)]
        for step in range(STEPS)
    ]
    results, optimizer = run(table, batches)
    return table.weight.detach(), optimizer.state[table.weight]["exp_avg"], results


def worker(rank, world_size, path, dtype, sparse_grad):
    from remora.distributed import ShardedMemoryTable, gather_table, shard_columns, shard_table

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=world_size)
    want_table, want_moment, want = reference(world_size, dtype, sparse_grad)
    table = ShardedMemoryTable(N, D, sparse_grad=sparse_grad).to(dtype)
    assert table.weight.column_offset == rank * D // world_size
    table.load_table(whole_table(dtype))
    assert torch.equal(table.whole_table(), whole_table(dtype))
    results, optimizer = run(table, [inputs(rank, step) for step in range(STEPS)])
    begin, end = shard_columns(D, rank, world_size)
    for step, (have, expected) in enumerate(zip(results, want, strict=True)):
        rows = slice(rank * T, (rank + 1) * T)
        assert torch.equal(have[0], expected[0][rows]), f"output of step {step}"
        torch.testing.assert_close(have[1], expected[1][rows], rtol=1e-5, atol=1e-5)
        assert torch.equal(have[2], expected[2][:, begin:end]), f"gradient of step {step}"
    # The whole of table and state is that of one process, so a checkpoint fits any number of ranks.
    assert torch.equal(table.whole_table(), want_table)
    moment = gather_table(optimizer.state[table.weight]["exp_avg"])
    assert torch.equal(moment, want_moment)
    assert torch.equal(shard_table(moment), optimizer.state[table.weight]["exp_avg"])
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("world_size", "dtype", "sparse_grad"),
    [(2, torch.float32, True), (2, torch.bfloat16, False), (4, torch.bfloat16, True)],
)
def test_ranks_are_one_table(tmp_path, world_size, dtype, sparse_grad):
    mp.spawn(worker, (world_size, tmp_path / "store", dtype, sparse_grad), nprocs=world_size)


def test_width():
    from remora.distributed import shard_columns

    with pytest.raises(ValueError, match="multiple of 4"):
        shard_columns(12, 0, 2)
