"""Pictures to raw pixels: what a checkpoint's preprocessor_config.json says, up to and without normalisation.

Mean, standard deviation and rescaling are inside the traced `vision_encoder`, so a deployed app feeds raw pixels; they
are kept here for the graph to take. Resizing is Pillow's and cropping as in `CLIPImageProcessor` of transformers
(https://github.com/huggingface/transformers, its Pillow backend), to the last bit. Padding to a square is LLaVA's
(https://github.com/haotian-liu/LLaVA, `image_aspect_ratio: pad`), which MobileVLM uses.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from graphs.config import ConfigReader
from graphs.errors import UserError, nearest
from graphs.files import reason, shown
from graphs.preprocess.picture import Normalized

MAX_PIXELS = 89_478_485  # a quarter of a gibibyte of RGB, where Pillow too begins to suspect a decompression bomb
MAX_SIDE = 8192
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")  # not, say, EPS, which runs an interpreter

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

#: config.json's `image_aspect_ratio` -> what happens before resizing; LLaVA's absent or "square" means nothing does
ASPECT_RATIOS: Mapping[str | None, str] = {None: "crop", "square": "crop", "crop": "crop", "pad": "pad"}


#: `image_processor_type` -> keys that an image processor of transformers leaves out where they are its defaults
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "SiglipImageProcessor": {
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "BlipImageProcessor": {"size": {"height": 384, "width": 384}, "do_center_crop": False},
}


def load_image(path: Path | str) -> Image.Image:
    """The picture in a file: upright (EXIF orientation applied), mode RGB, its first frame where there are several.

    Raises: UserError where the file is missing, no picture, corrupt, of zero size, or of more than `MAX_PIXELS` pixels
    (seen in its header, before anything is decoded).
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: {'not a file' if path.exists() else 'no such image'}")
    if not path.stat().st_size:
        raise UserError(f"{path}: an empty file, not an image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's doubts about bombs and metadata; the bound here is firm
            with Image.open(path, formats=FORMATS) as image:
                _check_size(f"{path}", image.width, image.height)
                image.load()
                return _rgb(ImageOps.exif_transpose(image))
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"{path}: not an image in a known format ({', '.join(FORMATS)})") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: a decompression bomb: {reason(error)}") from error
    except Exception as error:  # decoders of hostile bytes raise anything: OSError, SyntaxError, struct.error, ...
        raise UserError(f"{path}: a corrupt image: {reason(error)}") from error


def _check_size(what: str, width: int, height: int) -> None:
    if width < 1 or height < 1:
        raise UserError(f"{what}: an image of zero size, {width} x {height}")
    if width * height > MAX_PIXELS:
        raise UserError(f"{what}: {width} x {height} pixels, more than the {MAX_PIXELS} allowed: a decompression bomb")


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow's own conversion would clip 16-bit samples at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in {"I", "F"}:
        raise ValueError(f"samples of 32 bits (mode {image.mode}) have no defined white; save it with 8 or 16 bits")
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageProcessor(Normalized):
    """How a picture becomes the pixels of one model.

    In turn: pad to a square (`aspect_ratio` "pad"), resize (`shortest_edge`, or else `height` and `width`), crop the
    centre. `crop_size`, `height` and `width` are pixels; None skips the step. `image_mean` and `image_std` apply to
    pixels times `rescale_factor`, inside the graph.
    """

    shortest_edge: int | None = 224
    height: int | None = None
    width: int | None = None
    crop_size: tuple[int, int] | None = (224, 224)  # height, width
    resample: int = Image.Resampling.BICUBIC
    image_mean: tuple[float, ...] = CLIP_MEAN
    image_std: tuple[float, ...] = CLIP_STD
    rescale_factor: float = 1 / 255
    aspect_ratio: str = "crop"
    background: tuple[int, int, int] = (122, 116, 104)  # around a padded picture: CLIP's mean, rounded down

    @classmethod
    def from_config(cls, config: Mapping[str, Any], aspect_ratio: str | None = None) -> ImageProcessor:
        """The processor that a preprocessor_config.json with the keys of CLIPImageProcessor describes.

        Absent keys have the defaults of the class that `image_processor_type` names, CLIP's for one that is not in
        `DEFAULTS`. `aspect_ratio` is config.json's `image_aspect_ratio`; `do_pad` says the same as its "pad".
        Raises: UserError naming the key that is wrong.
        """
        kind = str(config.get("image_processor_type") or config.get("feature_extractor_type") or "")
        kind = kind.removesuffix("Pil").removesuffix("Fast").replace("FeatureExtractor", "ImageProcessor")
        given = {key: value for key, value in config.items() if value is not None}
        reader = ConfigReader({**DEFAULTS.get(kind, {}), **given}, "preprocessor_config.json")
        if aspect_ratio not in ASPECT_RATIOS:
            known = [name for name in ASPECT_RATIOS if name]
            raise UserError(f"config.json: image_aspect_ratio is '{aspect_ratio}'; {nearest(str(aspect_ratio), known)}")
        if not reader.bool("do_convert_rgb", True):
            raise reader.error("do_convert_rgb is false; the pixels of every model here are RGB")
        edge, height, width = _resize_size(reader) if reader.bool("do_resize", True) else (None, None, None)
        mean = reader.floats("image_mean", CLIP_MEAN, length=3, low=-1e3, high=1e3)
        std = reader.floats("image_std", CLIP_STD, length=3, low=0.0, high=1e3)
        normalize = reader.bool("do_normalize", True)
        red, green, blue = (min(255, max(0, int(value * 255))) for value in mean)
        return cls(
            shortest_edge=edge,
            height=height,
            width=width,
            crop_size=_crop_size(reader) if reader.bool("do_center_crop", True) else None,
            resample=reader.int("resample", Image.Resampling.BICUBIC, low=0, high=5),
            image_mean=mean if normalize else (0.0, 0.0, 0.0),
            image_std=std if normalize else (1.0, 1.0, 1.0),
            rescale_factor=reader.float("rescale_factor", 1 / 255) if reader.bool("do_rescale", True) else 1.0,
            aspect_ratio="pad" if reader.bool("do_pad", False) else ASPECT_RATIOS[aspect_ratio],
            background=(red, green, blue),
        )

    def __call__(self, image: Image.Image) -> NDArray[np.uint8]:
        """Raw pixels, uint8 [1, 3, H, W] in RGB order.

        Raises: UserError for a picture so narrow that it would grow beyond `MAX_PIXELS` on the way.
        """
        image = image.convert("RGB")
        if self.aspect_ratio == "pad":
            image = self._pad(image)
        width, height = self._resized(*image.size)
        _check_size(f"an image of {image.width} x {image.height} resized for this model", width, height)
        if (width, height) != image.size:
            image = image.resize((width, height), resample=self.resample)
        if self.crop_size is not None:
            image = self._crop(image, *self.crop_size)
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1)[None])

    def _pad(self, image: Image.Image) -> Image.Image:
        side = max(image.size)
        if image.width == image.height:
            return image
        _check_size(f"an image of {image.width} x {image.height} padded to a square", side, side)
        square = Image.new("RGB", (side, side), self.background)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return square

    def _resized(self, width: int, height: int) -> tuple[int, int]:
        if self.shortest_edge is not None:
            short, long = sorted((width, height))
            long = int(self.shortest_edge * long / short)
            return (self.shortest_edge, long) if width <= height else (long, self.shortest_edge)
        if self.height is not None and self.width is not None:
            return self.width, self.height
        return width, height

    @staticmethod
    def _crop(image: Image.Image, height: int, width: int) -> Image.Image:
        """The centre; Pillow fills with black where the crop is larger than the picture, as CLIP's does."""
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return image.crop((left, top, left + width, top + height))


def read_processor(
    config: Mapping[str, Any] | None, side: int, aspect_ratio: str | None = None
) -> ImageProcessor | None:
    """The processor of a checkpoint whose tower takes squares of `side` pixels; None where there is no `config`.

    Raises: UserError as `ImageProcessor.from_config`, and where it makes pictures of another size.
    """
    if not config:
        return None
    processor = ImageProcessor.from_config(config, aspect_ratio)
    exact = (processor.height, processor.width)
    name, size = ("crop_size", processor.crop_size) if processor.crop_size else ("size", exact)
    if size not in ((None, None), (side, side)):
        raise UserError(f"preprocessor_config.json: {name} is {size}; this tower takes pictures of {side} x {side}")
    return processor


def _resize_size(reader: ConfigReader) -> tuple[int | None, int | None, int | None]:
    """`size` as (shortest_edge, height, width); CLIP reads a bare integer as the shortest edge."""
    if isinstance(reader.values.get("size", 224), int):
        return reader.int("size", 224, high=MAX_SIDE), None, None
    size = reader.section("size")
    if size.values.keys() == {"shortest_edge"}:
        return size.int("shortest_edge", high=MAX_SIDE), None, None
    if size.values.keys() == {"height", "width"}:
        return None, size.int("height", high=MAX_SIDE), size.int("width", high=MAX_SIDE)
    raise reader.error(f"size has {shown(sorted(size.values))}; it must have shortest_edge, or height and width")


def _crop_size(reader: ConfigReader) -> tuple[int, int]:
    if isinstance(reader.values.get("crop_size", 224), int):
        side = reader.int("crop_size", 224, high=MAX_SIDE)
        return side, side
    size = reader.section("crop_size")
    return size.int("height", high=MAX_SIDE), size.int("width", high=MAX_SIDE)


PROCESSOR = ImageProcessor
