"""Steps of our training against mmengine's Runner with mmsegmentation's own model, preprocessor
and schedule."""

from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader

from dd.segmenters.base import MEAN
from dd.segmenters.deeplabv3 import DeepLabV3
from dd.training.segmentation import Segmentation

# mmseg after the placeholder for compiled operations, which dd.segmenters installs
import mmseg  # isort: skip
from mmengine.config import Config  # isort: skip
from mmengine.dataset import pseudo_collate  # isort: skip
from mmengine.hooks import Hook  # isort: skip
from mmengine.optim import PolyLR  # isort: skip
from mmengine.runner import Runner  # isort: skip
from mmengine.structures import PixelData  # isort: skip
from mmseg.structures import SegDataSample  # isort: skip

CONFIG = (
    Path(mmseg.__file__).parent
    / ".mim/configs/deeplabv3/deeplabv3_r18-d8_4xb2-80k_cityscapes-512x1024.py"
)
CLASSES, SIDE, ITERATIONS = 4, 64, 20_000
NAMES = ["background", "a", "b", "c"]


def samples(number):
    """RGB images uint8 [3, h, w] and labels [h, w] with 255; every third image is smaller than
    the others."""
    generator = torch.Generator().manual_seed(7)
    for i in range(number):
        width = SIDE - 20 * (i % 3 == 2)
        label = torch.randint(0, CLASSES, (SIDE // 8, SIDE // 8), generator=generator)
        label = label.repeat_interleave(8, 0).repeat_interleave(8, 1)[:, :width].clone()
        label[10 * (i % 4) : 10 * (i % 4) + 15] = 255
        noise = torch.randint(0, 60, (3, SIDE, width), generator=generator)
        yield (
            (label.clamp(max=3) * torch.tensor([60, 30, 10])[:, None, None] + noise).to(
                torch.uint8
            ),
            label,
        )


class SeedHook(Hook):
    def before_train_iter(self, runner, batch_idx, data_batch=None):
        torch.manual_seed(batch_idx)  # dropout


class SeedAndStop(pl.Callback):
    def __init__(self, steps):
        self.steps = steps

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(batch_idx)

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step == self.steps


def theirs(folder, start, steps, clip):
    """Weights after ``steps`` iterations of mmengine's Runner, with the paper's optimiser in
    mmsegmentation's own words."""
    config = Config.fromfile(CONFIG)
    for part in ("backbone", "decode_head", "auxiliary_head"):
        config.model[part].norm_cfg.type = "BN"
    config.model.decode_head.num_classes = config.model.auxiliary_head.num_classes = CLASSES
    config.model.pretrained = None
    config.model.data_preprocessor.update(size=(SIDE, SIDE))
    torch.save(start, folder / "start.pth")
    data = [
        {
            "inputs": image.flip(0),
            "data_samples": SegDataSample(gt_sem_seg=PixelData(data=label[None])),
        }
        for image, label in samples(2 * steps)
    ]
    runner = Runner(
        config.model,
        work_dir=str(folder / "runner"),
        train_dataloader=DataLoader(data, batch_size=2, collate_fn=pseudo_collate),
        train_cfg={"type": "IterBasedTrainLoop", "max_iters": steps},
        optim_wrapper={
            "type": "OptimWrapper",
            "optimizer": {"type": "AdamW", "lr": 1e-4, "betas": (0.9, 0.999), "weight_decay": 1e-4},
            "paramwise_cfg": {"custom_keys": {"backbone": {"lr_mult": 0.1}}},
            "clip_grad": {"max_norm": clip, "norm_type": 2},
        },
        param_scheduler=[
            {
                "type": "PolyLR",
                "eta_min": 0,
                "power": 0.9,
                "begin": 0,
                "end": ITERATIONS,
                "by_epoch": False,
            }
        ],
        default_hooks={"checkpoint": None, "logger": None},
        custom_hooks=[SeedHook()],
        load_from=str(folder / "start.pth"),
        default_scope="mmseg",
        log_level="ERROR",
        experiment_name=f"parity{steps}_{clip}",
    )
    runner.train()
    return runner.model.state_dict()


def ours(model, make_trainer, folder, steps, clip, backbone_multiplier=0.1):
    def padded(image, label):  # as our training transform leaves them
        full, ids = (
            torch.tensor(MEAN).view(3, 1, 1).repeat(1, SIDE, SIDE),
            torch.full((SIDE, SIDE), 255),
        )
        full[:, :, : image.shape[2]], ids[:, : label.shape[1]] = image, label
        return full, ids

    task = Segmentation(
        model, NAMES, learning_rate=1e-4, weight_decay=1e-4, backbone_multiplier=backbone_multiplier
    )
    loader = DataLoader([padded(*sample) for sample in samples(2 * steps)], batch_size=2)
    trainer = make_trainer(folder, ITERATIONS, [SeedAndStop(steps)], gradient_clip_val=clip)
    trainer.fit(task, loader)
    assert trainer.global_step == steps
    return model.state_dict()


@pytest.mark.parametrize(("steps", "clip"), [(1, 0.01), (3, 0.01), (3, 100.0)])
def test_the_same_weights_as_mmsegmentations_runner(tmp_path, make_trainer, steps, clip):
    """Channel order, normalisation, padding, the mean over ignored pixels, the auxiliary weight,
    dropout, batch-norm statistics, rates of backbone and heads, clipping, decay and schedule: to
    1e-7, where one step moves weights by 1e-4."""
    torch.manual_seed(0)
    model = DeepLabV3(CLASSES, depth=18)
    start = {k: v.clone() for k, v in model.state_dict().items()}
    expected = theirs(tmp_path, start, steps, clip)
    found = ours(model, make_trainer, tmp_path, steps, clip)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        assert (value - expected[name]).abs().max() <= 1e-7 + 1e-6 * value.abs().max(), name
    moved = {
        name: float((found[name] - start[name]).abs().max())
        for name in ("decode_head.conv_seg.weight", "backbone.stem.0.weight")
    }
    assert moved["decode_head.conv_seg.weight"] == pytest.approx(steps * 1e-4, rel=0.3)
    assert 1e-7 < moved["backbone.stem.0.weight"] <= steps * 1.1e-5


def test_the_schedule_is_mmengines_with_one_interval_more(
    tmp_path, make_trainer, tiny_segmenter, toy_data
):
    """mmengine divides N iterations by N - 1, so that its last one has rate 0; here all N move
    the weights."""

    class Rates(pl.Callback):
        seen = []

        def on_train_batch_start(self, trainer, *_):
            self.seen.append(trainer.optimizers[0].param_groups[1]["lr"])

    make_trainer(tmp_path, 12, [Rates()]).fit(
        Segmentation(tiny_segmenter(), NAMES[:3]), datamodule=toy_data()
    )
    weight = torch.nn.Parameter(torch.zeros(1))
    for end, same in ((13, True), (12, False)):
        optimizer = torch.optim.SGD([weight], lr=1e-4)
        schedule, rates = PolyLR(optimizer, power=0.9, begin=0, end=end, by_epoch=False), []
        for _ in range(12):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.step()
        assert (Rates.seen == pytest.approx(rates, rel=1e-9)) is same
    assert rates[-1] == 0 and Rates.seen[-1] > 0
