"""The look of a site's photographs on synthetic images: colour statistics, or low frequencies. No label is read."""

from math import ceil, sqrt

import numpy as np
from PIL import Image

KINDS = ("color", "fourier")
SAMPLED = 1 << 20  # pixels of a photograph whose colours are looked at: every k-th row and column of a larger one
FLAT = 0.01  # a CIELAB channel whose standard deviation is smaller holds rounding errors alone

_WHITE = np.array([0.95047, 1.0, 1.08883])  # D65
_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])
_XYZ = _XYZ * (_WHITE / _XYZ.sum(1))[:, None]  # white is exactly white, so greys have a = b = 0
_LAB = np.array([[0.0, 116.0, 0.0], [500.0, -500.0, 0.0], [0.0, 200.0, -200.0]])  # rows: L + 16, a, b
_DELTA = 6 / 29
_BYTES = np.arange(256) / 255
_LINEAR = np.where(_BYTES <= 0.04045, _BYTES / 12.92, ((_BYTES + 0.055) / 1.055) ** 2.4)


def to_lab(image: np.ndarray) -> np.ndarray:
    """sRGB uint8 [..., 3] -> CIELAB float64 [..., 3] (D65): L 0..100, a and b about -110..100."""
    t = _LINEAR[image] @ (_XYZ / _WHITE[:, None]).T
    f = np.where(t > _DELTA**3, np.cbrt(t), t / (3 * _DELTA**2) + 4 / 29)
    return f @ _LAB.T - [16, 0, 0]


def from_lab(lab: np.ndarray) -> np.ndarray:
    """CIELAB [..., 3] -> sRGB uint8 [..., 3]; what sRGB cannot show is clipped in each channel."""
    f = (lab + [16, 0, 0]) @ np.linalg.inv(_LAB).T
    t = np.where(f > _DELTA, f**3, 3 * _DELTA**2 * (f - 4 / 29))
    linear = (t @ np.linalg.inv(_XYZ / _WHITE[:, None]).T).clip(0, 1)
    return _bytes(255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055))


def colour_transfer(image: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """``image`` with the mean and standard deviation of each CIELAB channel of ``photo`` (Reinhard et al. 2001, Color Transfer
    between Images; their space is another one). uint8 RGB [H, W, 3] both, of any sizes; a channel without variation is moved
    to the photograph's mean."""
    step = ceil(sqrt(photo.shape[0] * photo.shape[1] / SAMPLED))
    lab, wanted = to_lab(image), to_lab(photo[::step, ::step])
    mean, deviation = lab.mean((0, 1)), lab.std((0, 1))
    gain = np.where(deviation < FLAT, 0.0, wanted.std((0, 1)) / np.maximum(deviation, FLAT))
    return from_lab((lab - mean) * gain + wanted.mean((0, 1)))


def fourier_transfer(image: np.ndarray, photo: np.ndarray, bandwidth: float) -> np.ndarray:
    """``image`` with the low-frequency amplitudes of ``photo``, its own phase everywhere (Yang and Soatto 2020, FDA,
    arXiv:2004.05498). uint8 RGB [H, W, 3] both; the photograph is resized (bilinear) to the image's size first.

    Frequencies of at most floor(bandwidth * min(H, W)) periods an axis are taken, the mean colour among them.
    """
    height, width = image.shape[:2]
    photo = np.asarray(Image.fromarray(photo).resize((width, height), Image.Resampling.BILINEAR))
    own, other = (np.fft.rfft2(x.astype(np.float64), axes=(0, 1)) for x in (image, photo))
    half = int(bandwidth * min(height, width))
    rows = np.abs(np.fft.fftfreq(height, 1 / height)) <= half + 0.5
    inside = rows[:, None] & (np.arange(own.shape[1]) <= half)
    own[inside] = np.abs(other[inside]) * np.exp(1j * np.angle(own[inside]))
    return _bytes(np.fft.irfft2(own, (height, width), axes=(0, 1)))


def _bytes(values: np.ndarray) -> np.ndarray:
    return values.round().clip(0, 255).astype(np.uint8)


class Style:
    """``style(image, seed)``: an image uint8 RGB [H, W, 3] in the style of one of ``photos`` (indexable, uint8 RGB, with a
    ``fingerprint()``), or as it is. Both are drawn by ``seed`` alone; photographs are read anew each time.

    ``kind``: ``color`` or ``fourier``. ``share``: of the draws that are styled, above 0 and at most 1. ``bandwidth``: of
    :func:`fourier_transfer`, above 0 and at most 0.5. ValueError for other settings.
    """

    def __init__(self, photos, kind: str, share: float = 0.5, bandwidth: float | None = None):
        if kind not in KINDS:
            raise ValueError(f"style.kind={kind!r}; allowed: {', '.join(KINDS)}, and style=off for none")
        if not _within(share, 1):
            raise ValueError(f"style.share={share!r}: expected a number above 0 and at most 1 (style=off for none)")
        if kind == "fourier" and not _within(bandwidth, 0.5):
            raise ValueError(
                f"style.bandwidth={bandwidth!r}: expected a number above 0 and at most 0.5, the half-side of the square of "
                "exchanged frequencies as a share of the image's smaller side"
            )
        if kind != "fourier" and bandwidth is not None:
            raise ValueError(f"style.bandwidth={bandwidth!r} belongs to style=fourier, and has no effect on style={kind}")
        if not len(photos):
            raise ValueError("style: no photographs to take the style of")
        self.photos, self.kind, self.share, self.bandwidth = photos, kind, share, bandwidth

    def __call__(self, image: np.ndarray, seed: int) -> np.ndarray:
        rng = np.random.default_rng([seed, 7])
        styled, index = rng.random() < self.share, int(rng.integers(len(self.photos)))
        if not styled:
            return image
        if self.kind == "color":
            return colour_transfer(image, self.photos[index])
        return fourier_transfer(image, self.photos[index], self.bandwidth)

    def record(self) -> dict:
        """What a run records: settings, and which photographs."""
        settings = {"kind": self.kind, "share": self.share, "bandwidth": self.bandwidth}
        return {k: v for k, v in settings.items() if v is not None} | {"photographs": self.photos.fingerprint()}


def _within(value, largest: float) -> bool:
    return type(value) in (int, float) and 0 < value <= largest
