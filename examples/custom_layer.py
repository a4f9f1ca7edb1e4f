"""An operator inside of a layer of one's own, compiled: an associative memory learns to recall.

A sequence holds pairs of a key and a value, and then a key again: which value came with it? The layer has no positions
and no attention, only a state per head that the gated delta rule writes and reads.

    python examples/custom_layer.py [--steps 200]
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remora.ops import chunk_gated_delta_rule


class Memory(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.project = nn.Linear(width, 3 * width, bias=False)
        self.gates = nn.Linear(width, 2 * heads)
        self.out = nn.Linear(width, width, bias=False)
        nn.init.constant_(self.gates.bias[:heads], 4.0)  # the decay begins near one

    def forward(self, x: Tensor) -> Tensor:
        batch, seqlen, width = x.shape
        q, k, v = self.project(x).view(batch, seqlen, 3, self.heads, width // self.heads).unbind(2)
        decay, write = self.gates(x).chunk(2, dim=-1)
        o, _ = chunk_gated_delta_rule(
            q, k, v, F.logsigmoid(decay), write.sigmoid(), use_qk_l2norm_in_kernel=True, output_final_state=False
        )
        return self.out(o.flatten(2))


class Recall(nn.Module):
    def __init__(self, vocabulary: int, width: int = 64, heads: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        # a pair's value meets its key: the layer before the memory sees one token back
        self.neighbour = nn.Linear(2 * width, width)
        self.memory = Memory(width, heads)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = x + self.neighbour(torch.cat([x, F.pad(x, (0, 0, 1, -1))], dim=-1))
        return self.head(x + self.memory(x))[:, -1]


def batch(size: int, pairs: int, vocabulary: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens [size, 2 pairs + 1], key value key value ... key, and the value to recall."""
    half = vocabulary // 2
    keys = torch.rand(size, half, generator=rng).argsort(-1)[:, :pairs]
    values = torch.randint(half, vocabulary, (size, pairs), generator=rng)
    asked = torch.randint(pairs, (size, 1), generator=rng)
    tokens = torch.cat([torch.stack([keys, values], -1).flatten(1), keys.gather(1, asked)], dim=1)
    return tokens, values.gather(1, asked).squeeze(1)


def main() -> float:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--steps", type=int, default=200)
    ap.add_argument("--backend", default="inductor", help="of torch.compile")
    options = ap.parse_args()
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    vocabulary, pairs = 32, 8
    model = Recall(vocabulary)
    compiled = torch.compile(model, fullgraph=True, backend=options.backend)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(options.steps):
        tokens, answers = batch(64, pairs, vocabulary, rng)
        loss = F.cross_entropy(compiled(tokens), answers)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 49:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    tokens, answers = batch(512, pairs, vocabulary, rng)
    with torch.no_grad():
        right = (model(tokens).argmax(-1) == answers).float().mean().item()
    print(f"recalls {right:.1%} of the values; guessing would be {2 / vocabulary:.1%}")
    return right


if __name__ == "__main__":
    main()
