"""Pictures: the same pixels as transformers' loaders and processors give, and typed errors for all that is not one."""

import base64
import io
import os
import struct
import tracemalloc
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, features
from transformers import image_utils
from transformers.image_transforms import convert_to_rgb

from dyvte_engine import ImageError
from dyvte_engine.inputs import images
from dyvte_engine.inputs.images import load_image, load_video
from tests.families import zoo

RNG = np.random.default_rng(0)


def noise(mode: str, size=(12, 7)) -> Image.Image:
    if mode == "P":
        return noise("RGB", size).quantize(16)
    if mode == "1":
        return noise("L", size).convert("1")
    bands = len(Image.new(mode, (1, 1)).getbands())
    data = RNG.integers(0, 256, (size[1], size[0], bands), np.uint8)
    return Image.frombytes(mode, size, data.tobytes())


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    out = io.BytesIO()
    picture.save(out, kind, **options)
    return out.getvalue()


def as_processors_do(picture: Image.Image) -> np.ndarray:
    """White behind what is transparent, by the formula, in float64."""
    rgba = np.asarray(picture.convert("RGBA"), np.float64)
    alpha = rgba[..., 3:] / 255
    return rgba[..., :3] * alpha + 255 * (1 - alpha)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_opaque_modes(mode):
    picture = noise(mode)
    assert np.array_equal(load_image(picture), image_utils.load_image(picture))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_transparent_modes(mode):
    picture = noise(mode) if mode != "PA" else noise("P").convert("PA")
    got = np.asarray(load_image(picture), np.float64)
    assert np.abs(got - as_processors_do(picture)).max() <= 1
    assert np.array_equal(got, composited(picture))


@pytest.mark.parametrize("kind", ["P", "P bytes", "RGB", "L"])
def test_transparent_colours(kind):
    """A colour, or every entry of a palette, is transparent: without an alpha channel."""
    picture = noise(kind.split()[0])
    key = {"P": 3, "P bytes": bytes(range(0, 256, 16)), "RGB": picture.convert("RGB").getpixel((2, 3))}.get(kind, 7)
    picture = Image.open(io.BytesIO(encoded(picture, "PNG", transparency=key)))
    assert "transparency" in picture.info
    assert np.array_equal(load_image(picture), composited(picture))


def composited(picture: Image.Image) -> np.ndarray:
    try:
        return convert_to_rgb(picture, return_numpy=True)
    except TypeError:
        pytest.skip("this transformers' processors do not agree on what is behind transparency")


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientations(kind, orientation, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = tmp_path / "a.picture"
    file.write_bytes(encoded(noise("RGB", (24, 9)), kind, exif=exif))
    expected = image_utils.load_image(str(file))
    assert expected.size == ((9, 24) if orientation > 4 else (24, 9))
    url = f"data:image/x;base64,{base64.b64encode(file.read_bytes()).decode()}"
    for source in (file, str(file), Image.open(file), url):
        assert np.array_equal(load_image(source), expected)


@pytest.mark.parametrize("kind", [k for k in images.FORMATS if k != "WEBP" or features.check("webp")])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_formats(kind, mode, tmp_path):
    file = tmp_path / "picture"
    file.write_bytes(encoded(noise(mode), kind))
    assert np.array_equal(load_image(file), image_utils.load_image(str(file)))


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_processors_see_what_they_would_make_themselves(family):
    """A transparent picture, loaded here or given to the processor as it is."""
    picture, processor = noise("RGBA", (40, 40)), zoo.processor(family)
    composited(picture)
    text = [f"w1 {zoo.FAMILIES[family].mark} w2"]
    if not getattr(getattr(processor, "image_processor", None), "do_convert_rgb", False):
        pytest.skip("it takes RGB only")
    ours, theirs = (processor(text=text, images=[[p]], return_tensors="pt") for p in (load_image(picture), picture))
    assert torch.equal(ours["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("mode", ["I;16", "I", "F"])
def test_more_than_8_bits_are_refused(mode, tmp_path):
    array = np.arange(64).reshape(8, 8) * 1000
    picture = Image.fromarray(array.astype({"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]))
    assert picture.mode == mode
    with pytest.raises(ImageError, match=f"mode {mode}; accepted: 8 bits"):
        load_image(picture)
    if mode == "I;16":
        picture.save(tmp_path / "deep.png")
        with pytest.raises(ImageError, match="8 bits"):
            load_image(tmp_path / "deep.png")


def png(width: int, height: int, rows: bytes) -> bytes:
    """A 1-bit picture from its header alone."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")


def peak(call) -> int:
    """Bytes that Python and numpy hold at most."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_thin_pictures(tmp_path):
    for width, height, taken in [(1, 100_000, False), (201, 1, False), (200, 1, True), (3, 600, True)]:
        file = tmp_path / f"{width}.png"
        file.write_bytes(png(width, height, bytes((1 + -(-width // 8)) * height)))
        if taken:
            assert load_image(file).size == (width, height)
        else:
            with pytest.raises(ImageError, match=f"{width} x {height}; accepted: sides of 1 to 200"):
                load_image(file)


def test_what_a_processor_would_blow_up():
    padding = SimpleNamespace(size={"shortest_edge": 336}, do_pad=True, pad_to_square=None)
    scaling = SimpleNamespace(size={"shortest_edge": 1024})
    areas = SimpleNamespace(size={"shortest_edge": 10**6, "longest_edge": 10**7})
    for processor, size, made in [
        (padding, (10_001, 51), 10_001**2),
        (scaling, (19_200, 100), 1024 * 1024 * 192),
        (padding, (10_000, 50), 0),
        (scaling, (900, 10), 0),
        (areas, (20_000, 100), 0),
        (object(), (20_000, 100), 0),
        (None, (20_000, 100), 0),
    ]:
        if made:
            with pytest.raises(ImageError, match=f"becomes {made:,} pixels"):
                images.check_processed([Image.new("1", size)], processor)
        else:
            images.check_processed([Image.new("1", size)], processor)


def test_long_videos_are_refused_undecoded(tmp_path):
    frames = [Image.new("1", (2000, 2000), i % 2) for i in range(63)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    (tmp_path / "folder").mkdir()
    for i in range(63):
        (tmp_path / "folder" / f"{i:03}.png").write_bytes(png(2000, 2000, bytes(251 * 2000)))

    def refuse(source):
        with pytest.raises(ImageError, match=r"pixels or more; accepted: 250,000,000 in all frames"):
            load_video(source)

    del frames
    assert peak(lambda: refuse(tmp_path / "a.gif")) < 8e6
    assert peak(lambda: refuse(tmp_path / "a.png")) < 8e6
    refuse(tmp_path / "folder")
    refuse(np.broadcast_to(np.zeros((1, 1, 1, 3), np.uint8), (70, 2000, 2000, 3)))
    refuse([Image.new("1", (2000, 2000))] * 63)
    with pytest.raises(ImageError, match=r"frame 0 of clips is 1 x 300; accepted: sides"):
        load_video([Image.new("RGB", (1, 300))] * 2, "clips")


def test_videos_of_many_frames(tmp_path):
    frame = b"," + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02D\x01\0"
    header = b"GIF89a" + struct.pack("<HHBBB", 1, 1, 0x80, 0, 0) + bytes(6)
    file = tmp_path / "a.gif"
    for count in (3, 10_001):
        file.write_bytes(header + count * frame + b";")
        if count == 3:
            assert load_video(file).shape == (3, 1, 1, 3)
        else:
            with pytest.raises(ImageError, match="video has 10,001 frames or more; accepted: 10,000"):
                load_video(file)


def test_files_that_are_no_pictures(tmp_path):
    whole = encoded(noise("RGB", (64, 64)), "PNG")
    jpeg = encoded(noise("RGB", (64, 64)), "JPEG")
    cases = {
        "empty": b"",
        "text": b"no picture",
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
        "psd": b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 10, 10, 8, 3) + bytes(40),
        "ppm": b"P6 2 2 255\n" + bytes(12),
        "short png": whole[: len(whole) // 2],
        "header only": whole[:33],
        "broken crc": whole[:40] + b"\xff" + whole[41:],
        "short jpeg": jpeg[: len(jpeg) // 2],
        "short gif": encoded(noise("P"), "GIF")[:20],
        "short tiff": encoded(noise("RGB"), "TIFF")[:60],
        "short bmp": encoded(noise("RGB"), "BMP")[:40],
        "short webp": encoded(noise("RGB"), "WEBP")[:30],
        "bomb": png(60_000, 60_000, b""),
        "no width": png(0, 10, b""),
    }
    for name, data in cases.items():
        file = tmp_path / name
        file.write_bytes(data)
        for load in (load_image, load_video):
            with pytest.raises(ImageError, match=r"^images\[3\]|of images\[3\]"):
                load(file, "images[3]")
    with pytest.raises(ImageError, match=r"60000 x 60000|too large"):
        load_image(tmp_path / "bomb")


@pytest.mark.filterwarnings("ignore")  # PIL's, of what it does not understand
def test_damage_anywhere_is_typed(tmp_path):
    """Random bytes in the middle of files of every format: a picture or an ImageError, nothing else."""
    file, refused = tmp_path / "damaged", 0
    exif = Image.Exif()
    exif[0x0112] = 6
    for kind in images.FORMATS:
        whole = encoded(noise("RGB", (20, 20)), kind, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP") else {}))
        for _ in range(60):
            damaged = bytearray(whole)
            for place in RNG.integers(0, min(len(whole), 200), 4):
                damaged[place] = RNG.integers(256)
            file.write_bytes(damaged)
            for load in (load_image, load_video):
                try:
                    load(file)
                except ImageError:
                    refused += 1
    assert refused > 100


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    secret = base64.b64encode(encoded(noise("RGB"), "PNG")).decode()
    for source, words in [
        (tmp_path / "fifo", "is no regular file"),
        ("/dev/zero", "is no regular file"),
        (tmp_path, "is no regular file"),
        (tmp_path / "none.png", "image file not found"),
        ("", "image file not found"),
        ("a\0b.png", r"not found: 'a\\x00b.png'"),
        ("x" * 5000, "a string of 5,000 characters that names no file"),
        (secret, "characters that names no file"),
        (secret[:60], "characters that names no file"),
        ("/data/" + "0123456789abcdef" * 3 + ".png", "not found: /data/0123456789abcdef"),
        ("https://example.com/a.png", "a https: URL of 25 characters; nothing is fetched"),
        ("file:///a.png", "a file: URL"),
        (f"data:text/plain;base64,{secret}", "a data: URL"),
        (f"data:image/png;base64,{secret}*", "no base64"),
        (f"data:image/png;base64,{secret[:40]}", r"it is not a readable picture|cannot be decoded"),
        (b"a.png", "it is not a readable picture; accepted: PNG"),
        (bytearray(b"a.png"), "is a bytearray; accepted: a path or a PIL image"),
        (np.zeros((4, 4, 3), np.uint8), "is a ndarray; accepted"),
        (torch.zeros(3, 4, 4), "is a Tensor; accepted"),
        (None, "is a NoneType"),
        (Image.new("RGB", (0, 4)), "0 x 4; accepted: 1 to 100,000,000 pixels"),
    ]:
        with pytest.raises(ImageError, match=words) as raised:
            load_image(source, "images[0]")
        assert "images[0]" in str(raised.value) and len(str(raised.value)) < 600
        assert secret[:30] not in str(raised.value)


def test_data_urls(monkeypatch):
    picture = noise("RGB")
    text = base64.encodebytes(encoded(picture, "PNG")).decode()  # with line ends
    url = f"data:image/png;base64,{text}"
    assert np.array_equal(load_image(url), picture)
    frames = [noise("RGB") for _ in range(3)]
    data = base64.b64encode(encoded(frames[0], "PNG", save_all=True, append_images=frames[1:])).decode()
    assert np.array_equal(load_video(f"data:image/apng;base64,{data}"), np.stack(frames))
    monkeypatch.setattr(images, "MAX_DATA_URL", 100)
    with pytest.raises(ImageError, match=rf"data: URL of {len(url):,} characters; accepted: 100$"):
        load_image(url)
