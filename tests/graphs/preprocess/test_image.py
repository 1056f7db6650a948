"""Pictures to pixels: equal to transformers' CLIP processor, and firm against hostile files."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from graphs.errors import UserError
from graphs.preprocess.image import MAX_PIXELS, ImageProcessor, load_image, read_processor

PUBLISHED: dict[str, Any] = {  # preprocessor_config.json of openai/clip-vit-large-patch14-336, which MobileVLM uses
    "crop_size": 336,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "feature_extractor_type": "CLIPFeatureExtractor",
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "resample": 3,
    "size": 336,
}


def scene(width: int, height: int) -> Image.Image:
    """Something like a photograph: smooth light, edges, and noise of the sensor."""
    generator = np.random.default_rng(width * 7919 + height)
    y, x = np.mgrid[0:height, 0:width]
    light = 128 + 90 * np.sin(x / 17.3)[..., None] * np.cos(y / 23.1)[..., None] * np.array([1.0, 0.7, 0.4])
    light[(x + 2 * y) % 61 < 9] = (250, 5, 128)
    return Image.fromarray(np.clip(light + generator.normal(0, 12, light.shape), 0, 255).astype(np.uint8))


def reference(config: dict[str, Any], image: Image.Image, **options: Any) -> np.ndarray:
    return np.asarray(CLIPImageProcessorPil(**config)(image, return_tensors="np", **options)["pixel_values"])


CONFIGS: dict[str, dict[str, Any]] = {
    "published": PUBLISHED,
    "dictionaries": {"size": {"shortest_edge": 50}, "crop_size": {"height": 48, "width": 40}},
    "exact size": {"size": {"height": 60, "width": 81}, "do_center_crop": False},
    "bilinear": {"size": 64, "crop_size": 64, "resample": 2},
    "crop larger than the picture": {"size": 31, "crop_size": {"height": 45, "width": 60}},
    "crop only": {"do_resize": False, "crop_size": 33},
    "odd crop": {"size": 48, "crop_size": 47},
}
SIZES = [(336, 336), (1, 1), (640, 427), (427, 640), (101, 99), (33, 257), (1023, 77), (337, 336), (48, 48), (7, 5)]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("size", SIZES)
def test_pixels_equal_the_clip_processor(config: str, size: tuple[int, int]) -> None:
    image = scene(*size)
    pixels = ImageProcessor.from_config(CONFIGS[config])(image)
    expected = reference(CONFIGS[config], image, do_rescale=False, do_normalize=False)
    assert pixels.dtype == np.uint8
    assert pixels.flags.c_contiguous
    assert np.array_equal(pixels, expected)


@pytest.mark.parametrize("photo", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("size", [None, (500, 333), (211, 340), (997, 601)])
def test_photographs_normalised_in_the_graph_equal_the_clip_processor(photo: str, size: tuple[int, int] | None) -> None:
    image = Image.fromarray(load_sample_image(photo))
    image = image.crop((0, 0, *size)).resize(size) if size else image
    processor = ImageProcessor.from_config(PUBLISHED)
    mean, std = (np.array(v, np.float32).reshape(1, 3, 1, 1) for v in (processor.image_mean, processor.image_std))
    ours = (processor(image).astype(np.float32) * np.float32(processor.rescale_factor) - mean) / std
    assert ours.shape == (1, 3, 336, 336)
    np.testing.assert_allclose(ours, reference(PUBLISHED, image), atol=2e-6)


@pytest.mark.parametrize("size", [(60, 40), (40, 61), (41, 60), (50, 50), (1, 97)])
def test_padding_to_a_square(size: tuple[int, int]) -> None:
    """LLaVA's rule, stated on arrays: the mean colour around, the odd pixel on the right or below."""
    image = scene(*size)
    side = max(size)
    square = np.empty((side, side, 3), np.uint8)
    square[:] = [int(mean * 255) for mean in PUBLISHED["image_mean"]]
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    square[top : top + size[1], left : left + size[0]] = np.asarray(image)
    pixels = ImageProcessor.from_config(PUBLISHED, aspect_ratio="pad")(image)
    expected = reference(PUBLISHED, Image.fromarray(square), do_rescale=False, do_normalize=False)
    assert np.array_equal(pixels, expected)
    assert tuple(square[0, 0]) == ((122, 116, 104) if size != (50, 50) else tuple(np.asarray(image)[0, 0]))


def test_defaults_are_those_of_the_clip_processor() -> None:
    default, clip = ImageProcessor.from_config({}), CLIPImageProcessorPil()
    assert default == ImageProcessor()
    assert default.shortest_edge == clip.size["shortest_edge"] == 224
    assert default.crop_size == (clip.crop_size["height"], clip.crop_size["width"])
    assert list(default.image_mean) == list(clip.image_mean)
    assert list(default.image_std) == list(clip.image_std)
    assert default.rescale_factor == pytest.approx(clip.rescale_factor)
    assert default.aspect_ratio == "crop"
    assert ImageProcessor.from_config({}, "square").aspect_ratio == "crop"


def test_steps_that_are_switched_off_reach_the_graph_as_identities() -> None:
    processor = ImageProcessor.from_config({**PUBLISHED, "do_normalize": False, "do_rescale": False}, "pad")
    assert processor.image_mean == (0.0, 0.0, 0.0)
    assert processor.image_std == (1.0, 1.0, 1.0)
    assert processor.rescale_factor == 1.0
    assert processor.background == (122, 116, 104)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        ({"size": -1}, "size is -1; it must be an integer from 1 to 8192"),
        ({"size": 10**9}, "size is 1000000000"),
        ({"size": {"longest_edge": 3}}, r"size has \['longest_edge'\]; it must have shortest_edge"),
        ({"size": {"shortest_edge": 0}}, "preprocessor_config.json: size: shortest_edge is 0"),
        ({"size": "big"}, "size is 'big'"),
        ({"crop_size": {"height": 5}}, "crop_size: width is absent"),
        ({"crop_size": True}, "crop_size is True"),
        ({"resample": 9}, "resample is 9; it must be an integer from 0 to 5"),
        ({"image_mean": [0.5, 0.5]}, "image_mean is .* a list of 3 numbers"),
        ({"image_std": [1, 0, 1]}, "image_std is .* numbers above 0"),
        ({"image_std": [1, -1, 1]}, "image_std is .* numbers above 0"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"do_resize": "yes"}, "do_resize is 'yes'; it must be true or false"),
        ({"do_convert_rgb": False}, "do_convert_rgb is false"),
    ],
)
def test_bad_configurations_name_the_key(config: dict[str, Any], cause: str) -> None:
    with pytest.raises(UserError, match=cause):
        ImageProcessor.from_config(config)


def test_an_unknown_aspect_ratio_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"image_aspect_ratio is 'padd'; did you mean 'pad'\?"):
        ImageProcessor.from_config({}, "padd")


@pytest.mark.parametrize("aspect_ratio", ["crop", "pad"])
def test_a_sliver_of_a_picture_does_not_grow_into_a_bomb(aspect_ratio: str) -> None:
    with pytest.raises(UserError, match=r"image of 1 x 300000 .* more than the 89478485 allowed"):
        ImageProcessor.from_config(PUBLISHED, aspect_ratio)(Image.new("RGB", (1, 300_000)))


# ---- files


def saved(path: Path, image: Image.Image, **options: Any) -> Path:
    image.save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "webp", "tiff", "gif", "ppm", "jpg"])
def test_common_formats_load(tmp_path: Path, suffix: str) -> None:
    best = {"lossless": True} if suffix == "webp" else {}
    image = load_image(saved(tmp_path / f"x.{suffix}", Image.new("RGB", (9, 5), (200, 40, 20)), **best))
    assert (image.mode, image.size) == ("RGB", (9, 5))
    assert np.abs(np.asarray(image).astype(int) - (200, 40, 20)).max() <= (2 if suffix == "jpg" else 0)


def test_other_modes_become_rgb(tmp_path: Path) -> None:
    grey = saved(tmp_path / "l.png", Image.new("L", (2, 2), 77))
    assert load_image(grey).getpixel((0, 0)) == (77, 77, 77)
    alpha = saved(tmp_path / "a.png", Image.new("RGBA", (2, 2), (1, 2, 3, 0)))
    assert load_image(alpha).getpixel((0, 0)) == (1, 2, 3)
    deep = Image.fromarray(np.array([[0, 256, 65535, 32768]], dtype=np.uint16))
    assert np.asarray(load_image(saved(tmp_path / "d.png", deep)))[0, :, 0].tolist() == [0, 1, 255, 128]
    with pytest.raises(UserError, match="no defined white"):
        load_image(saved(tmp_path / "f.tiff", Image.new("F", (2, 2), 0.5)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((4, 6, 3), np.uint8)
    upright[0, 0] = 255
    undo: dict[int, Callable[[np.ndarray], np.ndarray]] = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(undo[orientation](upright)))
    assert np.array_equal(np.asarray(load_image(saved(tmp_path / "x.png", stored, exif=exif))), upright)


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def jpeg(size: tuple[int, int] = (64, 48)) -> bytes:
    stream = io.BytesIO()
    scene(*size).save(stream, "JPEG")
    return stream.getvalue()


HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "text": (b"not an image at all", "not an image in a known format"),
    "script": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image in a known format"),
    "bomb": (png(9460, 9460), "decompression bomb"),
    "huge bomb": (png(60_000, 60_000), "decompression bomb"),
    "absurd": (png(2**31 - 1, 2**31 - 1), "decompression bomb"),
    "zero width": (png(0, 10), "x.png"),
    "zero size": (png(0, 0), "x.png"),
    "no rows": (png(32, 32), "corrupt image"),
    "half a png": (png(64, 64, bytes(range(193)) * 64)[:150], "corrupt image"),
    "half a jpeg": (jpeg()[:600], "x.png"),
    "jpeg without its end": (jpeg()[:-200], "corrupt image"),
    "png header only": (png(8, 8)[:20], "x.png"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_pictures_are_one_line_naming_the_file(tmp_path: Path, kind: str) -> None:
    content, cause = HOSTILE[kind]
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load_image(path)
    message = str(caught.value)
    assert cause in message
    assert str(path) in message
    assert "\n" not in message


def test_the_bound_is_on_pixels_before_decoding(tmp_path: Path) -> None:
    """A real picture just over the bound, all black: 90 million pixels in 300 kB, refused at once."""
    width = 10_000
    height = MAX_PIXELS // width + 1
    (tmp_path / "x.png").write_bytes(png(width, height, b"\0" * 1000))
    with pytest.raises(UserError, match=f"{width} x {height} pixels, more than the {MAX_PIXELS} allowed"):
        load_image(tmp_path / "x.png")


def test_missing_pictures(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such image"):
        load_image(tmp_path / "absent.jpg")
    with pytest.raises(UserError, match="not a file"):
        load_image(tmp_path)


def test_corruption_anywhere_is_an_image_or_one_line(tmp_path: Path) -> None:
    whole = bytearray(jpeg())
    generator = np.random.default_rng(0)
    path = tmp_path / "x.jpg"
    outcomes = set()
    for _ in range(200):
        damaged = bytearray(whole)
        for position in generator.integers(0, len(whole), 3):
            damaged[position] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            outcomes.add(load_image(path).mode)
        except UserError as error:
            outcomes.add("refused" if "\n" not in str(error) else str(error))
    assert outcomes == {"RGB", "refused"}


@pytest.mark.parametrize("name", ["SiglipImageProcessor", "SiglipImageProcessorFast"])
def test_absent_keys_are_the_defaults_of_the_class_named(name: str) -> None:
    processor = ImageProcessor.from_config({"image_processor_type": name})
    for width, height in SIZES:
        image = scene(width, height)
        expected = np.asarray(SiglipImageProcessorPil()(image, return_tensors="np")["pixel_values"])
        mean, std = (np.array(values).reshape(3, 1, 1) for values in (processor.image_mean, processor.image_std))
        assert np.abs((processor(image) / 255 - mean) / std - expected).max() <= 1e-6


def test_a_size_that_the_tower_does_not_take_is_refused() -> None:
    with pytest.raises(UserError, match=r"size is \(224, 224\); this tower takes pictures of 384 x 384"):
        read_processor({"image_processor_type": "SiglipImageProcessor"}, 384)
    assert read_processor({}, 384) is None
