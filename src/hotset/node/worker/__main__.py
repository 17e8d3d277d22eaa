"""``python -m hotset.node.worker --socket FD --arena FD``: the process of one model, as the node starts it."""

from __future__ import annotations

import argparse

from hotset.node.worker.entry import become_worker


def main() -> None:
    parser = argparse.ArgumentParser(prog="hotset.node.worker", description="Started by a hotset node, not by hand.")
    parser.add_argument("--socket", type=int, required=True, help="descriptor of the stream socket to the node")
    parser.add_argument("--arena", type=int, required=True, help="descriptor of the shared-memory slots")
    parser.add_argument("--parent", type=int, required=True, help="process id of the node")
    arguments = parser.parse_args()
    become_worker(arguments.socket, arguments.arena, arguments.parent)


main()
