"""The host's memory, for programs that compute on a CPU."""

import ctypes
import platform

_ARENA_MAX, _MMAP_MAX, _TRIM_THRESHOLD = -8, -4, -1  # of glibc's malloc.h


def keep_pages() -> bool:
    """Asks malloc to keep freed memory for the next call instead of giving it back to the system; is that granted?

    Each call of a compiled program allocates its temporaries, on a CPU by malloc, and glibc takes blocks of more than
    32 MB from the system anew each time, page by page. That costs more than many a recurrence that fills them: an `lru`
    layer at B = 4, T = 16,384 spends 4 us per token in its work and 7 us in page faults. Training two layers of
    gated_deltanet by `experiments/language_model.py` became 1.2 times as fast.

    The process then keeps the most it ever had until it ends. To be called before the first array is made. Does nothing
    where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    granted = [mallopt(key, value) for key, value in ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))]
    return all(granted)
