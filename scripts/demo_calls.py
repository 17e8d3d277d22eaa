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
CATS = {"Egyptian Mau", "tabby cat"}
LINE = "Invoice No. 4711, total: 128.50 EUR"
HEADING = "Region-based segmentation"

Samples = np.ndarray[Any, np.dtype[np.int16]]

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
    """One request body. ``shown``: the input as a person would describe it; ``truth``: what a right answer says."""

    shown: str
    truth: str
    body: bytes
    content_type: str = "application/octet-stream"


@dataclass(frozen=True)
class Verdict:
    """The answers in words, one for each call, and whether all are right."""

    answers: list[str]
    right: bool


@dataclass(frozen=True)
class Showcase:
    """The calls of one example and the judgement of their answers (decoded JSON, in the order of ``calls``)."""

    name: str
    calls: Sequence[Call]
    judge: Callable[[list[Any]], Verdict]

    @property
    def file(self) -> Path:
        """The example's source."""
        return ROOT / "examples" / f"{self.name.replace('-', '_')}.py"


def showcases() -> list[Showcase]:
    """One per example, the most called first: the order is the rank in the load's Zipf distribution."""
    cat = _photo("chelsea.png", "photo of a cat", "a cat: Egyptian Mau, tabby cat")
    coffee = _photo("coffee.png", "photo of a cup of coffee", "espresso")
    motorcycle = _photo("motorcycle_left.png", "photo of a motorcycle", "moped, motor scooter")
    astronaut = _photo("astronaut.png", "portrait of an astronaut", "below 0.2: safe")
    return [
        Showcase("embed-text", _sentences(), _judge_sentences),
        Showcase("classify-image", [cat, coffee], lambda answers: _judge_labels(answers, [CATS, {"espresso"}])),
        Showcase("detect-pitch", [_note(440.0, "A4"), _note(261.63, "C4"), _note(110.0, "A2")], _judge_notes),
        Showcase("read-line", [_drawn_line(LINE), _scanned_line()], _judge_lines),
        Showcase("embed-text-int8", _sentences(), _judge_sentences),
        Showcase("embed-voice", _voices(), _judge_voices),
        Showcase(
            "classify-image-lite1",
            [cat, motorcycle],
            lambda answers: _judge_labels(answers, [CATS, {"moped", "motor scooter"}]),
        ),
        Showcase("score-nsfw", [astronaut], _judge_nsfw),
        Showcase("identify-file", _files(), _judge_files),
        Showcase("detect-speech", [_conversation()], _judge_speech),
        Showcase("forecast-series", [_passengers()], _judge_forecast),
        Showcase("detect-language", _languages(), _judge_languages),
    ]


def _json(shown: str, truth: str, value: Any) -> Call:
    return Call(shown, truth, json.dumps(value, ensure_ascii=False).encode(), "application/json")


def _packaged(package: str, path: str) -> bytes:
    """A file of an installed package, without importing the package."""
    return Path(str(distribution(package).locate_file(path))).read_bytes()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _wav(samples: Samples) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE_HZ)
        file.writeframes(samples.tobytes())
    return buffer.getvalue()


def _photo(name: str, shown: str, truth: str) -> Call:
    return Call(shown, truth, _packaged("scikit-image", f"skimage/data/{name}"), "image/png")


def _judge_labels(answers: list[Any], right: list[set[str]]) -> Verdict:
    best = [guesses[0] for guesses in answers]
    words = [f"{guess['label']} {guess['probability']:.2f}" for guess in best]
    return Verdict(words, all(guess["label"] in labels for guess, labels in zip(best, right, strict=True)))


def _judge_nsfw(answers: list[Any]) -> Verdict:
    return Verdict([f"{answers[0]:.3f}"], answers[0] < 0.2)


def _drawn_line(text: str) -> Call:
    image = Image.new("RGB", (20 * len(text), 48), "white")
    ImageDraw.Draw(image).text((10, 6), text, fill="black", font=ImageFont.load_default(32))
    return Call("drawn line of text", text, _png(image), "image/png")


def _scanned_line() -> Call:
    page = Image.open(io.BytesIO(_packaged("scikit-image", "skimage/data/page.png")))
    return Call("photographed page, its heading", HEADING, _png(page.crop((0, 0, 384, 30))), "image/png")


def _judge_lines(answers: list[Any]) -> Verdict:
    texts = [line["text"] for line in answers]
    return Verdict(texts, texts == [LINE, HEADING])


def _conversation_samples(start_s: float, end_s: float) -> Samples:
    """A piece of a real telephone conversation of two women, 30 s long."""
    with wave.open(io.BytesIO(_packaged("pyannote-audio", "pyannote/audio/sample/sample.wav"))) as file:
        file.setpos(round(start_s * RATE_HZ))
        return np.frombuffer(file.readframes(round((end_s - start_s) * RATE_HZ)), dtype=np.int16)


def _conversation() -> Call:
    truth = "as annotated: 6.7 to 7.1 s, then from 7.5 s on"
    return Call("telephone conversation, first 12 s", truth, _wav(_conversation_samples(0, 12)), "audio/wav")


def _judge_speech(answers: list[Any]) -> Verdict:
    spans = [(span["start_s"], span["end_s"]) for span in answers[0]]
    right = len(spans) == 2 and abs(spans[0][0] - 6.69) < 0.3 and abs(spans[1][0] - 7.55) < 0.3
    return Verdict([", ".join(f"{start} to {end} s" for start, end in spans)], right)


def _voices() -> list[Call]:
    """Turns of the conversation in which, by its annotation, only one of the two speaks."""
    turns = [
        (10.6, 14.4, "one woman"),
        (18.6, 21.4, "the same woman"),
        (14.7, 17.9, "another woman"),
        (22.0, 27.8, "that other woman"),
    ]
    return [
        Call(f"{end - start:.1f} s of the conversation", who, _wav(_conversation_samples(start, end)), "audio/wav")
        for start, end, who in turns
    ]


def _judge_voices(answers: list[Any]) -> Verdict:
    def to(i: int, j: int) -> float:
        return _similarity(answers[i], answers[j])

    same, other = min(to(1, 0), to(3, 2)), max(to(2, 0), to(2, 1), to(3, 0), to(3, 1))
    words = [
        f"{len(answers[0])} numbers",
        f"similarity to clip 1: {to(1, 0):.2f}",
        f"to clip 1: {to(2, 0):.2f}, to 2: {to(2, 1):.2f}",
        f"to clip 1: {to(3, 0):.2f}, to 2: {to(3, 1):.2f}, to 3: {to(3, 2):.2f}",
    ]
    return Verdict(words, same > other)


def _note(hz: float, name: str) -> Call:
    """One second of a plucked string: five harmonics that die away."""
    t = np.arange(RATE_HZ) / RATE_HZ
    sound = sum(np.sin(2 * np.pi * hz * k * t) / k for k in range(1, 6)) * np.exp(-1.5 * t)
    return Call(f"synthetic note of {hz:.1f} Hz", name, _wav((sound * 12_000).astype(np.int16)), "audio/wav")


def _judge_notes(answers: list[Any]) -> Verdict:
    words = [f"{pitch['note']} ({pitch['hz']} Hz)" for pitch in answers]
    return Verdict(words, [pitch["note"] for pitch in answers] == ["A4", "C4", "A2"])


def _sentences() -> list[Call]:
    return [
        _json("A man is eating food", "", {"text": "A man is eating food"}),
        _json("Someone is having a meal", "means the same: high", {"text": "Someone is having a meal"}),
        _json("The stock market fell", "means something else: near 0", {"text": "The stock market fell"}),
    ]


def _similarity(one: Sequence[float], other: Sequence[float]) -> float:
    return math.fsum(a * b for a, b in zip(one, other, strict=True))


def _judge_sentences(answers: list[Any]) -> Verdict:
    same, other = _similarity(answers[0], answers[1]), _similarity(answers[0], answers[2])
    words = [f"{len(answers[0])} numbers", f"similarity to the first: {same:.2f}", f"to the first: {other:.2f}"]
    return Verdict(words, same > 0.6 and other < 0.1)


def _files() -> list[Call]:
    return [
        Call("this demo's source", "python", Path(__file__).read_bytes()),
        Call("pyproject.toml", "toml", (ROOT / "pyproject.toml").read_bytes()),
        Call("the recording", "wav", _wav(_conversation_samples(0, 1))),
        Call("the photo of the cat", "png", _packaged("scikit-image", "skimage/data/chelsea.png")),
    ]


def _judge_files(answers: list[Any]) -> Verdict:
    labels = [kind["label"] for kind in answers]
    return Verdict(labels, labels == ["python", "toml", "wav", "png"])


def _passengers() -> Call:
    series = [month for year in PASSENGERS[:-1] for month in year]
    shown = "airline passengers a month, 1949 to 1959"
    return _json(shown, f"1960: {_months(PASSENGERS[-1])}", {"series": series, "horizon": 12})


def _months(values: Sequence[float]) -> str:
    return " ".join(f"{value:.0f}" for value in values)


def _judge_forecast(answers: list[Any]) -> Verdict:
    median, actual = answers[0]["median"], PASSENGERS[-1]
    error = math.fsum(abs(m / a - 1) for m, a in zip(median, actual, strict=True)) / len(actual)
    return Verdict([f"1960: {_months(median)} (off by {error:.0%})"], error < 0.1)


def _languages() -> list[Call]:
    texts = {
        "en": "The weather is lovely today.",
        "de": "Das Wetter ist heute schön.",
        "fr": "Il fait beau aujourd'hui.",
        "ja": "今日はいい天気です。",
        "ru": "Сегодня хорошая погода.",
    }
    return [_json(text, code, {"text": text}) for code, text in texts.items()]


def _judge_languages(answers: list[Any]) -> Verdict:
    codes = [language["code"] for language in answers]
    return Verdict(codes, codes == ["en", "de", "fr", "ja", "ru"])
