"""One of two processes that train a full and a cut model under DistributedDataParallel and compare them.

Arguments: the base folder, the folder for the compact checkpoint. Rank 0 writes that checkpoint, and beside
it the weights of the full model that the cut one has to equal.
"""

import os
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from tests.support.finetuning import VOCAB, assert_same_state, make_batch, train_step
from trimserve.finetune import partial_vocab

STEPS = 6


def train(model, translate, rank: int) -> None:
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=0.01, weight_decay=0.0)
    for step in range(STEPS):
        batch = translate(make_batch(2 * step + rank, labels="token"))
        train_step(wrapped, batch, optimizer, step)


def main() -> None:
    base, target = Path(sys.argv[1]), Path(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo", init_method=os.environ["INIT"], rank=rank, world_size=world)
    model_class = transformers.LlamaForCausalLM
    full, partial = model_class.from_pretrained(base), model_class.from_pretrained(base)
    kept = torch.tensor(VOCAB.kept_ids.astype("int64"))
    # The softmax over the kept ids, so that both have the same loss.
    full.lm_head.forward = lambda hidden: torch.nn.functional.linear(hidden, full.lm_head.weight[kept])
    with partial_vocab(partial, VOCAB) as compact:
        full.config.vocab_size = len(VOCAB)
        train(full, lambda batch: batch | {"labels": compact.remap(batch)["labels"]}, rank)
        train(partial, compact.remap, rank)
        if rank == 0:
            partial.save_pretrained(target)
    assert_same_state(partial.state_dict(), full.state_dict())
    if rank == 0:
        save_file(full.state_dict(), f"{target}.full.safetensors")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
