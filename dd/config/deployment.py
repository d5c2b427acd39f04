"""The arguments of ``python -m dd deploy`` and ``page``: settings as key=value, a trained run,
pictures to check it on."""

from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

from dd import taxonomy as taxonomies
from dd.config.objects import trained_run
from dd.data.datasets import image_folders
from dd.data.photos import Gathered, source
from dd.taxonomy import BACKGROUND
from dd.training.segmentation import Predictor

CHECKED = 16  # number of pictures, evenly spread over the available ones


def key_values(arguments: list[str], allowed: dict[str, str | None]) -> dict[str, str | None]:
    """``key=value`` arguments over the defaults ``allowed``. ValueError for a missing run, and for
    an unknown key, with similar ones."""
    found = dict(allowed)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if key not in allowed or not equals:
            near = get_close_matches(key, allowed, 1)
            hint = f". Did you mean {near[0]!r}?" if near and key not in allowed else ""
            raise ValueError(f"{argument!r}: expected key=value; keys: {', '.join(allowed)}{hint}")
        found[key] = value
    if not found["run"]:
        raise ValueError(
            "run=... is missing: the folder of a finished training run, such as "
            "outputs/shapes/synthetic/seed=0"
        )
    return found


def loaded(chosen: dict[str, Any]) -> dict[str, Any]:
    """``run``, ``segmenter``, ``views``, ``names`` and ``palette`` of the chosen run."""
    if chosen["trusted"] not in ("true", "false"):
        raise ValueError(f"trusted={chosen['trusted']}; allowed: true, false")
    run, segmenter, views = trained_run(
        chosen["run"], chosen["trusted"] == "true", chosen["weights"]
    )
    palette = taxonomies.voc_palette()
    if chosen["taxonomy"]:
        taxonomy = taxonomies.taxonomy(chosen["taxonomy"])
        if list(taxonomy.names) != run["taxonomy"]["names"]:
            raise ValueError(
                f"taxonomy={chosen['taxonomy']} has the classes {list(taxonomy.names)}, the run "
                f"{run['taxonomy']['names']}"
            )
        palette = taxonomy.palette
    names = [BACKGROUND, *run["taxonomy"]["names"]]
    return {"run": run, "segmenter": segmenter, "views": views, "names": names, "palette": palette}


def deploy_arguments(chosen: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the stage deploy."""
    given = loaded(chosen)
    images, root = chosen["images"], chosen["data_root"]
    pictures = source(images, limit=CHECKED) if images else _own_images(root, given["run"])
    target = chosen["output"] or Path(chosen["run"]) / "segmenter.onnx"
    return {"target": target, **given, "pictures": pictures, "weights": chosen["weights"]}


def page_arguments(chosen: dict[str, Any]) -> tuple[dict[str, Any], int, dict[str, Any]]:
    """(arguments of the stage page except those from the run, the port, the run's run.json)."""
    if not chosen["port"].isdecimal() or int(chosen["port"]) > 65535:
        raise ValueError(f"port={chosen['port']}: expected a number from 0 (any free one) to 65535")
    given = loaded(chosen)
    where = "cuda" if torch.cuda.is_available() else "cpu"
    predictor = Predictor(given["run"], given["segmenter"], given["views"], where)
    how = {"predictor": predictor, "names": given["names"], "palette": given["palette"]}
    return how, int(chosen["port"]), given["run"]


def _own_images(data_root: str | Path, run: dict[str, Any]) -> Gathered:
    """Images that the run was trained on, if its data set is still there. Its own folder may hold
    only copies of turned images; the others are in the folders of its record."""
    trained_on = run["trained_on"]
    part = trained_on.get("synthetic", trained_on)
    root = Path(
        data_root, *(["synthetic"] if trained_on["source"] != "real" else []), str(part.get("root"))
    )
    places = [place for place in image_folders(root) if place.is_dir()]
    if places:
        return Gathered(places, limit=CHECKED)
    raise FileNotFoundError(
        f"the run's own images are not at {root / 'JPEGImages'}: say where data lie "
        "(data_root=...), or give a folder of some images to compare ONNX with PyTorch on "
        "(images=...)"
    )
