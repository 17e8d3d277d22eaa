"""Does hotset do what it promises on this machine's NVIDIA GPU?

Each check runs real models in real GPU processes and is over within a minute. This process itself never opens a CUDA
context. Run it on an otherwise idle GPU: what others take and give back meanwhile cannot be told apart.

Exit code: 0 nothing failed, 1 something did, 2 there is no GPU (``--virtual`` runs what makes sense without one).
"""

from __future__ import annotations

import argparse
import asyncio
import faulthandler
import logging
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

import msgspec
import pynvml  # type: ignore[import-untyped]
import uvloop
from gpu_checks import contexts, copies, faults, memory, policies
from gpu_checks.record import Check, Findings, Outcome, Record, Unavailable
from gpu_checks.setup import LAYER_MIB, Setup
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from hotset.errors import NodeError
from hotset.node.devices.cuda import Nvml, cuda_devices

LIMIT_S = 60.0
STUCK_AFTER_S = 60.0
"""Beyond that a check is given up, and with it all."""
CHECKS: Mapping[str, Check] = {
    "device": memory.device,
    "memory figures": memory.figures,
    "residency": memory.residency,
    "allocator": memory.allocator,
    "growth": memory.growth,
    "swaps": memory.swaps,
    "parking": copies.parking,
    "tensors": copies.tensors,
    "bandwidth": copies.bandwidth,
    "staging": copies.staging,
    "overlap": copies.overlap,
    "out of memory": faults.out_of_memory,
    "sticky error": faults.sticky_error,
    "retry": policies.retried,
    "zygote": faults.zygote,
    "contexts": contexts.contexts,
    "isolation": faults.isolation,
    "locality": policies.locality,
    "onnx": memory.onnx,
}
_COLOURS = {Outcome.PASS: "green", Outcome.FAIL: "red", Outcome.SKIP: "yellow"}


async def run_check(name: str, check: Check, setup: Setup, limit_s: float = LIMIT_S) -> Record:
    """Its record, whatever happens in it."""
    found = Findings()
    begin_s = monotonic()
    try:
        async with asyncio.timeout(limit_s):
            await check(setup, found)
        outcome = Outcome.FAIL if found.problems else Outcome.PASS
        why = "; ".join(found.problems) or found.note
    except Unavailable as reason:
        outcome, why = Outcome.SKIP, str(reason)
    except TimeoutError as error:
        outcome, why = Outcome.FAIL, str(error) or f"took longer than {limit_s:g} s"
    except Exception as error:  # noqa: BLE001 - one check that breaks must not keep the others from running
        outcome, why = Outcome.FAIL, f"{type(error).__name__}: {error}"
    return Record(name=name, outcome=outcome, figures=found.figures, why=why, seconds=monotonic() - begin_s)


async def run_checks(names: Sequence[str], setup: Setup, progress: Console) -> list[Record]:
    records = []
    try:
        for name in names:
            # A driver that does not return from a call stops this process too; nobody is to wait for that for ever.
            faulthandler.dump_traceback_later(LIMIT_S + STUCK_AFTER_S, exit=True, file=sys.__stderr__)
            with progress.status(name):
                records.append(await run_check(name, CHECKS[name], setup))
            progress.print(f"{records[-1].outcome.value} {name} ({records[-1].seconds:.1f} s)", highlight=False)
    finally:
        faulthandler.cancel_dump_traceback_later()
        setup.close()
    return records


def table(records: Sequence[Record]) -> Table:
    """One row a check; figures one below the other."""
    grid = Table("check", "outcome", "figures", "why", show_lines=True)
    for record in records:
        figures = "\n".join(f"{name} {show(value)}" for name, value in record.figures.items())
        outcome = f"[{_COLOURS[record.outcome]}]{record.outcome.value}"
        grid.add_row(record.name, outcome, escape(figures), escape(record.why))
    return grid


def show(value: float | str) -> str:
    """Four digits of a number are enough to read; ``--json`` has them all."""
    return value if isinstance(value, str) else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Check hotset on this machine's NVIDIA GPU.")
    parser.add_argument("--virtual", action="store_true", help="run what makes sense without a GPU on virtual GPUs")
    parser.add_argument("--only", metavar="NAME,...", help=f"of: {', '.join(CHECKS)}")
    parser.add_argument("--model-mib", type=int, help="size of the models (256; on virtual GPUs 32)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args(arguments)
    options.names = list(CHECKS)
    if options.only is not None:
        wanted = [name.strip() for name in options.only.split(",")]
        options.names = [name for name in CHECKS if name in wanted]
        unknown = [name for name in wanted if name not in CHECKS]
        if unknown:
            parser.error(f"there is no check {', '.join(unknown)}; there are {', '.join(CHECKS)}")
    if options.model_mib is None:
        options.model_mib = 32 if options.virtual else 256
    if options.model_mib < LAYER_MIB:
        parser.error(f"--model-mib must be at least {LAYER_MIB}")
    return options


def main(arguments: Sequence[str] | None = None, *, nvml_library: Any = pynvml) -> int:
    options = parse(arguments)
    progress = Console(stderr=True)
    # Failures are what the checks are about; they say themselves which ones should not be there.
    logging.getLogger("hotset").addHandler(logging.NullHandler())
    if options.virtual:
        nvml_library = None
    else:
        try:
            nvml = Nvml(nvml_library)
            cuda_devices(nvml)
            nvml.close()
        except NodeError as error:
            progress.print(f"{error} (here: --virtual)", highlight=False, soft_wrap=True, markup=False)
            return 2
    with tempfile.TemporaryDirectory(prefix="hotset-gpu-check-") as folder:
        setup = Setup(Path(folder), nvml_library=nvml_library, model_mib=options.model_mib)
        records = uvloop.run(run_checks(options.names, setup, progress))
    if options.json:
        print(msgspec.json.format(msgspec.json.encode({"virtual": setup.virtual, "checks": records})).decode())
    else:
        Console(width=None if sys.stdout.isatty() else 120).print(table(records))
    counts = Counter(record.outcome for record in records)
    progress.print(", ".join(f"{counts[outcome]} {outcome.value}" for outcome in Outcome), highlight=False)
    return 1 if counts[Outcome.FAIL] else 0


if __name__ == "__main__":
    # Told to stop, it still ends what it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
