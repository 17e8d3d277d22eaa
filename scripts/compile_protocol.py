"""Compile the v2 protocol's .proto into the descriptors that the gateway reads at start.

Run it after a change of open_inference.proto; a test holds the two together.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import protoc

PROTOCOL = Path(__file__).resolve().parent.parent / "src" / "hotset" / "protocol"


def compile_protocol(target: Path) -> None:
    """Write the FileDescriptorSet of the .proto to ``target``."""
    arguments = ["protoc", f"-I{PROTOCOL}", f"--descriptor_set_out={target}", "open_inference.proto"]
    if protoc.main(arguments) != 0:
        sys.exit("protoc failed: see above")


if __name__ == "__main__":
    compile_protocol(PROTOCOL / "open_inference.binpb")
