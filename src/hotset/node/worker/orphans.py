"""A GPU process dies with its node; guard.py ends what its function started."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_OOM_SCORE = 500


def die_with(parent_pid: int) -> None:
    """The kernel kills this process as soon as ``parent_pid``, which started it, is gone (``prctl(2)``)."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent_pid:
        os._exit(1)


def volunteer_for_oom() -> None:
    """When the machine runs out of memory the kernel should take a model, not the server."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as score:
        score.write(str(_OOM_SCORE))
