"""Images from what rows have: paths, bytes, PIL images, ``datasets.Image`` dicts, and URLs of hosts that the config allows."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from pgrpo.config import ConfigError
from pgrpo.config.task import ImageConfig

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)
MOST_REDIRECTS, MOST_SECONDS = 3, 30.0


@dataclass(frozen=True, slots=True)
class Source:
    """Where an image comes from.

    Attributes:
        content: the bytes of its file, the path of it, or the image.
        name: of the file, for messages.
        key: hash of the content.
    """

    content: Any
    name: str
    key: str


def check_pillow() -> None:
    """Raises ConfigError where Pillow is not installed."""
    try:
        import PIL  # noqa: F401
    except ImportError:
        raise ConfigError("images need Pillow: pip install -e '.[vision]'") from None


def find(value: Any, where: str, config: ImageConfig, folder: Path) -> Source:
    """The source of an image.

    Args:
        value: a path (absolute, below ``folder``, or below the current folder), a URL, bytes, a PIL image, or a mapping with
            ``bytes`` or ``path``, as ``datasets.Image`` has it without decoding.
        where: row and column, for errors.

    Raises:
        ConfigError: it is none of these, the file does not exist, or the URL's host is not allowed.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        inner = value.get("bytes") if value.get("bytes") is not None else value.get("path")
        if inner is None:
            raise ConfigError(f"{where}: an image is a path, bytes or a PIL image, not a dict of {', '.join(value)}")
        source = find(inner, where, config, folder)
        named = value.get("path") if isinstance(value.get("path"), str) else None
        return Source(source.content, named or source.name, source.key)
    if isinstance(value, Image.Image):
        name = f"a {value.mode} image"
        shown = open_image(Source(value, name, ""), where, config)  # equal indices with two palettes are two images
        return Source(value, name, hashlib.sha256(f"{shown.size}".encode() + shown.tobytes()).hexdigest())
    if isinstance(value, bytes | bytearray):
        return Source(bytes(value), "bytes", hashlib.sha256(value).hexdigest())
    if not isinstance(value, str | Path) or not str(value):
        raise ConfigError(f"{where}: an image is a path, a URL, bytes or a PIL image, not {value!r:.80}")
    text = str(value)
    if urlsplit(text).scheme in ("http", "https"):
        data = _fetch(text, where, config)
        return Source(data, text, hashlib.sha256(data).hexdigest())
    candidates = [Path(text).expanduser()] if Path(text).expanduser().is_absolute() else [folder / text, Path(text)]
    try:
        for path in candidates:
            if path.is_file():
                return Source(path, text, hashlib.sha256(path.read_bytes()).hexdigest())
    except (OSError, ValueError) as error:  # no permission, a name that is too long
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"{where}: {text!r:.80} cannot be read: {reason}; give a path, bytes or a PIL image"
        ) from error
    raise ConfigError(f"{where}: no file {text:.200}")


def open_image(source: Source, where: str, config: ImageConfig) -> Image:
    """The image in RGB, upright. Its size is checked before it is decoded. What is transparent lies on white.

    Raises:
        ConfigError: it cannot be read, is animated, of one pixel's width or height, or has more pixels than
            ``data.image.max_file_pixels``.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    said = f"{where}, {source.name}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the check below says it in our words
            content = BytesIO(source.content) if isinstance(source.content, bytes) else source.content
            image = content if isinstance(content, Image.Image) else Image.open(content)
            width, height = image.size
            if width * height > config.max_file_pixels:
                raise ConfigError(
                    f"{said}: {width} x {height} pixels are more than data.image.max_file_pixels={config.max_file_pixels}; "
                    "make the image smaller, or raise it"
                )
            if min(width, height) < 2:
                raise ConfigError(f"{said}: {width} x {height} pixels: an image has at least two each way")
            # An MPO file is a photograph, with a gain map or a preview behind it.
            if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
                raise ConfigError(f"{said}: it is animated ({image.n_frames} frames); give one frame")  # pyright: ignore[reportAttributeAccessIssue]
            image = ImageOps.exif_transpose(image)
            if image.mode.startswith("I;16"):  # Pillow would clip it to white
                image = image.point(lambda value: value / 256, "L")
            elif image.mode in ("I", "F"):
                raise ConfigError(f"{said}: mode {image.mode} has numbers without a largest one; save it with 8 bits")
            if image.has_transparency_data:
                image = image.convert("RGBA")
                white = Image.new("RGBA", image.size, "white")
                image = Image.alpha_composite(white, image)
            return image.convert("RGB")
    except Image.DecompressionBombError:
        limit = f"data.image.max_file_pixels={config.max_file_pixels}"
        if Image.MAX_IMAGE_PIXELS and config.max_file_pixels > (most := 2 * Image.MAX_IMAGE_PIXELS):
            limit = f"the {most:,} that Pillow reads"
        raise ConfigError(f"{said}: it has more pixels than {limit}; make the image smaller") from None
    except UnidentifiedImageError:
        raise ConfigError(f"{said}: this is no image that Pillow reads") from None
    except ConfigError:
        raise
    except Exception as error:  # of a broken file Pillow's readers raise almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConfigError(f"{said}: it cannot be read: {reason}") from error


def listed(value: Any) -> Sequence[Any]:
    """A column's value as a list of images: it may have one image, several, or none (null)."""
    if value is None:
        return []
    if hasattr(value, "tolist"):  # of numpy
        value = value.tolist()
    return value if isinstance(value, list | tuple) else [value]


def _fetch(url: str, where: str, config: ImageConfig) -> bytes:
    """The content of a URL whose host, and whose redirects' hosts, the config allows."""
    import httpx

    most = 4 * config.max_file_pixels
    for _ in range(MOST_REDIRECTS + 1):
        host = urlsplit(url).hostname
        if urlsplit(url).scheme not in ("http", "https") or host not in config.allowed_hosts:
            raise ConfigError(
                f"{where}: {url} is not read: add its host to data.image.allowed_hosts ({host}), or give files"
            )
        try:
            with httpx.stream("GET", url, timeout=MOST_SECONDS, follow_redirects=False) as response:
                if response.is_redirect:
                    url = urljoin(url, response.headers["location"])
                    continue
                response.raise_for_status()
                data = bytearray()
                for part in response.iter_bytes():
                    data += part
                    if len(data) > most:
                        raise ConfigError(f"{where}: {url} has more than {most} bytes; give a smaller file")
                return bytes(data)
        except httpx.HTTPError as error:
            raise ConfigError(f"{where}: {url} cannot be read: {error}") from error
    raise ConfigError(f"{where}: {url} redirects more than {MOST_REDIRECTS} times")
