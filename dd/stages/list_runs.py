"""Stage: the training runs below a folder, one line each."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from dd.store.commands import spelled
from dd.store.provenance import SETTINGS, read_json


def list_runs(root: str | Path) -> list[dict[str, Any]]:
    """[{"run", "trained_on", "steps", "supervision", "scores": {data/split: mIoU}, "unfinished":
    why or None}] of every folder below ``root`` in which a training has begun, by name.
    FileNotFoundError if ``root`` is not a folder."""
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(
            f"no folder {root}; give the folder that holds runs, such as outputs"
        )
    folders = {p.parent for name in ("run.json", SETTINGS) for p in root.rglob(name)}
    return [found for folder in sorted(folders) if (found := _entry(root, folder))]


def _entry(root: Path, folder: Path) -> dict[str, Any] | None:
    """None for a folder of another kind."""
    scores: dict[str, float] = {}
    name = folder.relative_to(root).as_posix()
    entry: dict[str, Any] = {"run": name, "trained_on": "", "steps": None, "supervision": ""}
    entry["scores"] = scores
    try:
        finished = (folder / "run.json").is_file()
        run = read_json(folder / ("run.json" if finished else SETTINGS))
        trained_on = run["trained_on"] if finished else run["identity"]["trained_on"]
        entry["trained_on"] = " + ".join(
            p for p in (trained_on["source"], trained_on.get("root")) if p
        )
        if not finished:
            return {**entry, "unfinished": "stopped before its end"}
        entry |= {"steps": run["steps"], "supervision": run["supervision"]}
        for path in sorted(folder.glob("eval/*/metrics.json")):
            found = read_json(path)
            scores[f"{found['data']}/{found['split']}"] = found["miou"]
    except KeyError:
        return None
    except (ValueError, TypeError, AttributeError) as error:
        return {**entry, "unfinished": f"cannot be read: {error!s:.200}"}
    return {**entry, "unfinished": None}


def print_runs(found: list[dict[str, Any]], root: str | Path) -> None:
    if not found:
        print(spelled(f"no training run below {root}; train.py makes one"))
        return
    table = Table("run", "trained on", "steps", "supervision", "mIoU", "")
    for e in found:
        scores = "\n".join(f"{data} {miou:.1f}" for data, miou in e["scores"].items())
        steps = "" if e["steps"] is None else str(e["steps"])
        table.add_row(
            e["run"], e["trained_on"], steps, e["supervision"], scores, e["unfinished"] or ""
        )
    console = Console()
    if not console.is_terminal:
        console.width = 200  # a file has no width limit
    console.print(table, markup=False)
