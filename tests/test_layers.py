"""The house as a rule: arrows only point down, and each heavy library has its own adapter. Read
with ``ast``, run nothing."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = {"generate", "train", "evaluate"}
PICTURE = ROOT / "docs" / "architecture.md"
ADAPTERS = {  # library: the only modules that may import it
    "diffusers": ["dd.generators.*"],
    "peft": ["dd.generators.*"],
    "triton": ["dd.attention.*"],
    "transformers": [
        "dd.generators.*",
        "dd.prompts.captioner",
        "dd.data.quality",
        "dd.segmenters.huggingface",
        "dd.segmenters.dino",
        "dd.segmenters.eomt",
        "dd.labelers.*",
    ],
    "tokenizers": ["dd.generators.*"],
    "huggingface_hub": ["dd.generators.*", "dd.segmenters.huggingface", "dd.labelers.loading"],
    "mmseg": ["dd.segmenters.*"],
    "mmcv": ["dd.segmenters.*"],
    "mmengine": ["dd.segmenters.*"],
    "pytorch_lightning": ["dd.training.*", "dd.config.*"],
    "hydra": ["dd.config.*", *SCRIPTS],
    "omegaconf": ["dd.config.*", *SCRIPTS],
    "ray": ["dd.execution.ray"],
    "openai": ["dd.prompts.endpoint"],
    "optuna": ["dd.training.search"],
    "wandb": ["dd.training.wandb"],
    "mlflow": ["dd.training.loggers", "dd.training.log_scores"],
    "tensorboard": ["dd.training.loggers"],
    "pycocotools": ["dd.data.coco_json", "dd.exports.coco"],
    "cv2": ["dd.data.photos"],
    "onnx": ["dd.deploy.onnx_model"],
    "onnxruntime": ["dd.deploy.onnx_model"],
    "starlette": ["dd.deploy.page_server"],
    "uvicorn": ["dd.deploy.page_server"],
    "pyarrow": ["dd.exports.huggingface"],
    "pooch": ["dd.store.downloads"],
    "torchmetrics": ["dd.evaluation.metrics"],
    "scipy": ["dd.segmenters.mask_loss", "dd.data.sbd_masks", "dd.evaluation.*"],
    "matplotlib": ["dd.report.*"],
    "jinja2": ["dd.report.*", "dd.store.templates"],
}
NO_TORCH = ("dd.taxonomy", "dd.store.*")
WITH_TORCH = {"dd.store.checkpoints"}  # the file format is torch's


def floors() -> dict[str, int]:
    """{room or script: floor} as the table of the picture tells it."""
    rows = re.findall(r"^\| (\d) \| (.+?) \|", PICTURE.read_text(), re.MULTILINE)
    return {name: int(number) for number, cell in rows for name in re.findall(r"`([^`]+)`", cell)}


FLOORS = floors()


def fits(module, patterns):
    return any(
        module == p or (p.endswith(".*") and f"{module}.".startswith(p[:-1])) for p in patterns
    )


def room(module):
    """``store`` of dd.store.locks, ``taxonomy`` of dd.taxonomy, ``train`` of the script,
    ``__init__`` of dd itself."""
    first, _, rest = module.partition(".")
    if module == "dd":
        return "__init__"
    return rest.partition(".")[0] if first == "dd" else f"{first}.py"


def floor(module):
    assert room(module) in FLOORS, f"{module}: its room is not in the table of {PICTURE.name}"
    return FLOORS[room(module)]


def modules():
    """{module name: source} of the package and of the scripts beside it; empty ``__init__``
    files are no modules."""
    found = {path.stem: path.read_text() for path in ROOT.glob("*.py")}
    for path in (ROOT / "dd").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if path.name != "__init__.py" or path.read_text().strip():
            found[name] = path.read_text()
    return found


def imported(source, name, ours):
    """Modules that ``source`` imports, wherever in the file: ours in full, others by their first
    part."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parts = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            whole = {f"{base}.{alias.name}" for alias in node.names}
            names |= (whole & ours) or {base}
            if len(whole & ours) < len(whole):  # a name of the package itself
                names |= {base} & ours
    return {n if n.partition(".")[0] in {"dd", *SCRIPTS} else n.partition(".")[0] for n in names}


OURS = modules()
IMPORTS = {name: imported(source, name, set(OURS)) for name, source in OURS.items()}


def test_the_reader_of_imports_sees_every_form():
    source = (
        "import dd.taxonomy\nfrom dd.evaluation import metrics, nothing\nfrom . import html\n"
        "def f():\n    from dd.store.samples import Sample\nimport torch.nn as nn"
    )
    ours = {"dd.taxonomy", "dd.evaluation.metrics", "dd.report.html"}
    found = imported(source, "dd.report.pictures", ours)
    assert found == {*ours, "dd.store.samples", "torch"}
    assert {"dd.generators", "dd.prompts.prompt", "generate"} <= set(OURS)


@pytest.mark.parametrize("module", sorted(OURS))
def test_arrows_only_point_down(module):
    for other in IMPORTS[module]:
        if other.partition(".")[0] not in {"dd", *SCRIPTS} or other == "dd":
            continue
        assert floor(other) < floor(module) or room(module) == room(other), (
            f"{module} (floor {floor(module)}) imports {other} (floor {floor(other)}): "
            "an import goes to a lower floor, or stays in the room"
        )


def test_no_module_imports_itself_in_a_circle():
    """Inside the rooms too."""
    ours = {name: {o for o in IMPORTS[name] if o in OURS and o != name} for name in OURS}
    assert list(graphlib.TopologicalSorter(ours).static_order())


def test_every_room_of_the_picture_is_there_and_no_other():
    there = {room(name) for name in OURS}
    assert there == set(FLOORS)


def test_few_files_stand_alone():
    assert {p.name for p in (ROOT / "dd").glob("*.py")} == {
        "__init__.py",
        "__main__.py",
        "api.py",
        "taxonomy.py",
    }


@pytest.mark.parametrize("module", sorted(OURS))
def test_heavy_libraries_stay_in_their_adapters(module):
    for library in IMPORTS[module] & ADAPTERS.keys():
        assert fits(module, ADAPTERS[library]), (
            f"{module} imports {library}, which only {ADAPTERS[library]} may import"
        )


def test_every_adapter_that_is_claimed_is_used():
    for library in (
        "diffusers",
        "transformers",
        "mmseg",
        "pytorch_lightning",
        "hydra",
        "torchmetrics",
        "ray",
        "openai",
    ):
        assert any(library in libraries for libraries in IMPORTS.values()), library


@pytest.mark.parametrize("module", sorted(n for n in OURS if fits(n, NO_TORCH)))
def test_the_ground_floor_needs_no_torch(module):
    assert ("torch" in IMPORTS[module]) == (module in WITH_TORCH)


def test_the_package_itself_imports_nothing_before_it_is_asked():
    body = ast.parse((ROOT / "dd" / "__init__.py").read_text()).body
    imports = [node for node in body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert [node.module for node in imports] == ["typing"]
