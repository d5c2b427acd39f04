"""Which classes of a prompt the image shows, by what their words explain of it.

A text-to-image model predicts the noise of an image better with words that describe it (diffusion
classifiers: Li et al., ICCV 2023). Two numbers of each class are stored beside the heat, as maps of
one cell, [K, 1, 1, 1]:

- :data:`EVIDENCE`: how much larger the error is without the class than with all classes;
- :data:`ALONE`: how much larger it is without any text than with the class alone.

Both are shares of the error without text: 0.01 is one percent of it, below 0 the word misleads.
"""

import torch

EVIDENCE = "evidence"
ALONE = "evidence_alone"
NUMBERS = (EVIDENCE, ALONE)  # sources that hold a number of each class, and no map


def by_evidence(evidence_K: torch.Tensor, least: float = 0.0) -> torch.Tensor:
    """Whether each class is shown, bool [K]: its evidence is more than ``least``. The class with
    the most evidence always is, as an image without any would teach that it is all background."""
    shown = evidence_K > least
    shown[evidence_K.argmax()] = True
    return shown
