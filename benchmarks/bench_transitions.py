"""What it costs to have a model where it is needed, each step beside the least it could cost on this machine, now.

    COLD --load--> HOT        a process, the function's module, its weights
    WARM --restore--> HOT     its weights
    HOT, another model COLD   a miss: all of it, over HTTP, the other model's end included

Floors and figures are taken in turns, and the medians compared. Cold files are evicted with ``posix_fadvise``; what
lies below this machine (a host's cache, a disk's) is not, which flatters both sides alike. Weights are written to a
temporary folder, 2.1 GB of them, and removed. Ends by itself in two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import uvloop
from calibration import machine_speed
from transitions import FRAMEWORKS, Bench, Driver, Row, cold, miss, modules, processes, swaps, warm

from hotset.node.manager import LocalNode
from hotset.node.zygote import ZygoteSource

GPU_MEMORY_BYTES = 8 << 30
STEPS: dict[str, Callable[[Bench, str], Awaitable[Iterator[Row]]]] = {
    "processes": lambda bench, _: processes(bench),
    "modules": modules,
    "warm": warm,
    "cold": cold,
    "swaps": lambda bench, _: swaps(bench),
}
SIZES = {"modules": ("100", "500", "1500"), "warm": ("500",), "cold": ("500", "1500")}


def say(row: Row) -> None:
    floor = f"{row.floor_name} {row.floor:.4g} {'ms' if row.unit == 'x' else row.unit}" if row.floor is not None else ""
    ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
    verdict = "" if row.holds is None else f"{row.bar}: {'holds' if row.holds else 'MISSED'}"
    print(f"{row.name:64} {row.value:9.4g} {row.unit:3}  {floor:40} {ratio:>6}  {verdict}", flush=True)


@asynccontextmanager
async def prepared(folder: Path, rounds: int, sizes: set[str]) -> AsyncIterator[Bench]:
    """A node on a virtual GPU, its zygote ready, the weights written and in the page cache."""
    source = ZygoteSource(pool_size=1)
    node = LocalNode(virtual_gpus=1, memory_bytes=GPU_MEMORY_BYTES, source=source)
    driver = Driver(node)
    await node.start(driver)
    try:
        source.prepare(sys.executable, FRAMEWORKS)
        while not source.ready(sys.executable):
            await asyncio.sleep(0.01)
        bench = Bench(folder, driver, source, rounds)
        await driver.load(bench.floors)
        for size in sorted(sizes, key=int):
            print(f"writing {size} MB", file=sys.stderr)
            await bench.floor("write", size)
            await driver.load(bench.encoder(size, TOUCH="1"))  # reads it
            await driver.unload(bench.encoder(size))
        yield bench
    finally:
        await node.stop()


async def measure(names: list[str], rounds: int, tell: Callable[[Row], None]) -> list[Row]:
    rows = []

    def take(found: Iterator[Row]) -> None:
        for row in found:
            rows.append(row)
            tell(row)

    sizes = {size for name in names for size in SIZES.get(name, ("100",))}
    with tempfile.TemporaryDirectory(prefix="hotset-transitions-") as folder:
        async with prepared(Path(folder), rounds, sizes) as bench:
            for name in names:
                for size in SIZES.get(name, ("",)):
                    if name != "miss":
                        print(f"measuring {name} {size}", file=sys.stderr)
                        take(await STEPS[name](bench, size))
        if "miss" in names:
            print("measuring a miss over HTTP", file=sys.stderr)
            take(miss(bench))
    return rows


def main() -> int:
    everything = [*STEPS, "miss"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", metavar="STEP,...", help=f"of: {', '.join(everything)}")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else everything
    if unknown := set(names) - set(everything):
        parser.error(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(everything)}")
    speed = machine_speed()
    if not options.json:
        print(f"this machine runs plain Python at {speed:.2f} of the reference's speed; medians\n")
    rows = uvloop.run(measure(names, options.rounds, (lambda _: None) if options.json else say))
    if options.json:
        print(msgspec.json.format(msgspec.json.encode({"machine_speed": speed, "rows": rows})).decode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
