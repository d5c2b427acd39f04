"""One training step at 512 px and batch 2 of each segmenter in conf/, with random weights."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dd import config

FILES = sorted(p.stem for p in (Path(config.CONF) / "segmenter").glob("*.yaml"))


@pytest.mark.full
@pytest.mark.parametrize("file", FILES)
def test_one_training_step_at_full_size(file):
    node = config.plain(OmegaConf.load(Path(config.CONF) / f"segmenter/{file}.yaml"))
    torch.manual_seed(0)
    model = config.instantiate({**node, "pretrained": None}, num_classes=21)
    images = torch.randint(0, 256, (2, 3, 512, 512), dtype=torch.uint8)
    labels = torch.randint(0, 21, (2, 32, 32)).repeat_interleave(16, 1).repeat_interleave(16, 2)
    labels[:, :100] = 255
    optimizer = torch.optim.AdamW(model.parameter_groups(1e-4, 1e-4, 0.1))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    loss = model.loss(images, labels)["loss"]
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    optimizer.step()
    assert torch.isfinite(loss)
    learning = [p for p in model.parameters() if p.requires_grad]
    assert all(p.grad is not None and torch.isfinite(p).all() for p in learning)
    moved = {id(p) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert all(
        moved & {id(p) for p in group["params"]} for group in optimizer.param_groups
    )  # residual branches start at 0
