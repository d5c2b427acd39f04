"""mmsegmentation 1.x: ``images/<split>``, ``annotations/<split>`` (PNGs of class ids) and a
configuration, ``dataset.py``."""

from functools import partial

from dd.exports.source import Source
from dd.exports.target import Target
from dd.taxonomy import IGNORE

CROP = 512  # pixels; a smaller crop for smaller images


def check(source: Source, link: bool) -> list[str]:
    return []


def write(source: Source, target: Target) -> None:
    for split in source.splits:
        for item in source.each(split):
            target.place(item.image, f"images/{split}/{item.id}{item.suffix}")
            target.place(item.mask, f"annotations/{split}/{item.id}.png")
            target.done(item)
    target.write("dataset.py", partial(_config, source))


def _config(source: Source) -> str:
    names = source.taxonomy.all_names
    colours = [source.colour(i) for i in range(len(names))]
    height = max(item.size[0] for item in source.items.values())
    width = max(item.size[1] for item in source.items.values())
    crop = min(height, CROP), min(width, CROP)
    train, val, test = source.main_splits()
    splits = "\n".join(
        f"    {_text(s)}: {_dataset(source, s, s not in (val, test))}," for s in source.splits
    )
    parts = [
        f"""# mmsegmentation 1.x reads this folder: a _base_ of a model with {len(names)} classes.
num_classes, ignore_index = {len(names)}, {IGNORE}
data_root = "{{{{ fileDirname }}}}"  # the folder of this file
metainfo = dict(
    classes={_text(tuple(names))},
    palette={colours},
)
train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomResize", scale=({width}, {height}), ratio_range=(0.5, 2.0), keep_ratio=True),
    dict(type="RandomCrop", crop_size={crop}, cat_max_ratio=0.75),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PhotoMetricDistortion"),
    dict(type="PackSegInputs"),
]
test_pipeline = [  # at the images' own size
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="PackSegInputs"),
]
splits = {{
{splits}
}}
"""
    ]
    if train:
        parts.append(_loader("train", train, 4, "InfiniteSampler", True))
    for kind, split in (("val", val), ("test", test or val)):
        if split:
            parts.append(_loader(kind, split, 1, "DefaultSampler", False))
            parts.append(
                f'{kind}_evaluator = dict(type="IoUMetric", iou_metrics=["mIoU"], '
                f"ignore_index={IGNORE})\n"
            )
    return "".join(parts)


def _dataset(source: Source, split: str, training: bool) -> str:
    """The text of a data set. mmsegmentation's class takes one suffix, so images of several
    suffixes become several joined data sets."""
    images, annotations = _text(f"images/{split}"), _text(f"annotations/{split}")
    one = [
        'dict(type="BaseSegDataset", data_root=data_root, metainfo=metainfo, '
        f'img_suffix={_text(suffix)}, seg_map_suffix=".png", '
        f"data_prefix=dict(img_path={images}, seg_map_path={annotations}), "
        f"ignore_index={IGNORE}, reduce_zero_label=False, "
        f"pipeline={'train' if training else 'test'}_pipeline)"
        for suffix in sorted({item.suffix for item in source.each(split)})
    ]
    return one[0] if len(one) == 1 else f'dict(type="ConcatDataset", datasets=[{", ".join(one)}])'


def _loader(kind: str, split: str, batch: int, sampler: str, shuffle: bool) -> str:
    return f"""{kind}_dataloader = dict(
    batch_size={batch},
    num_workers=4,
    persistent_workers=True,
    sampler=dict(type="{sampler}", shuffle={shuffle}),
    dataset=splits[{_text(split)}],
)
"""


def _text(value: object) -> str:
    """A Python literal without braces, which mmengine would read as its own variables."""
    return repr(value).replace("{", "\\x7b").replace("}", "\\x7d")
