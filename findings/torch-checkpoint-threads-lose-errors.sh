#!/usr/bin/env bash
# Expected: torch.distributed.checkpoint.save with FileSystemWriter(thread_count=4) fails if a file cannot be written, as it does with one
#   thread (CheckpointException with the OSError of a full disk).
# Happens (torch 2.13.0): it returns. The threads that the writer starts have nobody to tell of an exception: threading prints it, the
#   results that are missing are not missed, .metadata is written, and the checkpoint looks whole. Reading it ends in a KeyError that
#   names no cause. With thread_count=1 the same limit raises.
# Hurts: whoever set thread_count to write faster and runs out of disk, quota or file size: the last good checkpoints are rotated away
#   for ones that cannot be read. The limit here is on a file's size (RLIMIT_FSIZE), which ends a write as a full disk does.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" 2>"$folder/errors" <<'P'
import resource
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

print("torch", torch.__version__)
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write then fails with EFBIG
tensors = {"large": torch.ones(300_000), **{f"small{i}": torch.ones(100) for i in range(40)}}
found = {}
for threads in (1, 4):
    place = Path(sys.argv[1]) / f"threads{threads}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, resource.RLIM_INFINITY))
    try:
        save(tensors, storage_writer=FileSystemWriter(place, thread_count=threads), no_dist=True)
        found[threads] = "returned"
    except BaseException as error:
        found[threads] = f"raised {type(error).__name__}"
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(f"thread_count={threads}: save {found[threads]}; .metadata is there: {(place / '.metadata').exists()}")
assert found == {1: "raised CheckpointException", 4: "returned"}, "it changed"
try:
    load({name: torch.zeros_like(each) for name, each in tensors.items()}, storage_reader=FileSystemReader(place), no_dist=True)
    print("reading it: works")
except BaseException as error:
    print("reading it:", str(error).strip().splitlines()[-1][:150])
else:
    raise AssertionError("it changed")
P
grep -c "Exception in thread" "$folder/errors" >/dev/null && echo "the exception was printed by threading, and by nobody else"
