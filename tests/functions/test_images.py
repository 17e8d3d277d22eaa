"""Pictures: in as files or base64, out as PNG or JPEG; decompression bombs are refused."""

import base64
import io
import struct
import zlib

import pytest
from PIL import Image

import hotset
from hotset.functions.images import MAX_PIXELS, to_file
from hotset.functions.inspection import signature_of
from hotset.functions.runtime import Runtime


@hotset.function
def width(image: Image.Image, scale: int = 1) -> int:
    return image.width * scale


@hotset.function
def flip(image: Image.Image) -> Image.Image:
    return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


PICTURE = Image.new("RGB", (5, 3), "red")


def file_of(picture: Image.Image, file_format: str) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=file_format)
    return file.getvalue()


def bomb(width: int, height: int) -> bytes:
    """A PNG that claims to be large and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b""))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("content_type", ["image/png", "application/octet-stream", "application/x-www-form-urlencoded"])
def test_a_picture_file_is_a_body(file_format: str, content_type: str) -> None:
    body = memoryview(file_of(PICTURE, file_format))
    image, scale = signature_of(width).decode(body, content_type)
    assert (image.size, scale) == ((5, 3), 1)


def test_a_picture_in_json_is_base64() -> None:
    text = base64.b64encode(file_of(PICTURE, "PNG"))
    signature = signature_of(width)
    for content_type in ("application/json", ""):
        image, scale = signature.decode(b'{"image": "%s", "scale": 2}' % text, content_type)
        assert (image.size, scale) == ((5, 3), 2)
    assert signature_of(flip).decode(b'"%s"' % text)[0].size == (5, 3)


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"", "not a picture; send PNG, JPEG, WEBP, GIF, BMP"),
        (b"%PDF-1.7", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (file_of(PICTURE, "TIFF"), "not a picture"),
        (file_of(PICTURE, "PNG")[:-30], "the picture is damaged"),
        (bomb(8000, 8000), f"the picture has 8000 x 8000 pixels; send one of at most {MAX_PIXELS:,}"),
        (bomb(10_000, 10_000), "the picture has too many pixels"),
        (bomb(100_000, 100_000), "the picture has too many pixels"),
    ],
)
def test_what_is_no_fit_picture_is_refused(body: bytes, problem: str) -> None:
    with pytest.raises(hotset.InputError) as caught:
        signature_of(width).decode(body, "image/png")
    assert caught.value.field == "image"
    assert caught.value.problem.startswith(problem)


def test_a_broken_picture_in_json_names_the_field() -> None:
    with pytest.raises(hotset.InputError, match="image: not a picture"):
        signature_of(width).decode(b'{"image": "aGVsbG8="}')
    with pytest.raises(hotset.InputError, match="image: expected `bytes`, got `int`"):
        signature_of(width).decode(b'{"image": 3}')


def test_pictures_go_out_as_the_client_likes_them() -> None:
    runtime = Runtime(flip)
    runtime.load()
    body = file_of(PICTURE, "PNG")
    for accept, content_type in [
        ("*/*", "image/png"),
        ("image/*", "image/png"),
        ("image/jpeg", "image/jpeg"),
        ("image/webp, image/jpeg;q=0.5", "image/jpeg"),
    ]:
        outcome = runtime.call(body, "image/png", accept)
        assert (outcome.status, outcome.content_type) == (200, content_type)
        assert Image.open(io.BytesIO(outcome.body)).size == (5, 3)
    outcome = runtime.call(body, "image/png", "application/json")
    assert Image.open(io.BytesIO(base64.b64decode(outcome.body.strip(b'"')))).size == (5, 3)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "F", "I"])
@pytest.mark.parametrize("file_format", ["PNG", "JPEG"])
def test_a_picture_of_any_mode_can_be_written(mode: str, file_format: str) -> None:
    assert Image.open(io.BytesIO(to_file(Image.new(mode, (2, 2)), file_format))).size == (2, 2)


def test_the_schema_names_the_kinds() -> None:
    schema = signature_of(flip).schema()
    assert schema["accepts"] == ["application/json", "image/*"]
    assert schema["produces"] == ["image/png", "image/jpeg", "application/json"]
    assert schema["input"]["properties"]["image"]["contentEncoding"] == "base64"
