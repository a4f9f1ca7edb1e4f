"""Decoding many sequences from one pool of states: they join, advance together and leave, each in a slot of the pool.

A prompt is read in one call of the chunked operator, which gives the state behind it; every further token is one step
of all running sequences, in place. Nothing grows with the length of a sequence, and no state moves when the batch
changes.

    python examples/serving.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from remora.ops import chunk_gated_delta_rule, gated_delta_rule_step

HEADS, DIM = 4, 64


class Pool:
    """States of the running sequences, and which slots are free."""

    def __init__(self, slots: int) -> None:
        self.states = torch.zeros(slots, HEADS, DIM, DIM)
        self.free = list(range(slots))

    def join(self, prompt: list[Tensor]) -> int:
        """Reads a prompt, q, k, v [1, T, H, D] with g, beta [1, T, H]; returns the slot of its sequence."""
        slot = self.free.pop()
        _, state = chunk_gated_delta_rule(*prompt, output_final_state=True)
        self.states[slot] = state[0]
        return slot

    def step(self, slots: list[int], tokens: list[Tensor]) -> Tensor:
        """One token of every sequence in `slots`: q, k, v [N, 1, H, D] with g, beta [N, 1, H]."""
        return gated_delta_rule_step(*tokens, self.states, state_indices=torch.tensor(slots))

    def leave(self, slot: int) -> None:
        self.free.append(slot)


def random_tokens(count: int) -> list[Tensor]:
    """What the projections of a model would give."""
    q, k = (F.normalize(torch.randn(1, count, HEADS, DIM), dim=-1) for _ in range(2))
    v = torch.randn(1, count, HEADS, DIM)
    return [q, k, v, F.logsigmoid(torch.randn(1, count, HEADS) + 4), torch.rand(1, count, HEADS)]


@torch.no_grad()
def main() -> float:
    torch.manual_seed(0)
    # when a sequence arrives, how long its prompt is, and how many tokens are decoded
    requests = {"a": (0, 100, 6), "b": (0, 17, 3), "c": (2, 40, 5), "d": (4, 1, 4)}
    texts = {name: random_tokens(prompt + new) for name, (_, prompt, new) in requests.items()}
    pool, running, outputs = Pool(slots=3), {}, {name: [] for name in requests}
    waiting = list(requests)
    for time in range(20):
        for name in [n for n in waiting if requests[n][0] <= time][: len(pool.free)]:
            waiting.remove(name)
            running[name] = pool.join([t[:, : requests[name][1]] for t in texts[name]])
        if not running:
            break
        at = {name: requests[name][1] + len(outputs[name]) for name in running}
        tokens = [torch.cat([texts[n][i][:, at[n] : at[n] + 1] for n in running]) for i in range(5)]
        for name, o in zip(running, pool.step(list(running.values()), tokens), strict=True):
            outputs[name].append(o)
        print(f"time {time}: " + ", ".join(f"{name} in slot {slot}" for name, slot in running.items()))
        for name in [n for n in running if len(outputs[n]) == requests[n][2]]:
            pool.leave(running.pop(name))

    worst = 0.0
    for name, (_, prompt, _) in requests.items():
        whole, _ = chunk_gated_delta_rule(*texts[name])
        worst = max(worst, (torch.cat(outputs[name]) - whole[0, prompt:]).abs().max().item())
    print(f"largest difference from one call over the whole sequence: {worst:.1e}")
    return worst


if __name__ == "__main__":
    main()
