"""Damaged and hostile files: each reader works, or says which file is wrong. No foreign
traceback, hang, or torn file."""

import json
import shutil
import signal
from contextlib import contextmanager
from functools import partial

import hydra
import numpy as np
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from benchmarks.synthesis import synthesize
from dd import config
from dd.data.coco_json import category_values, draw, images_of, read_coco
from dd.data.datasets import SegmentationFolder, read_captions
from dd.masks.from_heat import MaskSettings
from dd.prompts.captions import CaptionFile, NounCaptions
from dd.prompts.coco import CocoCaptions
from dd.report.compare import read_metrics
from dd.stages.label import label
from dd.stages.verify import verify
from dd.store.provenance import temporary_files
from dd.store.samples import read_plan, read_records
from dd.taxonomy import Taxonomy, read_taxonomy
from tests.faults import fake

PETS = Taxonomy("pets", ["cat", "dog", "cow"])
FOUND = {"verify": 0}  # how often verify had something to say
PIECES = [
    b"null",
    b"-1",
    b"1e999",
    b"NaN",
    b"[]",
    b"{}",
    b'""',
    b'"\\ud800"',
    b"\xff\xfe",
    b"\x00",
    b"..",
    b"../../x",
    b"/etc/x",
    b"[" * 3000,
    b"9" * 5000,
    b"\n",
    b",",
    b'"',
    b"true",
    b"!!python/object:os.system",
    b"&a [*a]",
    "µ😀".encode(),
    b"255",
]


@st.composite
def damage(draw_):
    """A function bytes -> bytes: one to four times something is put in, taken out, doubled,
    flipped or cut off."""
    share = st.floats(0, 1, exclude_max=True)
    kinds = st.sampled_from(["insert", "replace", "remove", "double", "flip", "cut"])
    steps = draw_(
        st.lists(
            st.tuples(kinds, share, share, st.sampled_from(PIECES) | st.binary(max_size=8)),
            min_size=1,
            max_size=4,
        )
    )

    def apply(data: bytes) -> bytes:
        for kind, where, length, piece in steps:
            at = int(where * len(data))
            end = min(len(data), at + 1 + int(length**4 * len(data)))
            if kind == "flip" and data:
                data = data[:at] + bytes([data[at] ^ (1 + int(length * 255))]) + data[at + 1 :]
            else:
                middle = {
                    "insert": piece + data[at:end],
                    "replace": piece,
                    "double": data[at:end] * 2,
                }.get(kind, b"")
                data = data[:at] + middle + (b"" if kind == "cut" else data[end:])
        return data

    return apply


@contextmanager
def no_longer_than(seconds):
    """A hang is an error that no reader may give."""

    def stop(*_):
        raise SystemError("a reader hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A synthetic set, prompts, a taxonomy, COCO annotations and settings, all sound."""
    root = tmp_path_factory.mktemp("mutations")
    synthesize(
        root / "set",
        fake.FakeGenerator(),
        fake.prompts,
        PETS,
        6,
        1,
        2,
        "png",
        build=partial(fake.build),
    )
    label(root / "set", MaskSettings(power=1, threshold=0.5, band=0.1))
    rows = [
        {"caption": f"a {name} on grass", "classes": [name], "filename": f"{i}.jpg"}
        for i, name in enumerate(PETS.names)
    ]
    (root / "captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (root / "captions.json").write_text(json.dumps(rows))
    lines = [{"id": f"i{i}", **row} for i, row in enumerate(rows)]
    (root / "set/captions.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    annotations = [
        {
            "id": i,
            "image_id": 1,
            "category_id": i,
            "iscrowd": 0,
            "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]],
            "area": 64,
            "bbox": [1, 1, 8, 8],
        }
        for i in (1, 2)
    ]
    annotations += [
        {
            **annotations[0],
            "id": 3,
            "iscrowd": 1,
            "segmentation": {"size": [12, 16], "counts": [0, 12, 180]},
        }
    ]
    images = [{"id": 1, "file_name": "a.jpg", "height": 12, "width": 16}]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(PETS.names)]
    coco = {"images": images, "annotations": annotations, "categories": categories}
    (root / "coco.json").write_text(json.dumps(coco))
    said = [{"image_id": 1, "id": 1, "caption": "a cat and a dog"}]
    (root / "coco_captions.json").write_text(json.dumps({"images": images, "annotations": said}))
    (root / "taxonomy.yaml").write_text(
        "name: pets\nclasses:\n- {name: cat, synonyms: [kitten], colour: [1, 2, 3]}\n- dog\n- cow\n"
    )
    reading = {
        "cross_resolution": None,
        "self_resolution": 16,
        "cross_layers": ["up"],
        "cross_heads": None,
    }
    calibration = {"by": "calibrate", "shots": 16, "generator": {"weights_sha256": "0" * 64}}
    chosen = {
        "masks": {"power": 1, "threshold": 0.5, "band": 0.1, "source": "class_prompt"},
        "diffusion": reading,
    }
    (root / "chosen.yaml").write_text(
        yaml.safe_dump({**chosen, "chosen_on": [], "calibration": calibration})
    )
    confusion = [[8, 0], [2, 6]]
    measured = {
        "data": "d",
        "split": "test",
        "masks": "m",
        "num_images": 1,
        "weights_sha256": "0" * 64,
        "protocol": {},
        "iou": {"background": 80.0, "cat": 75.0},
        "supervision": "A",
        "trained_on": {},
        "masks_made_with": None,
        "miou": 77.5,
        "pixel_accuracy": 87.5,
        "confusion": confusion,
    }
    (root / "metrics.json").write_text(json.dumps(measured))
    return root


def look(root, masks="SegmentationClass"):
    data = SegmentationFolder(root / "set", "train", PETS, masks)
    data.fingerprint()
    return [data[i] for i in range(len(data))]


def relabel(root):
    return label(root / "set", MaskSettings(power=0, threshold=0.5, band=0.1), "other")


def whole(root):
    FOUND["verify"] += bool(verify(root / "set", workers=1))


def coco(root):
    content = read_coco(root / "coco.json")
    try:
        images, _ = images_of(content, category_values(content["categories"], PETS))
        return [draw(i) for i in images]
    except ValueError as error:  # the stages name the file
        raise ValueError(f"coco.json: {error}") from None


def chosen(root):
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(config.CONF), version_base="1.3"):
        cfg = hydra.compose("generate", [f"masks_from={root}/chosen.yaml"])
    return config.masks_from(cfg)


READERS = {  # what is damaged, and who reads it
    "captions.jsonl": [lambda r: CaptionFile(str(r / "captions.jsonl"))(PETS, None, 0)],
    "captions.json": [lambda r: NounCaptions(str(r / "captions.json"))(PETS, None, 0)],
    "coco_captions.json": [
        lambda r: CocoCaptions(str(r / "coco_captions.json"), str(r / "coco.json"))(PETS, None, 0)
    ],
    "coco.json": [coco],
    "taxonomy.yaml": [lambda r: read_taxonomy(r / "taxonomy.yaml")],
    "chosen.yaml": [chosen],
    "metrics.json": [lambda r: read_metrics(r / "metrics.json")],
    "set/captions.jsonl": [lambda r: read_captions(r / "set")],
    "set/plan.jsonl": [lambda r: read_plan(r / "set"), whole],
    "set/records/0.jsonl": [lambda r: read_records(r / "set"), whole, relabel],
    "set/run.json": [whole, look, relabel],
    "set/ImageSets/Segmentation/train.txt": [look, whole],
    "set/JPEGImages/000001.png": [look, whole, relabel],
    "set/SegmentationClass/000001.png": [look, whole],
    "set/SegmentationClass/masks.json": [look, whole],
    "set/heat/000001.safetensors": [relabel, whole],
}


def check(root, file, change):
    path = root / file
    sound = path.read_bytes()
    path.write_bytes(change(sound))
    try:
        for read in READERS[file]:
            try:
                with no_longer_than(20):
                    read(root)
            except (*config.USER_ERRORS, OSError) as error:
                assert isinstance(error, config.USER_ERRORS), f"{type(error).__name__}: {error}"
                assert any(
                    part in str(error) for part in (path.name, path.stem, str(root / "set"))
                ), f"of which file? {error!r}"
    finally:
        path.write_bytes(sound)
        shutil.rmtree(root / "set/masks", ignore_errors=True)
    assert not temporary_files(root)


PATIENT = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
LOOK = {"deadline": None, "suppress_health_check": PATIENT, "database": None}


@pytest.mark.parametrize("file", READERS)
@given(change=damage())
@settings(max_examples=15, derandomize=True, **LOOK)
def test_a_damaged_file_is_read_or_named(world, file, change):
    check(world, file, change)


@pytest.mark.full
@pytest.mark.parametrize("file", READERS)
@given(change=damage())
@settings(max_examples=150, **LOOK)
def test_many_damaged_files_are_read_or_named(world, file, change):
    check(world, file, change)


OVERRIDES = [
    "experiment=shapes",
    "masks.power=2",
    "sweep.threshold=[0.3,0.4]",
    "masks={power: 1, band: 0.1}",
    "num_images=12",
    "~masks.band",
    "+prompts.x=1",
    "diffusion.model='a/b'",
    "quality.rules.faint=null",
    "data=voc",
    "seed=0,1",
    "folder=${oc.env:HOME}",
]


@pytest.mark.parametrize("examples", [60, pytest.param(400, marks=pytest.mark.full)])
def test_damaged_overrides_are_understood_or_explained(examples):
    @given(st.sampled_from(OVERRIDES), damage())
    @settings(max_examples=examples, derandomize=True, **LOOK)
    def run(override, change):
        text = change(override.encode()).decode("utf-8", "surrogateescape")
        try:
            with no_longer_than(20):
                config.check_overrides("generate", [config.quoted(text)])
        except config.USER_ERRORS as error:
            assert str(error).strip()

    run()


def test_the_sound_files_are_read(world):
    """What is damaged above is what these readers read; and none of them complains of it."""
    for file, readers in READERS.items():
        for read in readers:
            read(world)
        assert (world / file).is_file()
    shutil.rmtree(world / "set/masks")
    assert (
        len(look(world)) == 6 and verify(world / "set") == [] and np.asarray(coco(world)[0]).any()
    )
