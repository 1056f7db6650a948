"""How many threads ExecuTorch's kernels run on."""

from __future__ import annotations

from peers import load as what


def bound() -> int:
    """Give its pool as many threads as everyone has, before anything runs; how many it has now."""
    from executorch.extension.pybindings import portable_lib

    if portable_lib._threadpool_get_thread_count() != what.THREADS:
        portable_lib._unsafe_reset_threadpool(what.THREADS)
    count: int = portable_lib._threadpool_get_thread_count()
    return count
