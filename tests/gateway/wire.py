"""A connection without a socket: what an event loop does for it, done by hand."""

from __future__ import annotations

from hotset.gateway.intake import Intake


class Wire:
    """A transport that keeps what is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.closed = False
        self.paused = False

    def write(self, data: bytes) -> None:
        assert not self.closed, "written after the end"
        self.sent += data

    def writelines(self, parts: list[bytes]) -> None:
        self.write(b"".join(parts))

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed

    def get_extra_info(self, name: str) -> None:
        return None

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def arrive(self, intake: Intake, data: bytes) -> bytes:
        """Bytes come in, in reads as large as is asked for, while it reads; what is left waits."""
        while data and not self.paused:
            buffer = intake.get_buffer(-1)
            count = min(len(buffer), len(data))
            buffer[:count] = data[:count]
            data = data[count:]
            intake.buffer_updated(count)
        return data


def parsed(text: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    found = []
    while text:
        head, _, text = text.partition(b"\r\n\r\n")
        status, *lines = head.decode().split("\r\n")
        headers = dict(line.split(": ", 1) for line in lines)
        assert len(headers) == len(lines), "a header twice"
        size = int(headers["content-length"])
        found.append((int(status.split()[1]), headers, text[:size]))
        text = text[size:]
    return found
