"""A GPU process without hotset and without a function: it starts in no time, and lies when it is told to.

It speaks the frames of ``hotset.node.frames`` by hand. ``LIE`` in its environment, hex, is what it sends in place of an
answer; with ``LEAVE`` it then exits.
"""

import os
import socket
import struct
import sys

HEADER = struct.Struct("<IBBHQ")
LOAD, CALL, BYE, LOADED, ANSWER, RAN = 1, 2, 5, 6, 7 + 1, 9
NO_MEMORY = b"\x81\xacmemory_bytes\x00"

channel = socket.socket(fileno=int(sys.argv[sys.argv.index("--socket") + 1]))
stream = channel.makefile("rb")
while header := stream.read(HEADER.size):
    length, kind, flags, _, request_id = HEADER.unpack(header)
    stream.read(length)
    if kind == BYE:
        os._exit(0)
    elif kind == LOAD:
        channel.sendall(HEADER.pack(len(NO_MEMORY), LOADED, 0, 0, 0) + NO_MEMORY)
    elif kind == CALL and "LIE" in os.environ:
        channel.sendall(bytes.fromhex(os.environ["LIE"]))
        if "LEAVE" in os.environ:
            os._exit(1)
    elif kind == CALL:
        answer = struct.pack("<dH", 0.001, 0) + b"ok"
        channel.sendall(HEADER.pack(len(answer), ANSWER, 1, 200, request_id) + answer)
        if flags & 1:
            channel.sendall(HEADER.pack(8, RAN, 0, 0, 0) + struct.pack("<d", 0.001))
