"""Large files that are mapped are read once ahead, with a bar, unless the system has them cached.

Without that the first text would read them page by page, in silence: 14 GB for the 27B in 4 bits.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from plug.progress import byte_counter

logger = logging.getLogger(__name__)

LARGE = 10**9  # bytes; less is read in the time of a few words
_SAMPLES = 64
_AT_ONCE = 16 * 2**20


def read_ahead(files: Iterable[Path]) -> None:
    """Read what is not in the page cache of the files, where all are `LARGE` together."""
    listed = sorted(set(files))
    if sum(file.stat().st_size for file in listed) < LARGE:
        return
    missing = [file for file in listed if not _is_cached(file)]
    total = sum(file.stat().st_size for file in missing)
    if not missing:
        return
    logger.warning("权重还不在系统的缓存里，先从硬盘读一遍：%.1f GB。", total / 1e9)
    buffer, done = bytearray(_AT_ONCE), 0
    with byte_counter("读权重") as advance:
        for file in missing:
            with file.open("rb", buffering=0) as stream:
                while count := stream.readinto(buffer):
                    done += count
                    advance(done, total)


def _is_cached(file: Path) -> bool:
    """Whether samples of a file can be read at once; True too where nobody can tell."""
    flag = getattr(os, "RWF_NOWAIT", None)
    if sys.platform == "win32" or flag is None:  # not Linux
        return True
    byte, size = bytearray(1), file.stat().st_size
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for sample in range(_SAMPLES):
            os.preadv(descriptor, [byte], size * sample // _SAMPLES, flag)
    except BlockingIOError:
        return False
    except OSError:  # the file system does not know the flag
        return True
    finally:
        os.close(descriptor)
    return True
