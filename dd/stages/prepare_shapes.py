"""Stage: write the embedded world to disk as real data sets in PASCAL VOC layout."""

import json
from pathlib import Path

from dd.data.datasets import encode_image, encode_mask, write_split
from dd.embedded.scenes import DOMAINS, SIZE, scene
from dd.store.provenance import refuse_other, write_atomic, write_json

SIZES = {"train": 768, "tune": 128, "test": 512}


def prepare_shapes(
    data_root: str | Path = "data", sizes: dict[str, int] | None = None, seed: int = 0
) -> list[Path]:
    """``data_root/shapes`` and ``data_root/shapes_shift`` with splits train, tune and test; a
    finished folder is kept.

    FileExistsError if a folder there was made with another seed or other sizes.
    """
    sizes, folders = sizes or SIZES, []
    for domain in DOMAINS:
        root = Path(data_root) / domain
        folders.append(root)
        identity = {"domain": domain, "seed": seed, "sizes": sizes, "pixels": SIZE}
        refuse_other(root / "run.json", identity, "data set")
        if (root / "run.json").exists():
            continue
        captions = []
        for split, count in sizes.items():
            ids = [f"{split}_{i:05d}" for i in range(count)]
            for i, name in enumerate(ids):
                drawn = scene(domain, split, i, seed)
                for folder, data in (
                    ("JPEGImages", encode_image(drawn.image, ".png")),
                    ("SegmentationClass", encode_mask(drawn.mask)),
                ):
                    (root / folder).mkdir(parents=True, exist_ok=True)
                    (root / folder / f"{name}.png").write_bytes(data)
                captions.append({"id": name, "caption": drawn.caption, "classes": drawn.classes})
            write_split(root, split, ids)
        write_atomic(root / "captions.jsonl", "".join(json.dumps(c) + "\n" for c in captions))
        write_json(root / "run.json", {"identity": identity})
    return folders
