"""Masks of the Semantic Boundaries Dataset (Hariharan et al., ICCV 2011): MATLAB files with
VOC's class ids."""

from pathlib import Path

import numpy as np
from scipy.io import loadmat
from scipy.io.matlab import MatReadError

DAMAGED = (
    MatReadError,
    KeyError,
    ValueError,
    IndexError,
    TypeError,
    OSError,
    NotImplementedError,
)


def read_sbd_mask(path: str | Path) -> np.ndarray:
    """Class ids uint8 [H, W] of ``GTcls.Segmentation`` in ``cls/<id>.mat``; there is no 255.
    ValueError for another file."""
    try:
        return np.ascontiguousarray(loadmat(path)["GTcls"]["Segmentation"][0, 0].astype(np.uint8))
    except FileNotFoundError:
        raise
    except DAMAGED as error:
        raise ValueError(
            f"{path} is not an SBD class mask (a MATLAB file with GTcls.Segmentation): {error}"
        ) from None
