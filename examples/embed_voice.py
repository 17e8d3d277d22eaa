"""A voice as 256 numbers: two recordings of one speaker have nearly the same embedding (Resemblyzer's encoder)."""

import io
import wave
from importlib.metadata import distribution

import numpy as np
import torch
from torch.nn.functional import normalize, relu

import hotset

WINDOW = 160  # spectra, 10 ms apart: the encoder hears 1.6 s at a time, every 0.8 s


def mel_bands() -> torch.Tensor:
    """Weights (201 frequencies up to 8 kHz x 40 bands) of triangular bands on the mel scale of Slaney's toolbox."""
    mel = np.linspace(0, 15 + 27 * np.log(8) / np.log(6.4), 42)
    hz = np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
    bins = np.linspace(0, 8000, 201)[:, None]
    rising, falling = (bins - hz[:-2]) / np.diff(hz)[:-1], (hz[2:] - bins) / np.diff(hz)[1:]
    return torch.tensor(np.minimum(rising, falling).clip(min=0) * 2 / (hz[2:] - hz[:-2]), dtype=torch.float32)


@hotset.function(gpu_memory="16MiB", timeout="30s")
class EmbedVoice:
    """Speaker embedding of unit length of a WAV file (16 kHz, 16 bit, one channel, 1.6 s or more)."""

    def load(self, device: str) -> None:
        path = distribution("Resemblyzer").locate_file("resemblyzer/pretrained.pt")
        state = torch.load(str(path), map_location=device, weights_only=True)["model_state"]
        layers = {"lstm": torch.nn.LSTM(40, 256, 3, batch_first=True), "linear": torch.nn.Linear(256, 256)}
        self.net = torch.nn.ModuleDict(layers)
        self.net.load_state_dict({name: state[name] for name in self.net.state_dict()})
        self.net.eval().to(device)
        self.bands = mel_bands().to(device)

    @torch.inference_mode()
    def predict(self, recording: bytes) -> list[float]:
        with wave.open(io.BytesIO(recording)) as file:
            samples = np.frombuffer(file.readframes(file.getnframes()), dtype=np.int16)
        audio = torch.from_numpy(samples / np.float32(32768)).to(self.bands.device)
        window = torch.hann_window(400, device=audio.device)
        spectra = torch.stft(audio, 400, 160, window=window, pad_mode="constant", return_complex=True)
        mel = spectra.abs().square().T @ self.bands
        _, (hidden, _) = self.net["lstm"](mel.unfold(0, WINDOW, WINDOW // 2).transpose(1, 2))
        voices = normalize(relu(self.net["linear"](hidden[-1])))
        return normalize(voices.mean(dim=0), dim=0).tolist()
