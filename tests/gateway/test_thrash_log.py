"""The log says when thrashing begins and ends, once each."""

from __future__ import annotations

import asyncio
import logging

import pytest
from gateway_world import World, run, version

from hotset.gateway import thrash_log
from hotset.scheduling.thrash import Episode


def test_thrashing_is_logged_when_it_begins_and_when_it_is_over(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thrash_log, "LOOK_EVERY_S", 0.0)
    caplog.set_level(logging.INFO, "hotset.gateway")

    def said() -> list[str]:
        return [record.getMessage() for record in caplog.records if "thrash" in record.getMessage()]

    async def story() -> None:
        world = await World().start(version("cat"))
        control = world.control
        logging_task = asyncio.create_task(thrash_log.log_thrashing(control))
        calls = [control.submit("cat", b"x") for _ in range(4)]
        await world.advance()
        assert said() == []
        control.scheduler.cluster.thrash.episodes.append(Episode(control.now_s(), 0.7))
        await world.advance()
        assert [line.split(":")[0] for line in said()] == ["GPUs thrash"]
        assert "70 %" in said()[0]
        for call in calls:
            await world.finish(call)
        await world.advance()
        assert len(said()) == 2
        assert said()[1].startswith("GPUs no longer thrash")
        logging_task.cancel()

    run(story)
