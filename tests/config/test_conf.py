"""Every file in conf/ composes and builds; what is mistyped or not allowed is refused before any
work starts."""

import inspect
import json
import re
import shutil
from types import SimpleNamespace

import hydra
import pytest
import pytorch_lightning as pl
import torch
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue

from dd import config
from dd.config.training import unlabelled_photos
from dd.masks.from_heat import MaskSettings
from dd.segmenters.base import Segmenter
from dd.segmenters.deeplabv3 import DeepLabV3
from dd.segmenters.transforms import TrainTransform
from dd.stages.prepare_shapes import prepare_shapes
from dd.store.provenance import write_json
from dd.taxonomy import taxonomy
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation
from tests.doors import door
from tests.generators import tiny

CONF = config.CONF
ROOTS = {"generate", "train", "evaluate"}
FILLED = {  # what is ??? in a file, as its header says to give it
    "train": ["name=a_run"],
    "prompts=llm": ["prompts.model=a_model"],
    "prompts=file": ["prompts.path=prompts.json"],
    "diffusion=paper": ["diffusion.model=a_folder"],
    "data=own": ["data.taxonomy=voc"],  # its own file is made by prepare
}


def compose(root, *overrides, **kwargs):
    return config.compose(root, list(overrides), **kwargs)


def groups_of(root):
    """Groups in the defaults list of a root config, but for ``experiment``."""
    entries = (
        e for e in OmegaConf.load(CONF / f"{root}.yaml").defaults if isinstance(e, DictConfig)
    )
    return {key for entry in entries for key in entry if not key.startswith("override ")} - {
        "experiment"
    }


def header_command(path):
    """(root, overrides) of the line ``# python <root>.py experiment=...`` in an experiment file."""
    found = re.search(r"^# python (\w+)\.py (.*)$", path.read_text(), re.MULTILINE)
    if found is None:  # what several experiments share
        return "train", [f"experiment={path.stem}"]
    values = re.findall(r"([\w.]+)=(<[^>]*>|\S+)", found[2])
    return found[1], [
        f"{key}={'a_folder' if value.startswith('<') else value}" for key, value in values
    ]


CHOICES = [
    (root, [f"{group}={file.stem}", *FILLED.get(root, []), *FILLED.get(f"{group}={file.stem}", [])])
    for root in sorted(ROOTS)
    for group in sorted(groups_of(root))
    for file in sorted((CONF / group).glob("*.yaml"))
]
EXPERIMENTS = [header_command(file) for file in sorted((CONF / "experiment").glob("*.yaml"))]
EVERY = [*((root, FILLED.get(root, [])) for root in sorted(ROOTS)), *CHOICES, *EXPERIMENTS]


def targets(node):
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for value in node.values():
            yield from targets(value)
    elif isinstance(node, list):
        for value in node:
            yield from targets(value)


# Composition


def test_every_group_belongs_to_a_command():
    used = {"experiment"}.union(*(groups_of(root) for root in ROOTS))
    assert used == {p.name for p in CONF.iterdir() if p.is_dir()}
    assert {p.stem for p in CONF.glob("*.yaml")} == ROOTS | {"base", "synthetic"}


def test_every_experiment_names_its_command():
    for (root, overrides), file in zip(
        EXPERIMENTS, sorted((CONF / "experiment").glob("*.yaml")), strict=True
    ):
        assert root in ROOTS and overrides[0] == f"experiment={file.stem}"


@pytest.mark.parametrize(
    ("root", "overrides"), EVERY, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_every_file_composes_and_fits_the_constructors(root, overrides):
    config.check_overrides(root, overrides)
    cfg = compose(root, *overrides)
    assert OmegaConf.missing_keys(cfg) <= {"labeler.run"}  # to be named by whoever labels
    nodes = list(targets(config.plain(cfg)))
    assert nodes or root == "evaluate"
    config.objects._check_targets(nodes)
    for node in nodes:
        arguments = {k: v for k, v in node.items() if k not in ("_target_", "chosen_on")}
        inspect.signature(hydra.utils.get_object(node["_target_"])).bind_partial(**arguments)
    assert len(config.taxonomy(cfg)) > 1
    assert {"name", "data_root", "output_root", "seed", "device"} <= cfg.keys()


@pytest.mark.parametrize(
    ("root", "overrides"), EVERY, ids=lambda x: x if isinstance(x, str) else " ".join(x)
)
def test_every_node_that_needs_no_weights_is_built(root, overrides, tmp_path, tiny_segmenter):
    cfg = compose(root, *overrides, f"output_root={tmp_path}", "device=cpu")
    if root == "generate":
        assert isinstance(config.instantiate(cfg.masks), MaskSettings)
        assert callable(config.instantiate(cfg.prompts))
    if root == "train":
        assert isinstance(config.instantiate(cfg.transform), TrainTransform)
        task = config.instantiate(
            cfg.optimizer, segmenter=tiny_segmenter(), class_names=["background", "a", "b"]
        )
        assert (
            isinstance(task, Segmentation)
            and task.hparams.learning_rate == cfg.optimizer.learning_rate
        )
        if cfg.trainer.get("fast_dev_run"):  # a step without loggers
            assert config.trainer(cfg, validate=False).max_steps == 1
            return
        if "default_root_dir" in cfg.trainer:
            trainer = config.trainer(cfg, validate=False)
            assert trainer.max_steps == cfg.trainer.max_steps
        else:
            trainer = config.trainer_factory(cfg)(
                max_steps=3, default_root_dir=tmp_path / "part", average=True
            )
            assert trainer.max_steps == 3 and trainer.default_root_dir == str(tmp_path / "part")
        assert {type(logger.logger).__name__ for logger in trainer.loggers} >= {"CSVLogger"}


@pytest.mark.parametrize("file", sorted(p.stem for p in (CONF / "segmenter").glob("*.yaml")))
def test_every_segmenter_is_built(file):
    cfg = compose("train", f"segmenter={file}", "segmenter.pretrained=null", "name=a_run")
    segmenter = config.instantiate(cfg.segmenter, num_classes=21)
    assert isinstance(segmenter, Segmenter) and segmenter.num_classes == 21
    if "_r" in file:
        assert cfg.segmenter.depth == int(file.rpartition("_r")[2])
    run = {"segmenter": config.plain(cfg.segmenter), "taxonomy": {"names": ["a"] * 20}}
    assert type(config.segmenter_of(run)) is type(segmenter)


LOGGERS = {"csv": "CSVLogger", "tensorboard": "TensorBoard", "wandb": "Wandb", "mlflow": "MLflow"}


@pytest.mark.parametrize("name", ["null", *OmegaConf.load(CONF / "train.yaml").loggers])
def test_every_logger_is_built(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    cfg = compose("train", f"logger={name}", f"output_root={tmp_path}", "name=a_run")
    loggers = config.loggers(cfg)
    kinds = {type(logger.logger).__name__ for logger in loggers}
    assert kinds == {"CSVLogger", LOGGERS.get(name, "CSVLogger")}
    assert not (tmp_path / "a_run").exists()  # nothing begins before the training
    assert all(str(logger.save_dir) == str(tmp_path / "a_run") for logger in loggers)
    assert loggers[0].log_dir.rstrip("/") == str(tmp_path / "a_run")  # metrics.csv beside run.json


def test_several_loggers_at_once(tmp_path):
    cfg = compose("train", "logger=[tensorboard,wandb]", f"output_root={tmp_path}", "name=a_run")
    assert [type(logger.logger).__name__ for logger in config.loggers(cfg)] == [
        "CSVLogger",
        "TensorBoard",
        "Wandb",
    ]


def test_prompts_of_the_templates_know_the_world_of_the_taxonomy():
    cfg = compose("generate", "prompts=shapes", "data=shapes")
    prompts = config.instantiate(cfg.prompts)(config.taxonomy(cfg), 5, 0)
    assert all("background" in p.text and "light" in p.text and ";" in p.text for p in prompts)


def test_the_papers_settings():
    cfg = compose("generate", "experiment=voc", *FILLED["prompts=file"], *FILLED["diffusion=paper"])
    assert config.instantiate(cfg.masks) == MaskSettings(power=4, threshold=0.6, band=0.1)
    assert (
        cfg.diffusion.steps,
        cfg.diffusion.guidance,
        cfg.diffusion.scheduler,
        cfg.diffusion.size,
    ) == (100, 7.5, None, 512)
    assert (
        cfg.diffusion.negative_prompt.startswith("ugly, tiling, ")
        and "\n" not in cfg.diffusion.negative_prompt
    )
    assert cfg.diffusion.truncate and cfg.diffusion.dtype == "float16"
    cfg = compose("train", "experiment=paper_synthetic")
    assert (cfg.trainer.max_steps, cfg.batch_size, cfg.trainer.gradient_clip_val) == (
        20000,
        8,
        0.01,
    )
    assert cfg.trainer.precision == "32-true" and cfg.optimizer.weight_decay == 1e-4
    assert tuple(cfg.optimizer.betas) == (0.9, 0.999) and cfg.optimizer.warmup == 0
    cfg = compose("train", "experiment=paper_synthetic", "data=coco", "segmenter.depth=101")
    assert (cfg.trainer.max_steps, cfg.trainer.precision, cfg.batch_size) == (40000, "32-true", 8)
    assert cfg.segmenter.pretrained == "open-mmlab://resnet101_v1c"
    assert compose("train", "name=ours").trainer.precision == "bf16-mixed"
    assert (
        cfg.optimizer.learning_rate,
        cfg.optimizer.backbone_multiplier,
        cfg.optimizer.poly_power,
    ) == (1e-4, 0.1, 0.9)


def test_the_papers_coco_prompts(tmp_path):
    caption = {"image_id": 7, "caption": "A kitchen in a residence."}
    write_json(tmp_path / "captions.json", {"annotations": [caption]})
    categories = [{"id": 81, "name": "sink"}, {"id": 47, "name": "cup"}]
    objects = [{"image_id": 7, "category_id": c["id"]} for c in categories]
    content = {"images": [{"id": 7, "file_name": "7.jpg"}], "annotations": objects}
    write_json(tmp_path / "instances.json", {**content, "categories": categories})
    files = [f"{kind}={tmp_path}/{kind}.json" for kind in ("captions", "instances")]
    given = [f"prompts.sources.captions.{file}" for file in files]
    cfg = compose("generate", "prompts=paper_coco", "data=coco", *given)
    found = [p.text for p in config.instantiate(cfg.prompts)(config.taxonomy(cfg), 160, 0)]
    assert found.count("A kitchen in a residence.; cup sink") == 80
    named = {f"a photo of {name}; {name}" for name in config.taxonomy(cfg).names}
    assert set(found) == {"A kitchen in a residence.; cup sink", *named}
    ours = compose("generate", "prompts=coco_captions", *(f"prompts.{file}" for file in files))
    (prompt,) = config.instantiate(ours.prompts)(config.taxonomy(cfg), 1, 0)
    assert prompt.text == "A kitchen in a residence; cup sink"


def test_the_papers_voc_prompts(tmp_path):
    row = {"filename": "a.jpg", "caption": "a man and a woman on a couch"}
    write_json(tmp_path / "captions.json", [row])
    given = [f"prompts.path={tmp_path}/captions.json", "prompts.exclude_split=null", "data=voc"]
    for theirs, words in ((True, "person person sofa"), (False, "person sofa")):
        more = [] if theirs else ["prompts.repeat_classes=false"]
        cfg = compose("generate", "prompts=paper_voc", *given, *more)
        (prompt,) = config.instantiate(cfg.prompts)(config.taxonomy(cfg), 1, 0)
        assert prompt.text == f"a man and a woman on a couch; {words}"
        assert (prompt.class_prompt, prompt.classes) == (words, ("person", "sofa"))


@pytest.mark.parametrize(
    "file",
    sorted(
        {p.stem for p in (CONF / "diffusion").glob("*.yaml")} - {*tiny.BUILDERS, "embedded_mmdit"}
    ),
)
def test_every_unet_is_built_from_a_local_folder(file):
    """Of the tiny checkpoint of the package, at its own size: what is left of the settings is
    that of the file."""
    own = [f"diffusion.{key}=null" for key in ("size", "cross_resolution", "self_resolution")]
    cfg = compose("generate", f"diffusion={file}", "diffusion.model=embedded", *own)
    generator = config.instantiate(cfg.diffusion)
    assert generator.terms["licence"] and (generator.terms["link"] or file.startswith("embedded"))
    assert generator.settings.steps == cfg.diffusion.steps
    assert generator.pipe.unet.dtype == getattr(torch, cfg.diffusion.dtype)


def test_the_embedded_mmdit_is_built_as_it_ships():
    generator = config.instantiate(compose("generate", "diffusion=embedded_mmdit").diffusion)
    assert generator.size == 128 and generator.token_limit >= 43
    assert generator.cross_resolution == generator.self_resolution == 16


@pytest.mark.parametrize("file", tiny.BUILDERS)
def test_every_other_family_says_what_it_is(file):
    """They are built in tests/generators/test_families.py."""
    node = compose("generate", f"diffusion={file}").diffusion
    assert node.size == 1024
    assert node.reading == ("sampling" if file in ("pixart_sigma", "sana") else "after")
    if file in ("sana", "flux2_klein"):  # the model, and what its publisher says, are to be given
        assert node.model is node.licence is node.link is None
        with pytest.raises(ValueError, match="diffusion.model is not set"):
            config.instantiate(node)
        return
    assert node.licence and node.link.endswith(node.model)


@pytest.mark.parametrize("file", ["sd14", "sd15", "sdxl"])
def test_a_models_licence_is_its_own_in_whatever_configuration_it_is_named(file):
    from dd.generators.text_to_image import TERMS

    node = compose("generate", f"diffusion={file}").diffusion
    assert TERMS[node.model] == {"licence": node.licence, "link": node.link}


def test_mixed_training_takes_the_synthetic_set_of_its_data():
    assert compose("train", "experiment=paper_mixed").synthetic == "data/synthetic/voc"
    assert (
        compose("train", "experiment=paper_mixed", "data=coco").synthetic == "data/synthetic/coco"
    )
    own = ["data=own", "data.name=site"]
    assert compose("train", "experiment=paper_mixed", *own).synthetic == "data/synthetic/site"


RECIPES = ("synthetic", "finetune", "mixed", "real")


@pytest.mark.parametrize("file", [f"paper_{recipe}" for recipe in RECIPES])
def test_every_recipe_says_what_it_costs_and_what_to_expect(file):
    head = "".join(
        line
        for line in (CONF / f"experiment/{file}.yaml").read_text().splitlines(True)
        if line.startswith("#")
    )
    assert "Cost" in head and "published" in head.lower(), head


@pytest.mark.parametrize("file", ["sd21", "paper"])
def test_stable_diffusion_2_asks_for_its_model(file):
    with pytest.raises(
        ValueError,
        match="diffusion.model is not set.*withdrawn in November 2025.*stable-diffusion-v1-5",
    ):
        config.instantiate(compose("generate", f"diffusion={file}").diffusion)


def test_the_papers_experiment_asks_for_a_commit():
    cfg = compose(
        "generate", "experiment=voc", *FILLED["prompts=file"], "diffusion.model=someone/model"
    )
    with pytest.raises(
        ValueError, match="diffusion.revision=None: .*give diffusion.revision=<commit>"
    ):
        config.instantiate(cfg.diffusion)


@pytest.mark.parametrize(
    ("kind", "part"),
    [("unet", "unet"), ("mmdit", "transformer"), ("mmdit", "text_encoder_2")],
)
def test_the_generators_that_ship_are_those_of_their_recipes(kind, part):
    from dd.generators.loading import ASSETS

    _, overrides = header_command(CONF / f"experiment/shapes_{kind}.yaml")
    recipe = config.plain(compose("train", *overrides).generator.models)[part]
    shipped = json.loads((ASSETS / f"shapes_{kind}" / part / "config.json").read_text())
    assert recipe == {key: shipped[key] for key in recipe}


# The adaptation of a generator


def test_an_adaptation_starts_from_plain_float32_weights():
    cfg = compose("train", "experiment=shapes_adapt_generator", "device=cpu", "data_root=here")
    given = config.adaptation(cfg)
    assert (
        next(given["generator"].network.parameters()).dtype == torch.float32
        and given["generator"].size == 128
    )
    assert given["settings"].images == "here/shapes_shift/JPEGImages"
    assert given["settings"].listed.endswith("Segmentation/train.txt")
    for wrong in ("+adapter.generator.dtype=float16", "+adapter.generator.adapter=a_run"):
        with pytest.raises(ValueError, match="trained from float32 weights without an adapter"):
            config.adaptation(compose("train", "experiment=shapes_adapt_generator", wrong))
    with pytest.raises(ValueError, match="trainer.devices=2: an adapter is trained on one device"):
        config.adaptation(
            compose("train", "experiment=shapes_adapt_generator", "trainer.devices=2")
        )
    with pytest.raises(ValueError, match="experiment=shapes_adapt_generator or sd_adapt_generator"):
        config.adaptation(compose("train", "name=a_run", "stage=adapter"))


# The trainer


def test_callbacks_average_first_and_save_afterwards(tmp_path):
    cfg = compose("train", "experiment=shapes_synthetic", f"output_root={tmp_path}", "device=cpu")
    kinds = [type(c) for c in config.trainer(cfg, validate=False).callbacks]
    assert kinds.index(EMA) < kinds.index(LastCheckpoint)
    assert (tmp_path / cfg.name / "config.yaml").is_file()


@pytest.mark.parametrize("validate", [False, True])
def test_only_a_validated_run_has_a_best_checkpoint(tmp_path, validate):
    cfg = compose("train", "name=a_run", f"output_root={tmp_path}", "device=cpu")
    trainer = config.trainer(cfg, validate)
    assert [
        c.monitor for c in trainer.callbacks if isinstance(c, pl.callbacks.ModelCheckpoint)
    ] == ["tune/miou"] * validate
    assert trainer.limit_val_batches == (1.0 if validate else 0)


def test_a_numbered_device_is_the_one_that_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(config.training, "_trainer", lambda name, node, *_: node)
    cfg = compose("train", "name=a_run", f"output_root={tmp_path}", "device=cuda:1")
    assert config.device(cfg) == "cuda:1"
    node = config.trainer(cfg, validate=False)
    assert (node["accelerator"], node["devices"]) == ("cuda", [1])


def test_devices():
    cfg = OmegaConf.create({"device": "auto"})
    assert config.device(cfg) == ("cuda" if torch.cuda.is_available() else "cpu")
    assert config.device(OmegaConf.create({"device": "cpu"})) == "cpu"


# What may be instantiated


def allowed_are_named(error):
    return all(prefix in str(error.value) for prefix in config.ALLOWED)


@pytest.mark.parametrize(
    "target",
    [
        "os.system",
        "torch.load",
        "torch.hub.load",
        "builtins.eval",
        "subprocess.Popen",
        "pathlib.Path",
        "dd.masks.from_heat.to_mask",
        "dd.generators.train_tokenizer",  # functions, though of an allowed module
        "dd.generators.loading.sha256",
        "dd.generators.loading.Path",
        "dd.masks.from_heat.torch.load",  # aliases
        "dd.generators.from_scratch.StableDiffusionPipeline",
        "dd.masks.from_heat.MaskSettings.__init__",
        "dd.generators.TextToImage.generate",
        "pytorch_lightning.trainer.trainer.Trainer.fit",
        "pytorch_lightning.LightningModule",
        "dd.masks.from_heat",
    ],
)
def test_other_targets_are_refused(target):
    with pytest.raises(ValueError, match=re.escape(f"_target_ {target!r}")) as error:
        config.instantiate({"_target_": target})
    assert allowed_are_named(error)


CALL = {"_target_": "os.getcwd"}  # harmless, and its result betrays that it ran


@pytest.mark.parametrize(
    "node",
    [
        {"_target_": "dd.prompts.captions.CaptionFile", "path": CALL},
        {"_target_": "dd.prompts.captions.CaptionFile", "path": {"deep": [[CALL]]}},
        {"_target_": "dd.prompts.captions.CaptionFile", "path": (CALL,)},
        {"_target_": "dd.prompts.captions.CaptionFile", "path": OmegaConf.create(CALL)},
        {"_target_": "dd.prompts.captions.CaptionFile", "path": [OmegaConf.create([CALL])]},
        OmegaConf.create({"_target_": "dd.prompts.captions.CaptionFile", "path": CALL}),
        OmegaConf.create(
            {"call": CALL, "_target_": "dd.prompts.captions.CaptionFile", "path": "${call}"}
        ),
        [CALL],
        OmegaConf.create([CALL]),
    ],
    ids=str,
)
def test_a_call_cannot_hide_in_a_node(node):
    with pytest.raises(ValueError, match="_target_ 'os.getcwd'"):
        config.instantiate(node)


def test_a_call_cannot_come_with_the_arguments():
    with pytest.raises(ValueError, match="_target_ 'os.getcwd'"):
        config.instantiate({"_target_": "dd.prompts.captions.CaptionFile"}, path=CALL)


def test_a_mistyped_target_names_what_is_allowed():
    with pytest.raises(ValueError, match=r"dd\.masks\.from_heat\.MaskSetting\b") as error:
        config.instantiate({"_target_": "dd.masks.from_heat.MaskSetting"})
    assert allowed_are_named(error)


def test_allowed_targets_get_plain_containers():
    prompts = config.instantiate(
        OmegaConf.create(
            {
                "_target_": "dd.prompts.templates.TemplatePrompts",
                "templates": ["{things}"],
                "conditions": {"a": ["b"]},
                "counts": [1],
            }
        )
    )
    assert (
        type(prompts.settings.templates) is list
        and type(prompts.settings.conditions) is dict
        and type(prompts.settings.conditions["a"]) is list
    )


def test_the_segmenter_of_a_run():
    node = {
        "_target_": "dd.segmenters.deeplabv3.DeepLabV3",
        "depth": 18,
        "pretrained": "open-mmlab://never_fetched",
    }
    node["dilations"] = [1, 2]
    segmenter = config.segmenter_of({"segmenter": node, "taxonomy": {"names": ["cat", "dog"]}})
    assert len(segmenter.decode_head.aspp_modules) == 2
    assert isinstance(segmenter, DeepLabV3) and segmenter.num_classes == 3


@pytest.mark.parametrize(
    "node",
    [
        {},
        CALL,
        {"_target_": "dd.training.segmentation.EMA"},
        {"_target_": "dd.segmenters.deeplabv3.DeepLabV3", "depth": CALL},
        {"_target_": "dd.segmenters.deeplabv3.DeepLabV3", "dilations": [CALL]},
    ],
)
def test_a_run_cannot_name_anything_else(node):
    with pytest.raises(ValueError, match="is not one of dd.segmenters with plain values"):
        config.segmenter_of({"segmenter": node, "taxonomy": {"names": ["cat"]}})


# Messages


def test_a_value_that_has_to_be_given_is_named():
    with pytest.raises(MissingMandatoryValue) as raised:
        config.instantiate(compose("generate", "prompts=llm", "name=x").prompts)
    assert config.command._message(raised.value).endswith(
        "add prompts.model=<value> to the command"
    )


def test_an_error_out_of_a_loaders_worker_is_told_like_any_other():
    passed_on = ValueError(
        "Caught ValueError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n"
        "  File ...\nValueError: a.png is 4x4"
    )
    assert config.command._message(passed_on) == "a.png is 4x4"
    assert config.command._message(ValueError("a.png is 4x4")) == "a.png is 4x4"


def test_the_embedded_trainings_keep_checkpoints_on_their_way():
    for name in ("synthetic", "finetune", "mixed", "real"):
        cfg = compose("train", f"experiment=shapes_{name}")
        assert cfg.trainer.callbacks.last.every_n_steps <= cfg.trainer.max_steps
        assert cfg.trainer.callbacks.last.every_n_steps < 100


# What a run is made from


@pytest.fixture(scope="module")
def data_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    prepare_shapes(root, {"train": 5, "tune": 2, "test": 1})
    return root


def training(data_root, *overrides):
    return compose(
        "train", "experiment=shapes_real", f"data_root={data_root}", "shots=3", *overrides
    )


def test_real_training_sets(data_root):
    images, tune = config.training_sets(training(data_root))
    assert (images.split, len(images), tune) == ("train", 3, None)
    for everything in ("shots=all", "shots=null"):
        assert len(config.training_sets(training(data_root, everything))[0]) == 5
    _, tune = config.training_sets(training(data_root, "trainer.limit_val_batches=1.0"))
    assert (tune.split, len(tune)) == ("tune", 2)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["source=synthetic"], "shots=3 has no effect with source=synthetic"),
        (["source=synthetic", "shots=null", "shots_list=a.txt"], "shots_list=a.txt has no effect"),
        (["trainer.devices=3"], "batch_size=16: .*3 processes.*a multiple of 3 from 6 on"),
        (["trainer.devices=[0,1]", "batch_size=2"], "batch_size=2: .*a multiple of 2 from 4 on"),
        (["trainer.devices=2", "+trainer.num_nodes=3"], "batch_size=16: .*6 processes"),
    ],
)
def test_training_sets_that_make_no_sense(data_root, overrides, message):
    with pytest.raises(ValueError, match=message):
        config.training_sets(training(data_root, *overrides))


def test_processes_of_a_training(data_root, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for overrides, number in (
        ([], 1),
        (["trainer.devices=4"], 4),
        (["trainer.devices=[1,3]"], 2),
        (["trainer.devices=auto"], 1),
        (["trainer.devices=2", "+trainer.num_nodes=2"], 4),
        (["trainer.devices=-1"], 1),
        (["trainer.devices=4", "device=cuda:1"], 1),
        (["trainer.devices=4", "device=cuda"], 4),
    ):
        assert config.processes(training(data_root, *overrides)) == number, overrides


def identity_of(cfg):
    images, tune = config.training_sets(cfg)
    photos = unlabelled_photos(cfg, "") if cfg.self_training.teacher else None
    found, record = config.training_record(cfg, images, tune, photos)
    assert json.loads(json.dumps([found, record])) == [found, record]
    return found


def leaves(node, prefix=""):
    """(key, value) of everything in a configuration that is no dictionary."""
    for key, value in node.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def another(value):
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value + 1
    return value + "x" if isinstance(value, str) else 7 if value is None else [*value, 7]


def listed(key, settings):
    """Whether a key is in one of the documented lists, itself or as a part, or of a callback that
    only looks on."""
    parts = key.split(".")
    if parts[:2] == ["trainer", "callbacks"]:  # of another class it is another callback
        return (
            parts[-1] != "_target_"
            and settings["trainer"]["callbacks"][parts[2]]["_target_"] in config.OBSERVERS
        )
    names = {".".join(parts[: i + 1]) for i in range(len(parts))}
    return bool(names & (config.CHANGES_NO_WEIGHT.keys() | config.RECORDED.keys()))


def test_each_setting_is_in_the_identity_or_is_said_to_change_no_weight(data_root):
    cfg = training(data_root, "logger=[tensorboard,mlflow,wandb]", VALIDATED)
    first, settings = config.settings_identity(cfg), config.plain(cfg)
    keys = dict(leaves(settings)) | {
        "trainer.profiler": "simple",
        "trainer.num_nodes": 2,
        "trainer.max_time": "1:00",
    }
    counting = {
        "accumulate_grad_batches": 2,
        "gradient_clip_algorithm": "value",
        "limit_train_batches": 0.5,
    }
    counting |= {
        "reload_dataloaders_every_n_epochs": 3,
        "max_steps": 7,
        "sync_batchnorm": True,
        "some_new_key": 1,
        "strategy": "fsdp",
    }
    counting = {f"trainer.{k}": v for k, v in counting.items()} | {
        "another_key": 1,
        "optimizer.new": {"deeper": 2},
    }
    own = {
        "device": "cpu",
        "trainer.devices": 1,
        "trainer.num_nodes": 1,
    }  # with one process as before
    for key, value in (keys | counting).items():
        changed = OmegaConf.create(settings)
        OmegaConf.update(
            changed, key, counting.get(key, own.get(key, another(value))), force_add=True
        )
        assert (config.settings_identity(changed) == first) == listed(key, settings), key
    assert not any(listed(key, settings) for key in counting)


def test_the_lists_name_what_there_is(data_root):
    composed = {k for k, _ in leaves(config.plain(training(data_root, "segmenter=mmseg_config")))}
    lightning = {f"trainer.{name}" for name in inspect.signature(pl.Trainer.__init__).parameters}
    for key in config.CHANGES_NO_WEIGHT.keys() | config.RECORDED.keys():
        assert key in lightning or any(f"{name}.".startswith(f"{key}.") for name in composed), key
    assert not config.CHANGES_NO_WEIGHT.keys() & config.RECORDED.keys()
    page = (CONF.parent / "docs/formats.md").read_text()
    for key in [*config.CHANGES_NO_WEIGHT, *config.OBSERVERS]:
        assert f"`{key}`" in page, key
    for target in config.OBSERVERS:
        assert issubclass(hydra.utils.get_class(target), pl.Callback)


def test_a_callback_of_your_own_counts_by_its_class(data_root):
    first = identity_of(training(data_root))
    watch = "+trainer.callbacks.rate={_target_: pytorch_lightning.callbacks.LearningRateMonitor}"
    assert identity_of(training(data_root, watch)) == first
    swa = "{_target_: pytorch_lightning.callbacks.StochasticWeightAveraging, swa_lrs: 0.1}"
    for name in ("mine", "samples"):  # not even under the name of one that looks on
        found = identity_of(training(data_root, f"++trainer.callbacks.{name}={swa}"))
        assert found["trainer"]["callbacks"][name]["swa_lrs"] == 0.1
    off = identity_of(training(data_root, "trainer.callbacks.ema=null"))
    assert off != first and off == identity_of(training(data_root, "~trainer.callbacks.ema"))


@pytest.mark.parametrize(
    ("key", "given", "changes"),
    [
        ("source", [], ["source=mixed"]),
        ("real_share", ["source=mixed"], ["real_share=0.25"]),
        ("shots", [], ["shots=2"]),
        ("hold_out", ["hold_out=1", "shots=4", "trainer.limit_val_batches=1.0"], ["hold_out=2"]),
        ("data", ["shots=2"], ["data=shapes_shift", "data.train_split=tune"]),
        ("synthetic", ["source=synthetic", "shots=null"], ["synthetic={root}/copy"]),
        ("synthetic_masks", ["source=synthetic", "shots=null"], ["synthetic_masks=masks/other"]),
        ("synthetic_split", ["source=synthetic", "shots=null"], ["synthetic_split=tune"]),
        ("init_from", [], ["init_from={root}/run"]),
        (
            "unlabelled",
            ["self_training=mean_teacher"],
            ["unlabelled.images={root}/shapes_shift/JPEGImages"],
        ),
        ("self_training", ["self_training=mean_teacher"], ["self_training.teacher.confidence=0.5"]),
        ("trainer.devices", [], ["trainer.devices=2"]),
        ("trainer.num_nodes", [], ["+trainer.num_nodes=2"]),
    ],
)
def test_what_is_recorded_by_content_counts(
    data_root, tmp_path, synthetic_set, key, given, changes
):
    assert key in config.RECORDED
    shutil.copytree(data_root, tmp_path, dirs_exist_ok=True)
    shutil.copytree(tmp_path / "shapes", tmp_path / "copy")
    (tmp_path / "copy/SegmentationClass/masks.json").write_text(
        '{"identity": {"settings": {"power": 3}}, "chosen_on": []}'
    )
    shutil.copytree(tmp_path / "copy/SegmentationClass", tmp_path / "shapes/masks/other")
    write_json(
        tmp_path / "run/run.json",
        {"trained_on": {"source": "synthetic"}, "supervision": "A", "weights_sha256": "0"},
    )
    whole = [
        f"synthetic={tmp_path}/shapes",
        f"unlabelled.images={tmp_path}/shapes/JPEGImages",
        "data.tune_split=null",
    ]
    first = identity_of(training(tmp_path, *whole, *given))
    assert identity_of(training(tmp_path, *whole, *given, "num_workers=3")) == first
    for change in changes:
        assert (
            identity_of(training(tmp_path, *whole, *given, change.format(root=tmp_path))) != first
        ), change


def test_files_that_the_segmenter_was_made_from_count(data_root):
    cfg = training(data_root)
    images, _ = config.training_sets(cfg)
    network = SimpleNamespace(files={"pretrained": "1" * 64})
    identity, record = config.training_record(cfg, images, network=network)
    assert identity["segmenter_files"] == record["segmenter_files"] == {"pretrained": "1" * 64}
    assert identity_of(cfg)["segmenter_files"] == {}


def test_classes_and_images_count(data_root, tmp_path):
    shutil.copytree(data_root, tmp_path, dirs_exist_ok=True)
    first = identity_of(training(tmp_path))
    (image,) = (tmp_path / "shapes/JPEGImages").glob("train_00000.*")
    image.write_bytes(image.read_bytes() + b"\0")
    assert identity_of(training(tmp_path))["trained_on"] != first["trained_on"]
    assert first["classes"] == list(taxonomy("shapes").names)


def test_a_study_of_other_images_is_another_one(data_root, tmp_path):
    """Its settings name paths; a finished study does not answer for what lies there now."""
    shutil.copytree(data_root, tmp_path, dirs_exist_ok=True)
    cfg = training(tmp_path, "trainer.limit_val_batches=1.0", "shots=null")
    first, settings = config.study_content(cfg), config.study_identity(cfg, {})
    masks = tmp_path / "shapes/SegmentationClass"
    for split, key in (("train", "trained_on"), ("tune", "judged_on")):
        mask, other = (masks / f"{split}_0000{i}.png" for i in (0, 1))
        before = mask.read_bytes()
        shutil.copy(other, mask)
        assert {k for k, v in config.study_content(cfg).items() if v != first[k]} == {key}
        mask.write_bytes(before)
    assert config.study_content(cfg) == first and config.study_identity(cfg, {}) == settings
    clipped = training(tmp_path, "+trainer.gradient_clip_algorithm=value")
    assert config.study_identity(clipped, {})["trainer"] != settings["trainer"]


@pytest.mark.parametrize(
    ("devices", "more", "expected"),
    [
        (1, [], 1),
        (4, [], 4),
        ("auto", [], 3),
        (-1, [], 3),
        ("auto", ["trainer.accelerator=cpu"], 1),
        ("'2'", [], 2),
        ("'0,1'", [], 2),
        ("'2,'", [], 1),
        ("[0,2,3]", [], 3),
        (4, ["+trainer.num_nodes=2"], 8),
        (4, ["device=cuda"], 4),
        (4, ["device=cuda:1"], 1),
        ("auto", ["device=cpu"], 1),
        ("null", [], 3),
    ],
)
def test_the_number_of_processes(data_root, monkeypatch, devices, more, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    cfg = training(data_root, f"trainer.devices={devices}", *more)
    assert config.processes(cfg) == config.settings_identity(cfg)["processes"] == expected


@pytest.mark.parametrize("value", ["true", "3"])
def test_a_debug_switch_finishes_no_folder(data_root, tmp_path, value):
    given = (
        f"+trainer.fast_dev_run={value}",
        f"output_root={tmp_path}",
        "name=x",
        "device=cpu",
        "data=shapes",
    )
    with pytest.raises(
        ValueError, match=r"trainer.fast_dev_run=.*no usable run.*trainer.max_steps=2 name=try"
    ):
        door("train").run(
            training(data_root, *given, "segmenter=deeplabv3", "segmenter.base_channels=8")
        )
    assert not (tmp_path / "x").exists()
    assert identity_of(training(data_root, "+trainer.fast_dev_run=false"))


@pytest.mark.parametrize("value", ["1", "0.5"])
def test_batches_to_overfit_have_a_door_of_their_own(data_root, value):
    """Lightning's switch would take the first batches of an order that begins anew each time."""
    with pytest.raises(ValueError, match=rf"trainer.overfit_batches={value}: .*debug=overfit"):
        identity_of(training(data_root, f"+trainer.overfit_batches={value}"))
    assert identity_of(training(data_root, "+trainer.overfit_batches=0"))


def test_the_record_of_a_real_run(data_root):
    cfg = training(data_root)
    images, _ = config.training_sets(cfg)
    _, record = config.training_record(cfg, images)
    assert record["supervision"] == "real" and record["taxonomy"]["names"] == list(
        images.taxonomy.names
    )
    assert record["trained_on"] == {
        "source": "real",
        "data": "shapes",
        **images.fingerprint(),
        "shots": 3,
        "seed": 0,
        "after": None,
    }


@pytest.mark.parametrize(("shots", "number"), [("null", 3), ("all", 3), ("2", 2)])
@pytest.mark.parametrize("source", ["real", "mixed"])
def test_the_record_of_shots_of_a_list(data_root, synthetic_set, tmp_path, source, shots, number):
    ids = (data_root / "shapes/ImageSets/Segmentation/train.txt").read_text().split()
    chosen = [ids[i] for i in (4, 0, 3)]
    (tmp_path / "3.txt").write_text("".join(f"JPEGImages/{i}.png masks/{i}.png\n" for i in chosen))
    given = [f"source={source}", f"shots={shots}", synthetic_set]
    cfg = training(data_root, *given, f"shots_list='{tmp_path}/${{.size}}.txt'", "+size=3")
    images, _ = config.training_sets(cfg)
    identity, record = config.training_record(cfg, images)
    real = images if source == "real" else images.real
    assert set(real.ids) <= set(chosen) and len(real) == number == record["trained_on"]["shots"]
    found = identity["trained_on"]["shots_list"]
    assert (found["file"], found["images"]) == ("3.txt", 3)
    (tmp_path / "3.txt").write_text("".join(f"{i}\n" for i in ids[:3]))
    other = config.training_record(cfg, config.training_sets(cfg)[0])[0]
    assert other["trained_on"]["shots_list"]["ids"] != found["ids"]
    plain = training(data_root, *given)
    record = config.training_record(plain, config.training_sets(plain)[0])[1]
    assert "shots_list" not in record["trained_on"]


def test_the_record_of_a_fine_tuned_run(data_root, tmp_path):
    before = {"trained_on": {"source": "synthetic"}, "supervision": "A", "weights_sha256": "0" * 64}
    write_json(tmp_path / "run.json", before)
    cfg = training(data_root, f"init_from={tmp_path}")
    identity, record = config.training_record(cfg, config.training_sets(cfg)[0])
    assert record["trained_on"]["after"] == before["trained_on"]
    assert identity["init_from_sha256"] == "0" * 64


# Mixed training, images held out


@pytest.fixture(scope="module")
def synthetic_set(data_root):
    """The real training images as a synthetic set: its mask set is finished."""
    write_json(
        data_root / "shapes/SegmentationClass/masks.json",
        {"identity": {"settings": {"power": 4}}, "chosen_on": []},
    )
    return f"synthetic={data_root}/shapes"


def test_mixed_training_sets(data_root, synthetic_set):
    cfg = training(data_root, "source=mixed", "real_share=0.25", synthetic_set)
    images, tune = config.training_sets(cfg)
    assert (len(images.real), len(images.synthetic), images.real_share, tune) == (3, 5, 0.25, None)
    identity, record = config.training_record(cfg, images, tune)
    trained_on = record["trained_on"]
    assert (
        trained_on["real_share"] == 0.25
        and trained_on["shots"] == 3
        and record["supervision"] == "B"
    )
    assert trained_on["real"]["images"] == 3 and trained_on["synthetic"]["mask_settings"] == {
        "settings": {"power": 4}
    }
    for other in ("real_share=0.5", "shots=2", "source=real"):
        cfg = training(data_root, "source=mixed", "real_share=0.25", synthetic_set, other)
        assert config.training_record(cfg, config.training_sets(cfg)[0])[0] != identity, other


VALIDATED = "trainer.limit_val_batches=1.0"


@pytest.mark.parametrize(
    ("source", "shots", "sizes"),
    [("real", 5, (3, 2)), ("synthetic", "all", (3, 2)), ("mixed", 4, (2 + 5, 2))],
)
def test_images_are_held_out_for_validation_alone(data_root, synthetic_set, source, shots, sizes):
    given = (f"source={source}", f"shots={shots}", synthetic_set, "hold_out=2")
    cfg = training(data_root, *given, VALIDATED)
    images, tune = config.training_sets(cfg)
    assert (len(images), len(tune)) == sizes and tune.split == "train"
    trained_ids = images.real.ids if source == "mixed" else images.ids
    assert set(tune.ids).isdisjoint(trained_ids)
    _, record = config.training_record(cfg, images, tune)
    assert record["trained_on"]["hold_out"] == 2 and record["validated_on"]["ids"] == tune.ids
    unvalidated = training(data_root, *given)  # limit_val_batches: 0
    images, tune = config.training_sets(unvalidated)
    assert (len(images), tune) == (sum(sizes), None)
    assert "hold_out" not in config.training_record(unvalidated, images)[1]["trained_on"]


def test_an_unfinished_mask_set_is_not_trained_on(data_root):
    (data_root / "shapes/masks/half").mkdir(parents=True)
    cfg = training(
        data_root,
        "source=synthetic",
        "shots=null",
        f"synthetic={data_root}/shapes",
        "synthetic_masks=masks/half",
    )
    with pytest.raises(FileNotFoundError, match="masks.half is not finished"):
        config.training_record(cfg, config.training_sets(cfg)[0])


# Images that lie elsewhere


def test_real_images_are_found_where_the_data_group_says(data_root, tmp_path):
    places = f"data.images=[{tmp_path},{data_root}/shapes/JPEGImages]"
    images = config.real_data(training(data_root, places), "train")
    assert images.image_path(images.ids[0]).parent == data_root / "shapes/JPEGImages"
    images, _ = config.training_sets(training(data_root, f"data.images={tmp_path}"))
    with pytest.raises(FileNotFoundError, match="no image train_"):
        images[0]


def test_your_own_data_bring_their_classes(data_root):
    (data_root / "site").mkdir(exist_ok=True)
    (data_root / "site/taxonomy.yaml").write_text("name: site\nclasses: [scratch, dent]\n")
    cfg = compose("evaluate", "data=own", "data.name=site", f"data_root={data_root}")
    assert (
        config.taxonomy(cfg).names == ("scratch", "dent") and cfg.data.root == f"{data_root}/site"
    )


class Measured:
    """A generator that is asked how much fits into memory."""

    asked = 0

    def largest_batch(self, sample):
        assert sample.class_prompt == "aeroplane" and sample.class_ids == (1,)
        self.asked += 1
        return 16


def test_the_batch_is_measured_once_and_then_that_of_the_set(tmp_path, capsys):
    generator, cfg = (
        Measured(),
        OmegaConf.create({"unit_size": "auto", "folder": str(tmp_path), "seed": 0}),
    )
    assert config.unit_size(cfg, generator, taxonomy("voc")) == 16 and generator.asked == 1
    assert "unit_size=auto: 16 images at a time" in capsys.readouterr().out
    identity = {
        "generator": {},
        "plan_sha256": "",
        "image_format": ".png",
        "taxonomy": {"name": "voc", "names": []},
        "unit_size": 4,
    }
    write_json(tmp_path / "run.json", {"identity": identity})
    assert config.unit_size(cfg, generator, taxonomy("voc")) == 4 and generator.asked == 1
    assert config.unit_size(OmegaConf.create({"unit_size": 8}), generator, None) == 8


def test_words_that_will_not_be_stored_are_refused_before_any_image(tmp_path):
    """Joint attention has no keys of the class prompt while it draws."""
    captions = ["a photo of an apple", "an apple and a gold ring"]
    model = tiny.save("sd3_medium", tmp_path, captions)
    given = [
        "diffusion=sd3_medium",
        f"diffusion.model={model}",
        "diffusion.size=32",
        "diffusion.dtype=float32",
        "diffusion.cross_layers=null",
        "diffusion.reading=sampling",
        "prompts=shapes",
        f"data_root={tmp_path}",
        "name=set",
        "device=cpu",
        "num_images=2",
    ]
    with pytest.raises(ValueError, match="masks.source=class_prompt is not stored.*appended"):
        door("generate").run(compose("generate", *given))
    assert not (tmp_path / "synthetic").exists()
