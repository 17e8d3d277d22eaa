"""What a process takes of the host's memory, as the kernel counts it (``/proc/PID/smaps_rollup``)."""

from __future__ import annotations

from pathlib import Path

import msgspec

PROC = Path("/proc")
_TABLES = ("smaps_rollup", "smaps")
"""The sums, and where the kernel has none (gVisor; Linux before 4.14) what they are made of."""


class HostMemory(msgspec.Struct, frozen=True):
    """The two parts of a process's proportional set size (PSS); those of all processes add up to what they take."""

    private_bytes: int = 0
    """Pages that it alone has written."""
    shared_bytes: int = 0
    """Its share of the others: files it has mapped (weights, libraries), and what its parent wrote before the fork. A
    page that n processes have in memory counts as an n-th of one for each."""


def host_memory(pid: int, proc: Path = PROC) -> HostMemory:
    """What the process takes now; zeros once it is gone.

    Milliseconds for each GiB it has mapped, as the kernel walks its pages: never while a call waits.
    """
    for table in _TABLES:
        try:
            lines = (proc / str(pid) / table).read_bytes().splitlines()
        except FileNotFoundError:
            continue
        except (ProcessLookupError, PermissionError):  # it has ended, or is not ours any more
            break
        # A file that was written lately is dirty until it is on the disk, for whoever maps it: no process wrote that.
        anonymous_bytes = _sum(lines, b"Pss_Anon:") or _sum(lines, b"Anonymous:")
        private_bytes = min(_sum(lines, b"Private_Dirty:"), anonymous_bytes)
        pss_bytes = _sum(lines, b"Pss:")
        return HostMemory(private_bytes, max(0, pss_bytes - private_bytes))
    return HostMemory()


def _sum(lines: list[bytes], name: bytes) -> int:
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
