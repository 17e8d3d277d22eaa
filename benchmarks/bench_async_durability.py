"""1,000 asynchronous calls, the server killed with SIGKILL in the middle of them and started again: none may be lost.

python benchmarks/bench_async_durability.py [--calls 1000]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "openfaas"))

from kill_and_restart import kill_in_the_middle


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=1000)
    options = parser.parse_args()
    began_s = perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        outcome = kill_in_the_middle(Path(folder), options.calls, within_s=300.0)
    lost = outcome.accepted - set(outcome.called_back)
    twice = sum(count > 1 for count in outcome.called_back.values())
    print(
        f"{len(outcome.accepted)} accepted, {outcome.before_kill} called back when the server was killed, "
        f"{len(outcome.called_back)} in the end, {twice} of them more than once, {len(lost)} lost; "
        f"{perf_counter() - began_s:.1f} s"
    )
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
