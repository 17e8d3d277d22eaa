"""What kind of file is this? Told from its content, not from its name (Magika)."""

from dataclasses import dataclass

from magika import Magika

import hotset


@dataclass
class FileType:
    """A content type, as in ``python`` and ``text/x-python``, and how sure the network is, 0 to 1."""

    label: str
    mime_type: str
    score: float


@hotset.function(gpu_memory="32MiB", timeout="30s")
class IdentifyFile:
    """The type of a file's content. The model runs on the CPU."""

    def load(self, device: str) -> None:
        self.magika = Magika()

    def predict(self, content: bytes) -> FileType:
        result = self.magika.identify_bytes(content)
        return FileType(str(result.output.label), result.output.mime_type, result.score)
