"""Latents of captioned scenes on disk: a window of scenes is drawn and encoded once, then several
trainings read it, each scene several times."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch.utils.data import Dataset

from dd.store.provenance import read_json, sha256, write_atomic, write_json
from dd.training.loaders import Draws

CHUNK = 500  # scenes of one file
BATCH = 20  # scenes that are encoded together; the bytes depend on it
DONE = "window.json"  # written last


@torch.no_grad()
def write_latents(
    folder: str | Path,
    vae: torch.nn.Module,
    scenes: Dataset,
    identity: dict[str, Any],
    backwards: bool = False,
    say: Callable[[str], object] = lambda line: None,
) -> Path:
    """Encode all of ``scenes``, (image [3, H, W] in [-1, 1], caption, class words) each, with
    ``vae``. Write their latents as float16 [N, C, h, w], scaled for training, with the texts, in
    files of :data:`CHUNK` scenes.

    Files are written whole or not at all, and existing ones are kept. On one kind of machine the
    bytes do not depend on interruptions. Two processes may share the work, one of them
    ``backwards``. ValueError for a folder with another ``identity``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    head = {**identity, "scenes": len(scenes), "chunk": CHUNK}
    if (folder / DONE).is_file():
        _check(folder, head)
        return folder
    starts = range(0, len(scenes), CHUNK)
    for start in reversed(starts) if backwards else starts:
        path = _path(folder, start // CHUNK)
        if path.is_file():
            _same(folder, _read(path)[1]["identity"], head)
            continue
        within = range(start, min(start + CHUNK, len(scenes)))
        latents, texts = [], []
        for at in range(0, len(within), BATCH):
            batch = [scenes[i] for i in within[at : at + BATCH]]
            mean = vae.encode(torch.stack([image for image, *_ in batch])).latent_dist.mean
            latents.append((mean * vae.config.scaling_factor).half())
            texts += [list(text) for _, *text in batch]
        about = json.dumps({"identity": head, "texts": texts})  # one entry: several have no order
        write_atomic(path, save({"latents": torch.cat(latents)}, {"about": about}))
        say(f"latents of scenes {start} to {within[-1]} of {len(scenes)}")
    files = [_path(folder, k) for k in range(len(starts))]
    write_json(folder / DONE, {**head, "sha256": {f.name: sha256(f) for f in files}})
    return folder


def _path(folder: Path, chunk: int) -> Path:
    return folder / f"{chunk:05d}.safetensors"


def _read(path: Path) -> tuple[torch.Tensor, dict[str, Any]]:
    with safe_open(path, "pt") as file:
        return file.get_tensor("latents"), json.loads(file.metadata()["about"])


def _same(folder: Path, there: dict[str, Any], wanted: dict[str, Any]) -> None:
    if other := [k for k in wanted if there.get(k) != wanted[k]]:
        told = ", ".join(f"{k}: {there.get(k)} -> {wanted[k]}" for k in other)
        raise ValueError(f"{folder} holds latents of another window or world ({told})")


def _check(folder: Path, wanted: dict[str, Any]) -> None:
    done = read_json(folder / DONE)
    _same(folder, done, wanted)
    for name, digest in done["sha256"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise ValueError(
                f"{folder / name} is missing or damaged. Remove it and {folder / DONE}: the same "
                "command makes it again"
            )


class CachedLatents(Dataset):
    """``length`` draws of a window of :func:`write_latents` as (latents float32 [C, h, w], caption,
    class words): repeated passes over all its scenes, each in an order of its own."""

    def __init__(self, length: int, folder: str | Path, seed: int = 0) -> None:
        self.length, self.seed = length, seed
        parts, self.texts = [], []
        for path in sorted(Path(folder).glob("*.safetensors")):
            latents, about = _read(path)
            parts.append(latents)
            self.texts += about["texts"]
        self.latents = torch.cat(parts)
        self._pass, self._order = -1, np.empty(0, int)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> tuple[torch.Tensor, str, str]:
        if not 0 <= index < self.length:
            raise IndexError(index)
        turn, at = divmod(index, len(self.latents))
        if turn != self._pass:
            order = np.random.default_rng([self.seed, turn]).permutation(len(self.latents))
            self._pass, self._order = turn, order
        scene = int(self._order[at])
        caption, words = self.texts[scene]
        return self.latents[scene].float(), caption, words


class CachedData(Draws):
    """Batches of :class:`CachedLatents`."""

    def __init__(self, batch_size: int, folder: str | Path, seed: int = 0) -> None:
        latents = partial(CachedLatents, folder=folder, seed=seed)
        super().__init__(latents, batch_size, num_workers=0, seed=seed)
