"""How does a series of numbers go on? With no training on it (Fracast, a tiny foundation model of time series)."""

from dataclasses import dataclass

import numpy as np
from fracast import FracastModel

import hotset


@dataclass
class Forecast:
    """For each step ahead: the middle value, and the bounds that 8 in 10 outcomes should lie between."""

    median: list[float]
    low: list[float]
    high: list[float]


@hotset.function(gpu_memory="8MiB", timeout="30s")
class ForecastSeries:
    """Continues an evenly spaced series, given oldest first, by ``horizon`` steps."""

    def load(self, device: str) -> None:
        self.net = FracastModel.from_pretrained(device=device)

    def predict(self, series: list[float], horizon: int = 12) -> Forecast:
        deciles = self.net.forecast(np.array(series, dtype=np.float32), horizon=horizon)  # horizon x 9
        return Forecast(deciles[:, 4].tolist(), deciles[:, 0].tolist(), deciles[:, 8].tolist())
