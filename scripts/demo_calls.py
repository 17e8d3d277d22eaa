"""What the demo asks of each example, and how a person, or a test, sees that the answer is right.

Inputs are real where a package ships one (photos, a telephone conversation with its transcript's times, a scanned page)
and made here where none does (musical notes, a drawn line of text); ``shown`` says which.
"""

from __future__ import annotations

import io
import json
import math
import wave
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
RATE_HZ = 16_000

PASSENGERS = [
    [112, 118, 132, 129, 121, 135, 148, 148, 136, 119, 104, 118],
    [115, 126, 141, 135, 125, 149, 170, 170, 158, 133, 114, 140],
    [145, 150, 178, 163, 172, 178, 199, 199, 184, 162, 146, 166],
    [171, 180, 193, 181, 183, 218, 230, 242, 209, 191, 172, 194],
    [196, 196, 236, 235, 229, 243, 264, 272, 237, 211, 180, 201],
    [204, 188, 235, 227, 234, 264, 302, 293, 259, 229, 203, 229],
    [242, 233, 267, 269, 270, 315, 364, 347, 312, 274, 237, 278],
    [284, 277, 317, 313, 318, 374, 413, 405, 355, 306, 271, 306],
    [315, 301, 356, 348, 355, 422, 465, 467, 404, 347, 305, 336],
    [340, 318, 362, 348, 363, 435, 491, 505, 404, 359, 310, 337],
    [360, 342, 406, 396, 420, 472, 548, 559, 463, 407, 362, 405],
    [417, 391, 419, 461, 472, 535, 622, 606, 508, 461, 390, 432],
]
"""Airline passengers, thousands a month, 1949 to 1960 (Box and Jenkins, series G)."""


@dataclass(frozen=True)
class Call:
    """One request body. ``shown``: the input as a person would describe it."""

    shown: str
    body: bytes
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class Verdict:
    """The answers in words, and whether they are right."""

    answer: str
    right: bool


@dataclass(frozen=True)
class Showcase:
    """The calls of one example and the judgement of their answers (decoded JSON, in the order of ``calls``)."""

    name: str
    calls: Sequence[Call]
    truth: str
    judge: Callable[[list[Any]], Verdict]

    @property
    def file(self) -> Path:
        """The example's source."""
        return ROOT / "examples" / f"{self.name.replace('-', '_')}.py"


def showcases() -> list[Showcase]:
    """One per example, the most called first: the order is the rank in the load's Zipf distribution."""
    return [
        Showcase("embed-text", _sentences(), "the first two mean the same, the third does not", _judge_sentences),
        Showcase(
            "classify-image",
            [_photo("chelsea.png", "photo of a cat"), _photo("coffee.png", "photo of a cup of espresso")],
            "Egyptian Mau (a breed of cat) or tabby cat; espresso",
            lambda answers: _judge_labels(answers, [{"Egyptian Mau", "tabby cat"}, {"espresso"}]),
        ),
        Showcase("detect-pitch", [_note(440.0), _note(261.63), _note(110.0)], "A4, C4, A2", _judge_notes),
        Showcase(
            "read-line",
            [_drawn_line("Invoice No. 4711, total: 128.50 EUR"), _scanned_line()],
            "the same text; Region-based segmentation",
            lambda answers: _judge_texts(answers, ["Invoice No. 4711, total: 128.50 EUR", "Region-based segmentation"]),
        ),
        Showcase("embed-text-int8", _sentences(), "as embed-text, within 0.02", _judge_sentences),
        Showcase("embed-voice", _voices(), "clips 1 and 2 are one woman, 3 and 4 another", _judge_voices),
        Showcase(
            "classify-image-lite1",
            [_photo("chelsea.png", "photo of a cat"), _photo("motorcycle_left.png", "photo of a motorcycle")],
            "Egyptian Mau (a breed of cat) or tabby cat; moped (ImageNet has no motorcycle)",
            lambda answers: _judge_labels(answers, [{"Egyptian Mau", "tabby cat"}, {"moped", "motor scooter"}]),
        ),
        Showcase("score-nsfw", [_photo("astronaut.png", "portrait of an astronaut")], "below 0.2 is safe", _judge_nsfw),
        Showcase("identify-file", _files(), "python, toml, wav, png", _judge_files),
        Showcase(
            "detect-speech",
            [_recording("telephone conversation, first 12 s", 0, 12)],
            "its annotation: silence up to 6.7 s, 'Hello?' to 7.1, then talk from 7.5 s on",
            _judge_speech,
        ),
        Showcase("forecast-series", [_passengers()], _months(PASSENGERS[-1]), _judge_forecast),
        Showcase("detect-language", _languages(), "en, de, fr, ja, ru", _judge_languages),
    ]


def _json(shown: str, value: Any) -> Call:
    return Call(shown, json.dumps(value, ensure_ascii=False).encode(), "application/json")


def _packaged(package: str, path: str) -> bytes:
    """A file of an installed package, without importing the package."""
    return Path(str(distribution(package).locate_file(path))).read_bytes()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _wav(samples: np.ndarray[Any, np.dtype[np.int16]]) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _photo(name: str, shown: str) -> Call:
    return Call(shown, _packaged("scikit-image", f"skimage/data/{name}"), "image/png")


def _drawn_line(text: str) -> Call:
    image = Image.new("RGB", (20 * len(text), 48), "white")
    ImageDraw.Draw(image).text((10, 6), text, fill="black", font=ImageFont.load_default(32))
    return Call(f"drawn: '{text}'", _png(image), "image/png")


def _scanned_line() -> Call:
    page = Image.open(io.BytesIO(_packaged("scikit-image", "skimage/data/page.png")))
    return Call("photo of a page's heading", _png(page.crop((0, 0, 384, 30))), "image/png")


def _recording(shown: str, start_s: float, end_s: float) -> Call:
    """A piece of a real telephone conversation of two women (16 kHz)."""
    with wave.open(io.BytesIO(_packaged("pyannote-audio", "pyannote/audio/sample/sample.wav"))) as file:
        file.setpos(round(start_s * RATE_HZ))
        samples = np.frombuffer(file.readframes(round((end_s - start_s) * RATE_HZ)), dtype=np.int16)
    return Call(shown, _wav(samples), "audio/wav")


def _note(hz: float) -> Call:
    """One second of a plucked string: five harmonics that die away."""
    t = np.arange(RATE_HZ) / RATE_HZ
    sound = sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 6)) * np.exp(-1.5 * t)
    return Call(f"synthetic note, {hz:.0f} Hz", _wav((sound * 12_000).astype(np.int16)), "audio/wav")


def _sentences() -> list[Call]:
    texts = ["A man is eating food", "Someone is having a meal", "The stock market fell"]
    return [_json(f"'{text}'", {"text": text}) for text in texts]


def _similarity(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _judge_sentences(answers: list[Any]) -> Verdict:
    same, other = _similarity(answers[0], answers[1]), _similarity(answers[0], answers[2])
    return Verdict(f"similarity of 1 and 2: {same:.2f}, of 1 and 3: {other:.2f}", same > 0.6 and other < 0.1)


def _voices() -> list[Call]:
    """Turns of the conversation's annotation that only one of the two speaks in."""
    turns = [(10.6, 14.4), (18.6, 21.4), (14.7, 17.9), (22.0, 27.8)]
    return [
        _recording(f"clip {i}: {end - start:.1f} s of telephone speech", start, end)
        for i, (start, end) in enumerate(turns, 1)
    ]


def _judge_voices(answers: list[Any]) -> Verdict:
    pairs = {(i, j): _similarity(answers[i], answers[j]) for i in range(4) for j in range(i)}
    same = min(pairs[1, 0], pairs[3, 2])
    other = max(value for pair, value in pairs.items() if pair not in ((1, 0), (3, 2)))
    return Verdict(f"similarity of one voice: {same:.2f} or more, of two: {other:.2f} or less", same > other)


def _judge_labels(answers: list[Any], right: list[set[str]]) -> Verdict:
    best = [guesses[0] for guesses in answers]
    words = "; ".join(f"{guess['label']} {guess['probability']:.2f}" for guess in best)
    return Verdict(words, all(guess["label"] in labels for guess, labels in zip(best, right, strict=True)))


def _judge_notes(answers: list[Any]) -> Verdict:
    words = ", ".join(f"{pitch['note']} ({pitch['hz']} Hz)" for pitch in answers)
    return Verdict(words, [pitch["note"] for pitch in answers] == ["A4", "C4", "A2"])


def _judge_texts(answers: list[Any], right: list[str]) -> Verdict:
    texts = [line["text"] for line in answers]
    return Verdict("; ".join(texts), texts == right)


def _judge_nsfw(answers: list[Any]) -> Verdict:
    return Verdict(f"{answers[0]:.3f}", answers[0] < 0.2)


def _files() -> list[Call]:
    demo, settings = ROOT / "scripts" / "demo.py", ROOT / "pyproject.toml"
    return [
        Call("this demo's source", demo.read_bytes()),
        Call("pyproject.toml", settings.read_bytes()),
        Call("the recording", _recording("", 0, 1).body),
        Call("the photo of a cat", _photo("chelsea.png", "").body),
    ]


def _judge_files(answers: list[Any]) -> Verdict:
    labels = [kind["label"] for kind in answers]
    return Verdict(", ".join(labels), labels == ["python", "toml", "wav", "png"])


def _judge_speech(answers: list[Any]) -> Verdict:
    spans = [(span["start_s"], span["end_s"]) for span in answers[0]]
    starts_right = len(spans) >= 2 and abs(spans[0][0] - 6.69) < 0.3 and abs(spans[1][0] - 7.55) < 0.3
    return Verdict(", ".join(f"{start} to {end} s" for start, end in spans), starts_right)


def _passengers() -> Call:
    series = [month for year in PASSENGERS[:-1] for month in year]
    return _json("airline passengers a month, 1949 to 1959, in thousands", {"series": series, "horizon": 12})


def _months(values: Sequence[float]) -> str:
    return "1960: " + " ".join(f"{value:.0f}" for value in values)


def _judge_forecast(answers: list[Any]) -> Verdict:
    median, actual = answers[0]["median"], PASSENGERS[-1]
    error = math.fsum(abs(m / a - 1) for m, a in zip(median, actual, strict=True)) / len(actual)
    return Verdict(f"{_months(median)} (mean error {error:.0%})", error < 0.1)


def _languages() -> list[Call]:
    texts = [
        "The weather is lovely today.",
        "Das Wetter ist heute schön.",
        "Il fait beau aujourd'hui.",
        "今日はいい天気です。",
        "Сегодня хорошая погода.",
    ]
    return [_json(f"'{text}'", {"text": text}) for text in texts]


def _judge_languages(answers: list[Any]) -> Verdict:
    codes = [language["code"] for language in answers]
    return Verdict(", ".join(codes), codes == ["en", "de", "fr", "ja", "ru"])
