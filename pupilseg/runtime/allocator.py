"""The C library's allocator, told to keep what a training step will want again."""

from __future__ import annotations

import ctypes
import platform

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Names of glibc's parameters (`malloc.h`)."""
_MOST = 2**31 - 1
_TOP_PAD_BYTES = 64 << 20


def keep_freed_memory() -> bool:
    """Makes glibc keep freed memory for this process instead of giving it back to the kernel.

    A step frees and takes some hundred MB; given back, each of its pages is a fault and is filled
    with zeros at the next step. Kept, an epoch on two cores takes 2.3 s in place of 2.8 s
    (docs/benchmarks.md). The process stays as large as it was at its largest.

    Returns:
        Whether that was possible: elsewhere than on glibc nothing changes.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, _MOST), (_TOP_PAD, _TOP_PAD_BYTES))
    return all(mallopt(name, value) == 1 for name, value in settings)
