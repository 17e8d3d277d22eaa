"""When does somebody speak in a recording? (Silero voice activity detection, TorchScript)."""

import io
import wave
from dataclasses import dataclass

import numpy as np
import torch
from silero_vad import get_speech_timestamps, load_silero_vad

import hotset


@dataclass
class Span:
    """A stretch of speech, in seconds from the start of the recording."""

    start_s: float
    end_s: float


@hotset.function(gpu_memory="16MiB", timeout="60s")
class DetectSpeech:
    """The stretches of speech in a WAV file (16 kHz, 16 bit, one channel)."""

    def load(self, device: str) -> None:
        self.device = device
        self.net = load_silero_vad().to(device)

    @torch.inference_mode()
    def predict(self, recording: bytes) -> list[Span]:
        with wave.open(io.BytesIO(recording)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
        audio = torch.from_numpy(samples / np.float32(32768)).to(self.device)
        spans = get_speech_timestamps(audio, self.net, return_seconds=True)
        return [Span(span["start"], span["end"]) for span in spans]
