"""The server's log says when GPUs begin to thrash (``scheduling/thrash.py``), and when that is over."""

from __future__ import annotations

import asyncio
import logging
from typing import Never

from hotset.gateway import readings
from hotset.gateway.control import Control
from hotset.scheduling.thrash import Episode

LOOK_EVERY_S = 1.0

log = logging.getLogger("hotset.gateway")


async def log_thrashing(control: Control) -> Never:
    """Until it is cancelled."""
    known: Episode | None = None
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        episode = readings.thrashing(control)
        if known is not None and known.until_s is not None:
            log.info("GPUs no longer thrash, after %.1f s", known.until_s - known.since_s)
        if episode is not None and episode is not known:
            log.warning(
                "GPUs thrash: swapping models takes %.0f %% of their time, as more are called than fit; "
                "give it more GPUs or fewer functions",
                100 * episode.swapping,
            )
        known = episode
