import pytest
import torch
from transformers import Mask2FormerConfig, ResNetConfig
from transformers.models.mask2former.modeling_mask2former import Mask2FormerLoss

from dd.segmenters.mask_loss import (
    mask2former_loss,
    match,
    semantic_targets,
    targets_at,
    uncertain_points,
    weights_at,
)

CLASSES, QUERIES, POINTS = 5, 7, 300


def blocks(seed, size=(32, 40), ignored=False):
    """Labels [2, H, W] of square regions, some of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (2, size[0] // 8, size[1] // 8), generator=generator)
    labels = labels.repeat_interleave(8, 1).repeat_interleave(8, 2)
    if ignored:
        labels[:, 8:24, 8:32] = 255
    return labels


def predictions(seed, size=(32, 40)):
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randn(2, QUERIES, CLASSES + 1, generator=generator)
    return classes, 3 * torch.randn(2, QUERIES, size[0] // 4, size[1] // 4, generator=generator)


def test_targets_are_the_classes_that_an_image_has():
    labels = torch.tensor([[[0, 0, 3], [255, 3, 3]], [[255, 255, 255], [255, 255, 255]]])
    (classes, masks), (none, empty) = semantic_targets(labels)
    assert classes.tolist() == [0, 3]
    assert masks.tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 1, 1]]]
    assert len(none) == 0 and empty.shape == (0, 2, 3)


@pytest.mark.parametrize("seed", range(4))
def test_without_ignored_pixels_it_is_the_loss_of_transformers(seed):
    """Matching, point sampling, class weights, the three parts and their weights, several
    layers; the same numbers drawn."""
    resnet = ResNetConfig(out_features=["stage1", "stage2", "stage3", "stage4"])
    config = Mask2FormerConfig(backbone_config=resnet, num_labels=CLASSES, train_num_points=POINTS)
    weights = {
        "loss_cross_entropy": config.class_weight,
        "loss_mask": config.mask_weight,
        "loss_dice": config.dice_weight,
    }
    layers, labels = [predictions(10 * seed + i) for i in range(3)], blocks(seed)
    targets = semantic_targets(labels)
    torch.manual_seed(seed)
    reference = Mask2FormerLoss(config, weights)(
        layers[0][1],
        layers[0][0],
        mask_labels=[masks for _, masks in targets],
        class_labels=[classes for classes, _ in targets],
        auxiliary_predictions=[
            {"class_queries_logits": c, "masks_queries_logits": m} for c, m in layers[1:]
        ],
    )
    torch.manual_seed(seed)
    found = mask2former_loss(layers, labels, num_points=POINTS)
    for name, part in (
        ("class", "loss_cross_entropy"),
        ("mask", "loss_mask"),
        ("dice", "loss_dice"),
    ):
        expected = weights[part] * sum(
            value for key, value in reference.items() if key.startswith(part)
        )
        torch.testing.assert_close(found[f"decode.loss_{name}"], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found["loss"], sum(v for k, v in found.items() if k != "loss"))


def test_masks_under_ignored_pixels_have_no_gradient():
    """Neither from the loss nor through the matching; the cells beside the border are
    interpolated with their neighbours."""
    classes, masks = predictions(0)
    labels = blocks(0, ignored=True)
    found = []
    for hidden in (0.0, 1.0):
        other = masks.clone()
        other[:, :, 3:5, 3:7] += (
            100 * hidden
        )  # cells of 4 pixels, one cell inside the ignored region
        other.requires_grad_()
        torch.manual_seed(1)
        loss = mask2former_loss([(classes, other)], labels, num_points=POINTS)["loss"]
        loss.backward()
        assert (other.grad[:, :, 3:5, 3:7] == 0).all() and (other.grad != 0).any()
        found.append((loss.detach(), other.grad))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])


def test_targets_near_ignored_pixels_are_interpolated_among_the_labelled_ones():
    known = torch.ones(1, 32, 32)
    known[:, 5:30, 3:17] = known[:, ::3, 20:] = 0
    points = torch.rand(1, 2000, 2, generator=torch.Generator().manual_seed(0))
    column, row = (points[0] * 32).long().T
    weights = weights_at(known, points)
    assert torch.equal(weights[0], known[0, row, column])
    inside = ((points - 0.5).abs() < 0.48).all(2) & (
        weights > 0
    )  # beyond the outer half pixel, where nothing is outside
    everything, left = known.clone(), known * (torch.arange(32) < 18)
    torch.testing.assert_close(
        targets_at(everything, known, points)[inside], torch.ones(int(inside.sum()))
    )
    labelled = torch.ones_like(known)
    expected = targets_at(
        (torch.arange(32) < 18).float().expand(1, 32, 32), labelled, points
    )  # all columns there are whole
    edge = inside & (points[:, :, 0] * 32 > 17) & (points[:, :, 0] * 32 < 19)
    torch.testing.assert_close(targets_at(left, known, points)[edge], expected[edge])


def test_points_are_drawn_where_labels_are():
    known = torch.zeros(2, 16, 16)
    known[:, :, :6] = 1
    logits = torch.randn(2, 16, 16)
    points = uncertain_points(logits, known, 100)
    assert points.shape == (2, 100, 2)
    assert (points[:, :75, 0] < 6 / 16).all() and (points[:, 75:, 0] > 6 / 16).any()
    alone = uncertain_points(
        torch.linspace(-1, 1, 16).expand(1, 16, 16).clone(), torch.ones(1, 16, 16), 400
    )[0, :300]
    assert (
        alone[:, 0] - 0.5
    ).abs().mean() < 0.15  # the sign changes in the middle; at random it would be 0.25


def test_matching_takes_the_query_that_fits():
    labels = blocks(3)[:1]
    ((classes, masks),) = semantic_targets(labels)
    logits = torch.zeros(QUERIES, CLASSES + 1)
    shapes = -5.0 * torch.ones(QUERIES, *masks.shape[1:])
    order = torch.randperm(QUERIES, generator=torch.Generator().manual_seed(2))[: len(classes)]
    shapes[order] += 10 * masks
    queries, chosen = match(logits, shapes, classes, masks, POINTS)
    assert {(int(q), int(c)) for q, c in zip(queries, chosen, strict=True)} == {
        (int(q), i) for i, q in enumerate(order)
    }


def test_images_without_a_label_add_nothing():
    layers, labels = [predictions(0)], blocks(0, ignored=True)
    labels[1] = 255
    torch.manual_seed(0)
    both = mask2former_loss(layers, labels, num_points=POINTS)
    torch.manual_seed(0)
    first = mask2former_loss([(layers[0][0][:1], layers[0][1][:1])], labels[:1], num_points=POINTS)
    assert all(torch.equal(both[k], first[k]) for k in both)
    leaf = layers[0][0].clone().requires_grad_()
    nothing = mask2former_loss([(leaf, layers[0][1])], torch.full_like(labels, 255))
    nothing["loss"].backward()
    assert all(value.item() == 0 for value in nothing.values()) and (leaf.grad == 0).all()


def test_more_classes_than_queries():
    classes, masks = predictions(0)
    found = mask2former_loss([(classes[:, :2], masks[:, :2])], blocks(0), num_points=POINTS)
    assert torch.isfinite(found["loss"])
