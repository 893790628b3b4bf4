#!/usr/bin/env bash
# Expected: torch.distributed.checkpoint.async_save writes beside training: its thread spends its time in write calls of megabytes,
#   which need no interpreter lock, so that a busy main thread hardly slows it down.
# Happens (torch 2.13.0): the thread asks for the lock about ten times a tensor. A main thread that keeps the lock
#   for 5 ms at a time, as launching kernels into a full CUDA queue may, slows it down about five times (1.2 to 0.2 GB/s here, in
#   memory). FileSystemWriter(thread_count=8) gets most of it back (but see torch-checkpoint-threads-lose-errors.sh); the default is 1.
# Hurts: whoever checkpoints often: the next save waits for the last one. Seen on two H100s (torch 2.11): 110 s for 27 GB on a disk that
#   writes 1.2 GB/s; that this is the cause there is inferred. The main thread here sleeps in C without giving up the lock, so that no card is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" -W ignore - "$folder" <<'P'
import ctypes
import os
import shutil
import sys
import threading
import time

import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

print("torch", torch.__version__)
place = "/dev/shm" if os.path.isdir("/dev/shm") else sys.argv[1]
place = os.path.join(place, "checkpoint-" + os.path.basename(sys.argv[1]))
tensors = {str(i): torch.randint(0, 255, (8 * 2**20,), dtype=torch.uint8) for i in range(60)}
size = sum(each.nbytes for each in tensors.values()) / 1e9
sleep = ctypes.PyDLL(None).usleep  # a PyDLL function keeps the lock


def rate(busy, threads):
    shutil.rmtree(place, ignore_errors=True)
    took = []

    def write():
        began = time.perf_counter()
        save(tensors, storage_writer=FileSystemWriter(place, thread_count=threads), no_dist=True)
        took.append(time.perf_counter() - began)

    thread = threading.Thread(target=write)
    thread.start()
    while thread.is_alive():
        sleep(5000) if busy else time.sleep(0.01)
    shutil.rmtree(place, ignore_errors=True)
    return size / took[0]


rate(False, 1)  # gets the memory
idle, one, eight = rate(False, 1), rate(True, 1), rate(True, 8)
print(f"GB/s beside an idle main thread {idle:.2f}, beside a busy one {one:.2f}, the same with 8 threads {eight:.2f}")
assert one < idle / 2, "it changed: one thread is no longer held up"
assert eight > 1.5 * one, "it changed: more threads do not help"
P
