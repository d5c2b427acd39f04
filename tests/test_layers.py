"""The house as a rule: arrows only point down, and each heavy library has its own adapter. Read with ``ast``, run nothing."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"generate", "train", "evaluate"}
FLOORS = {
    -1: {"dd.provenance", "dd.schemas", "dd.nouns", "dd.names", "dd.supervision"},  # what lies on disk, and words
    0: {"dd.taxonomy"},
    1: {
        "dd.samples",
        "dd.prompts",
        "dd.attention.*",
        "dd.masks",
        "dd.metrics",
        "dd.shapes",
        "dd.budget",
        "dd.evaluation.*",
        "dd.duplicates",
        "dd.questions",
        "dd.uncertainty",
        "dd.data.*",
    }
    | {"dd.locks", "dd.progress", "dd.checkpoints", "dd.loaders", "dd.self_training"},
    2: {
        "dd.budget_results",
        "dd.coco",
        "dd.downloads",
        "dd.label_studio",
        "dd.folders",
        "dd.sbd",
        "dd.diffusion.*",
        "dd.segmenters.*",
        "dd.datasets",
        "dd.captioner",
        "dd.prompt_sources.*",
        "dd.prompt_check",
        "dd.quality",
        "dd.search",
        "dd.exports.*",
        "dd.onnx_model",
        "dd.page_server",
        "dd.executors.*",
    },
    3: {
        "dd.adaptation",
        "dd.units",
        "dd.annotations",
        "dd.conversion",
        "dd.exportable",
        "dd.datamodule",
        "dd.fitting",
        "dd.photos",
        "dd.segmentation",
        "dd.text_to_image",
        "dd.tracking.*",
        "dd.report.*",
    },
    4: {"dd.stages.*"},
    5: {"dd.config.*"},
    6: {"dd.cli.*"},
    7: {"dd.__main__", *SCRIPTS},  # the doors: nothing imports them
}
# inside them modules may import each other
ROOMS = (
    "dd.attention", "dd.diffusion", "dd.segmenters", "dd.prompt_sources", "dd.exports", "dd.executors", "dd.tracking",
    "dd.report", "dd.config", "dd.evaluation", "dd.data",
)  # fmt: skip
ADAPTERS = {  # library: the only modules that may import it
    "diffusers": ["dd.diffusion.*"],
    "peft": ["dd.diffusion.*"],
    "triton": ["dd.attention.*"],
    "transformers": ["dd.diffusion.*", "dd.captioner", "dd.quality", "dd.segmenters.huggingface"],
    "tokenizers": ["dd.diffusion.*"],
    "huggingface_hub": ["dd.diffusion.*"],
    "mmseg": ["dd.segmenters.*"],
    "mmcv": ["dd.segmenters.*"],
    "mmengine": ["dd.segmenters.*"],
    "pytorch_lightning": [*FLOORS[3], "dd.config.*"],
    "hydra": ["dd.config.*", *SCRIPTS],
    "omegaconf": ["dd.config.*", *SCRIPTS],
    "ray": ["dd.executors.ray"],
    "openai": ["dd.prompt_sources.endpoint"],
    "optuna": ["dd.search"],
    "wandb": ["dd.tracking.wandb"],
    "mlflow": ["dd.tracking.loggers", "dd.tracking.scores"],
    "tensorboard": ["dd.tracking.loggers"],
    "pycocotools": ["dd.coco", "dd.exports.coco"],
    "cv2": ["dd.photos"],
    "onnx": ["dd.onnx_model"],
    "onnxruntime": ["dd.onnx_model"],
    "starlette": ["dd.page_server"],
    "uvicorn": ["dd.page_server"],
    "pyarrow": ["dd.exports.huggingface"],
    "pooch": ["dd.downloads"],
    "torchmetrics": ["dd.metrics"],
    "scipy": ["dd.segmenters.mask_loss", "dd.sbd", "dd.evaluation.statistics"],
    "matplotlib": ["dd.report.*"],
    "jinja2": ["dd.report.*"],
}


def fits(module, patterns):
    return any(module == p or (p.endswith(".*") and f"{module}.".startswith(p[:-1])) for p in patterns)


def floor(module):
    found = [number for number, patterns in FLOORS.items() if fits(module, patterns)]
    assert len(found) == 1, f"{module} stands on no floor: place it in FLOORS (and in the design) before it is used"
    return found[0]


def room(module):
    return next((r for r in ROOMS if f"{module}.".startswith(f"{r}.")), None)


def modules():
    """{module name: source} of the package and of the scripts beside it; empty ``__init__`` files are no modules."""
    found = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    for path in (ROOT / "dd").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py" or path.read_text().strip():
            found[name] = path.read_text()
    return found


def imported(source, name, ours):
    """Modules that ``source`` imports, wherever in the file: ours in full, others by their first part."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            names |= (whole & ours) or {base}
            names |= {base} & ours
    return {n if n.partition(".")[0] in {"dd", *SCRIPTS} else n.partition(".")[0] for n in names}


OURS = modules()
IMPORTS = {name: imported(source, name, set(OURS)) for name, source in OURS.items()}


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import dd.masks\nfrom dd import metrics, nothing\nfrom . import page\ndef f():\n    from dd.samples import Sample\n"
    )
    found = imported(source + "import torch.nn as nn", "dd.report.pictures", {"dd.masks", "dd.metrics", "dd.report.page"})
    assert found == {"dd.masks", "dd.metrics", "dd.report.page", "dd.samples", "torch"}
    assert {"dd.diffusion", "dd.prompts", "generate"} <= set(OURS)


@pytest.mark.parametrize("module", sorted(OURS))
def test_arrows_only_point_down(module):
    for other in IMPORTS[module]:
        if other.partition(".")[0] not in {"dd", *SCRIPTS} or other == "dd":
            continue
        same_room = room(module) is not None and room(module) == room(other)
        assert floor(other) < floor(module) or same_room, (
            f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)}): an import goes to a lower floor"
        )


@pytest.mark.parametrize("module", sorted(OURS))
def test_heavy_libraries_stay_in_their_adapters(module):
    for library in IMPORTS[module] & ADAPTERS.keys():
        assert fits(module, ADAPTERS[library]), f"{module} imports {library}, which only {ADAPTERS[library]} may import"


def test_every_adapter_that_is_claimed_is_used():
    for library in ("diffusers", "transformers", "mmseg", "pytorch_lightning", "hydra", "torchmetrics", "ray", "openai"):
        assert any(library in libraries for libraries in IMPORTS.values()), library


@pytest.mark.parametrize("module", sorted(FLOORS[0]))
def test_the_ground_floor_needs_no_torch(module):
    assert "torch" not in IMPORTS[module]


def test_the_package_itself_imports_nothing():
    assert not (ROOT / "dd" / "__init__.py").read_text().strip()
