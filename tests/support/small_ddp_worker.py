"""One of two processes that train with reversible layers or sampled gradients under DistributedDataParallel.

Arguments: what is tested, and a folder for the state at the end. Each process has batches of its own and
compares what it trained with the same without recomputation, or with the mean of both processes' gradients.
"""

import os
import sys
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel

from tests.support.finetuning import assert_same_state, make_batch, state_of
from tests.support.reversing import assert_same_gradients, gradients, make
from trimserve.finetune import reversible, sampled_gradients

STEPS = 4


def train(model, rank: int) -> dict[str, torch.Tensor]:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(STEPS):
        with wrapped.no_sync():  # a batch that is accumulated
            torch.manual_seed(step)
            wrapped(**make_batch(100 + 2 * step + rank)).loss.backward()
        train_more(wrapped, optimizer, step, rank)
    return state_of(model)


def train_more(wrapped, optimizer, step: int, rank: int) -> None:
    torch.manual_seed(step)
    wrapped(**make_batch(2 * step + rank)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def train_reversible(rank: int) -> dict[str, torch.Tensor]:
    states = []
    for recompute in (True, False):
        model = make("bert")
        torch.manual_seed(0)
        with reversible(model, variant=3, rank=3, freeze=False) as meft:
            meft.recompute = recompute
            states.append(train(model, rank))
    assert any(bool(values.any()) for name, values in states[0].items() if "up.weight" in name)
    assert_same_state(*states)
    return states[0]


def train_sampled(rank: int) -> dict[str, torch.Tensor]:
    model = make("bert")
    plain = train(make("bert"), rank)
    with sampled_gradients(model, keep=1.0):
        assert_same_state(train(model, rank), plain)
    # What arrives is the mean of both processes' own estimates.
    model = make("bert")
    with sampled_gradients(model, keep=0.4, seed=rank):
        own = gradients(model, make_batch(rank))
    with sampled_gradients(model, keep=0.4, seed=rank):
        found = gradients(DistributedDataParallel(model), make_batch(rank))
    for name, gradient in own.items():
        if name != "loss":
            torch.distributed.all_reduce(gradient)
            gradient /= 2
    found = {name.removeprefix("module."): gradient for name, gradient in found.items()}
    del own["loss"], found["loss"]
    assert_same_gradients(found, own)
    model = make("bert")
    with sampled_gradients(model, keep=0.4):
        return train(model, rank)


def main() -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=os.environ["INIT"], rank=rank, world_size=world)
    made = {"reversible": train_reversible, "sampled": train_sampled}[sys.argv[1]](rank)
    torch.save(made, Path(sys.argv[2]) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
