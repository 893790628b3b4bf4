#!/usr/bin/env bash
# Expected: Accelerator.save_state() amid an epoch, load_state() in a new process and skip_first_batches(loader, n) go on with the batches
#   that were not seen yet, as the guide "Checkpointing" has it. "You don't need to do anything for the epoch" (issue 1130).
# Happens (accelerate 1.15.0): a shuffling DataLoader draws its order when the epoch begins, so that the saved state of the random
#   generator is the one after that draw. The resumed process skips n batches of the NEXT epoch's order: examples are seen twice or
#   not at all in that epoch. use_seedable_sampler=True alone does not help (the order is epoch 0's, whatever the epoch); together with
#   loader.set_epoch(epoch) before skip_first_batches it does. https://github.com/huggingface/accelerate/issues/2823
# Hurts: whoever writes a training loop of their own and is preempted: a third to a half of an epoch's examples are the wrong ones after
#   each resume, losses look normal, and no two runs can be compared.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet accelerate==1.15.0 torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" - <<'P'
import warnings

warnings.simplefilter("ignore")

import accelerate
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DataLoaderConfiguration, set_seed
from torch.utils.data import DataLoader

EXAMPLES, BATCH, DONE = 1000, 10, 50


def begin(seedable):
    """What a new process does at its start."""
    AcceleratorState._reset_state(True)
    accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(use_seedable_sampler=seedable))
    set_seed(0)
    return accelerator, accelerator.prepare(DataLoader(range(EXAMPLES), batch_size=BATCH, shuffle=True))


def ids(batches):
    return [i for batch in batches for i in batch.tolist()]


def resumed(seedable, set_epoch):
    """Of the epoch 1 of an unbroken run and of one that was broken amid it: what was seen."""
    _, loader = begin(seedable)
    ids(loader)
    unbroken = ids(loader)
    accelerator, loader = begin(seedable)
    ids(loader)  # epoch 0
    seen = []
    for step, batch in enumerate(loader):  # epoch 1
        seen += batch.tolist()
        if step + 1 == DONE:
            accelerator.save_state("state")
            break
    accelerator, loader = begin(seedable)
    accelerator.load_state("state")
    if set_epoch:
        loader.set_epoch(1)
    seen += ids(accelerator.skip_first_batches(loader, DONE))
    return len(seen), EXAMPLES - len(set(seen)), seen == unbroken


print("accelerate", accelerate.__version__, "torch", torch.__version__)
found = {}
for seedable, set_epoch in ((False, False), (False, True), (True, False), (True, True)):
    length, never, same = found[seedable, set_epoch] = resumed(seedable, set_epoch)
    print(f"use_seedable_sampler={seedable!s:5} set_epoch={set_epoch!s:5}: {length} examples in the epoch, {never} never seen "
          f"and as many twice; as the unbroken run: {same}")
wrong = [found[key] for key in ((False, False), (False, True), (True, False))]
assert all(length == EXAMPLES and 200 < never < 300 and not same for length, never, same in wrong), "it changed"
assert found[True, True] == (EXAMPLES, 0, True), "it changed"
P
