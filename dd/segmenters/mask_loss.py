"""The loss of Mask2Former (Cheng et al., 2022, arXiv:2112.01527) for semantic masks with ignored
pixels.

Equal to transformers' Mask2FormerLoss if every pixel is labelled. An ignored pixel has no target:
points drawn on it have no weight, and near it targets are interpolated among labelled pixels only.

Shape letters: B images, Q queries, C classes, M masks (one for each class of an image), N matched
pairs, P points.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment

WEIGHTS = {"class": 2.0, "mask": 5.0, "dice": 5.0}  # of the parts, in the matching and in the loss
NO_OBJECT = 0.1  # weight of the class "no object"
OVERSAMPLE = 3.0  # candidates for each point
IMPORTANT = 0.75  # share of the points that are chosen for their uncertainty

Targets = Sequence[tuple[torch.Tensor, torch.Tensor]]  # for each image its classes and their masks


def semantic_targets(labels: torch.Tensor, ignore_index: int = 255) -> Targets:
    """Labels [B, H, W] -> for each image its classes [M] and their masks, float [M, H, W]; no
    image has an ignored class."""
    targets = []
    for label in labels:
        classes = label.unique()
        classes = classes[classes != ignore_index]
        targets.append((classes, (label == classes[:, None, None]).float()))
    return targets


def _sample(maps: torch.Tensor, points: torch.Tensor, **kwargs: Any) -> torch.Tensor:
    """Values [N, P] of maps [N, H, W] at points [N, P, 2], (x, y) in 0..1."""
    grid = 2 * points[:, :, None] - 1
    return F.grid_sample(maps[:, None], grid, align_corners=False, **kwargs)[:, 0, :, 0]


def weights_at(known: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """1 at points [N, P, 2] on a pixel with a label (known [N, H, W]), 0 on an ignored one."""
    return _sample(known, points, mode="nearest", padding_mode="border")


def targets_at(masks: torch.Tensor, known: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Targets [N, P]: masks interpolated among known pixels. Where all four neighbours are known,
    this is plain interpolation."""
    share, all_of_it = _sample(known, points), _sample(torch.ones_like(known), points)
    return _sample(masks, points) * all_of_it / share.clamp(min=1e-6)


def match(
    class_logits: torch.Tensor,
    mask_logits: torch.Tensor,
    classes: torch.Tensor,
    masks: torch.Tensor,
    num_points: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Hungarian matching of one image: class logits [Q, C+1], mask logits [Q, h, w], classes
    [M], masks [M, H, W] -> indices of the matched queries and of their masks."""
    points = torch.rand(1, num_points, 2, device=mask_logits.device)
    known = masks.sum(0, keepdim=True)
    weights = weights_at(known, points)
    logits = _sample(mask_logits, points.expand(len(mask_logits), -1, -1))
    wanted = targets_at(masks, known.expand_as(masks), points.expand(len(masks), -1, -1)) * weights
    unwanted, count = weights - wanted, weights.sum().clamp(min=1)
    cross_entropy = (F.softplus(-logits) @ wanted.T + F.softplus(logits) @ unwanted.T) / count
    probabilities = logits.sigmoid() * weights
    total = probabilities.sum(1)[:, None] + wanted.sum(1)[None]
    dice = 1 - (2 * probabilities @ wanted.T + 1) / (total + 1)
    likely = class_logits.softmax(1)[:, classes]
    cost = WEIGHTS["mask"] * cross_entropy + WEIGHTS["dice"] * dice - WEIGHTS["class"] * likely
    worst = torch.finfo(cost.dtype).max
    queries, chosen = linear_sum_assignment(
        torch.nan_to_num(cost, nan=worst, posinf=worst, neginf=worst).cpu().numpy()
    )
    return torch.as_tensor(queries, device=cost.device), torch.as_tensor(chosen, device=cost.device)


def uncertain_points(logits: torch.Tensor, known: torch.Tensor, num_points: int) -> torch.Tensor:
    """Points [N, P, 2] for mask logits [N, h, w]; three in four are where the sign is least
    certain, among known pixels [N, H, W]."""
    candidates = torch.rand(len(logits), int(num_points * OVERSAMPLE), 2, device=logits.device)
    certainty = _sample(logits, candidates).abs()
    certainty = certainty.masked_fill(weights_at(known, candidates) == 0, float("inf"))
    important = int(num_points * IMPORTANT)
    index = certainty.topk(important, dim=1, largest=False).indices
    chosen = candidates.gather(1, index[:, :, None].expand(-1, -1, 2))
    rest = torch.rand(len(logits), num_points - important, 2, device=logits.device)
    return torch.cat([chosen, rest], 1)


def layer_loss(
    class_logits: torch.Tensor, mask_logits: torch.Tensor, targets: Targets, num_points: int
) -> dict[str, torch.Tensor]:
    """Unweighted ``class``, ``mask`` and ``dice`` of one decoder layer: class logits [B, Q,
    C+1], mask logits [B, Q, h, w], targets of :func:`semantic_targets`, none of them empty."""
    no_object = class_logits.shape[2] - 1
    wanted_class = torch.full(class_logits.shape[:2], no_object, device=class_logits.device)
    matched = []  # mask logits, masks and known pixels of each image's pairs
    for i, (classes, image_masks) in enumerate(targets):
        queries, chosen = match(
            class_logits[i].detach(), mask_logits[i].detach(), classes, image_masks, num_points
        )
        wanted_class[i, queries] = classes[chosen]
        known = image_masks.sum(0).expand(len(chosen), -1, -1)
        matched.append((mask_logits[i][queries], image_masks[chosen], known))
    logits, masks, known = (torch.cat(parts) for parts in zip(*matched, strict=True))
    class_weights = torch.ones(no_object + 1, device=class_logits.device)
    class_weights[no_object] = NO_OBJECT
    with torch.no_grad():
        points = uncertain_points(logits, known, num_points)
        weights = weights_at(known, points)
        wanted = targets_at(masks, known, points) * weights
    at_points = _sample(logits, points)
    number = sum(len(classes) for classes, _ in targets)
    cross_entropy = F.binary_cross_entropy_with_logits(
        at_points, wanted, weights, reduction="none"
    ).sum(1)
    probabilities = at_points.sigmoid() * weights
    dice = 1 - (2 * (probabilities * wanted).sum(1) + 1) / (
        probabilities.sum(1) + wanted.sum(1) + 1
    )
    return {
        "class": F.cross_entropy(class_logits.transpose(1, 2), wanted_class, class_weights),
        "mask": (cross_entropy / weights.sum(1).clamp(min=1)).sum() / number,
        "dice": dice.sum() / number,
    }


def mask2former_loss(
    layers: Sequence[tuple[torch.Tensor, torch.Tensor]],
    labels: torch.Tensor,
    ignore_index: int = 255,
    num_points: int = 12544,
) -> dict[str, torch.Tensor]:
    """Sums over the decoder layers of the weighted parts, and ``loss``, the sum of all.

    ``layers``: (class logits [B, Q, C+1], mask logits [B, Q, h, w]), float32, the last layer first.
    Images without a labelled pixel add nothing to any part.
    """
    targets = semantic_targets(labels, ignore_index)
    kept = [i for i, (classes, _) in enumerate(targets) if len(classes)]
    # every parameter gets a gradient, even if no image is kept
    totals = {part: sum(c.sum() + m.sum() for c, m in layers) * 0 for part in WEIGHTS}
    for class_logits, mask_logits in layers if kept else ():
        found = layer_loss(
            class_logits[kept], mask_logits[kept], [targets[i] for i in kept], num_points
        )
        totals = {part: totals[part] + WEIGHTS[part] * found[part] for part in WEIGHTS}
    return {
        **{f"decode.loss_{part}": value for part, value in totals.items()},
        "loss": sum(totals.values()),
    }
