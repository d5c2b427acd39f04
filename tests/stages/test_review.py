"""evaluate.py stage=review, and the way back: corrected masks become the shots of the next
training."""

import csv
import io
import json
import re
import zipfile
from pathlib import Path

import label_studio_brush_rle_rs as other
import numpy as np
import pytest
import torch
from PIL import Image

from dd.__main__ import main
from dd.data.datasets import SegmentationFolder, encode_mask, read_image, read_mask, read_split
from dd.data.label_studio import SIZES, WORD
from dd.data.photos import source
from dd.evaluation.uncertainty import entropy
from dd.stages.prepare_own import OwnData, prepare_own
from dd.stages.review import ReviewSettings, print_review, review
from dd.stages.train_segmenter import load_weights
from dd.store.checkpoints import weights_sha256
from dd.store.provenance import read_json
from dd.taxonomy import Taxonomy
from dd.training.segmentation import Predictor, Views
from tests.doors import exit_status

ROOT = Path(__file__).parents[2]
CLASSES = Taxonomy("pets", ("cat", "dog"), colours={"cat": (250, 1, 2)})
IDENTITY = {"weights_sha256": "0" * 64}
FILES = [f"{name}.png" for name in "abcdef"] + ["more/g h.png"]


class Fake:
    """The brightest channel is the class; the fifth of red in the first pixel says how unsure it
    is of the whole image."""

    def __init__(self):
        self.scored = []

    def __call__(self, images):
        return [image.argmax(2).astype(np.uint8) for image in images]

    def probabilities(self, images):
        self.scored += [image.shape for image in images]
        return [self.chances(image) for image in images]

    @staticmethod
    def chances(image):
        p = float(image[0, 0, 0]) / 255 / 2
        return torch.tensor([1 - p, p, 0.0])[:, None, None].expand(3, *image.shape[:2])


@pytest.fixture
def photos(tmp_path):
    folder, rng = tmp_path / "photos", np.random.default_rng(0)
    (folder / "more").mkdir(parents=True)
    for i, file in enumerate(FILES):
        image = rng.integers(0, 256, (24 + i, 30, 3), dtype=np.uint8)
        image[0, 0] = (40 * (i + 1) % 241, 0, 0)  # e and f the most uncertain but for g
        Image.fromarray(image).save(folder / file)
    return folder


QUEUE = {"number": 3, "score": "entropy", "order": "uncertain", "distinct": 4}
QUEUE["address"] = "/data/local-files/?d=images/"


@pytest.fixture
def queue(tmp_path, photos):
    def make(target="queue", predictor=None, **more):
        rest = {key: more.pop(key) for key in ("batch_size", "seed") if key in more}
        return review(
            tmp_path / target,
            source(photos),
            predictor or Fake(),
            IDENTITY,
            CLASSES,
            ReviewSettings(**{**QUEUE, **more}),
            **rest,
        )

    return make


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def scores(photos):
    return {file: entropy(Fake.chances(read_image(photos / file))) for file in FILES}


def test_the_most_uncertain_come_first_with_all_that_the_tools_need(queue, photos, tmp_path):
    found, out = queue(), tmp_path / "queue"
    expected = scores(photos)
    order = sorted(FILES, key=lambda file: (-expected[file], file))[:3]
    assert (found["images"], found["scored"], found["similar"]) == (3, 7, 0)
    table = rows(out / "queue.csv")
    assert [(r["file"], r["rank"]) for r in table] == [(f, str(i)) for i, f in enumerate(order, 1)]
    assert [float(r["score"]) for r in table] == pytest.approx(
        [expected[f] for f in order], abs=1e-6
    )
    assert (out / "train.txt").read_text().splitlines() == order
    for file in order:
        assert (out / "images" / file).read_bytes() == (photos / file).read_bytes()
        mask = Image.open(out / f"masks/{file.removesuffix('.png')}.png")
        assert mask.mode == "P" and mask.getpalette()[:6] == [0, 0, 0, 250, 1, 2]
        assert np.array_equal(np.asarray(mask), read_image(photos / file).argmax(2))
    shown = re.findall(r'<img src="([^"]+)" alt="([^"]+)"', (out / "index.html").read_text())
    assert [alt for _, alt in shown] == [f"{rank}: {file}" for rank, file in enumerate(order, 1)]
    assert all(
        Image.open(out / path).size == Image.open(photos / file).size
        for (path, _), file in zip(shown, order, strict=True)
    )
    tasks = read_json(out / "label_studio.json")
    assert [t["data"]["file"] for t in tasks] == order and 'value="dog"' in (
        out / "label_studio.xml"
    ).read_text()
    with zipfile.ZipFile(out / "cvat.zip") as archive:
        assert archive.read("ImageSets/Segmentation/default.txt").decode().splitlines() == [
            f[:-4] for f in order
        ]
        assert archive.read(f"JPEGImages/{order[0]}") == (photos / order[0]).read_bytes()


def test_what_is_scored_is_not_scored_again_and_another_queue_is_refused(queue, photos, tmp_path):
    queue()
    before = {
        p: p.read_bytes()
        for p in (tmp_path / "queue").rglob("*")
        if p.is_file() and p.name != "review.json"
    }
    fake = Fake()
    assert queue(predictor=fake)["scored"] == 0 and fake.scored == []
    assert all(p.read_bytes() == data for p, data in before.items())
    with pytest.raises(FileExistsError, match="number: 3 -> 4"):
        queue(number=4)
    Image.new("RGB", (9, 9)).save(photos / "new.png")
    with pytest.raises(FileExistsError, match="reviews that were made otherwise"):
        queue()
    assert all(p.read_bytes() == data for p, data in before.items())


def test_a_mask_that_somebody_has_edited_stays_and_a_lost_one_is_made_again(queue, tmp_path):
    queue()
    first, second = sorted((tmp_path / "queue/masks").rglob("*.png"))[:2]
    before = second.read_bytes()
    first.write_bytes(encode_mask(np.full(read_mask(first).shape, 2, np.uint8)))
    second.unlink()
    queue()
    assert (read_mask(first) == 2).all() and second.read_bytes() == before


def test_an_interruption_loses_one_batch(queue, tmp_path):
    class Stopping(Fake):
        def probabilities(self, images):
            if self.scored:
                raise KeyboardInterrupt
            return super().probabilities(images)

    with pytest.raises(KeyboardInterrupt):
        queue(predictor=Stopping(), batch_size=2)
    assert not (tmp_path / "queue/queue.csv").exists()
    assert queue()["scored"] == 5


def test_images_that_look_alike_are_taken_once(queue, photos, tmp_path, capsys):
    expected = scores(photos)
    best = max(FILES, key=expected.get)
    (photos / "again.png").write_bytes((photos / best).read_bytes())
    (photos / "phone.heic").write_bytes(b"")
    found = queue(number=8)
    assert found["similar"] == 1 and found["images"] == 7
    assert [r["file"] for r in rows(tmp_path / "queue/queue.csv")][0] == min("again.png", best)
    print_review("out", found, 8)
    shown = capsys.readouterr().out
    assert "warning: 1 photographs are left out, as .heic" in shown
    assert "1 that look like one before them" in shown
    assert "number=8, but the others look like these: distinct=null takes them too" in shown
    assert queue("all", number=8, distinct=None)["images"] == 8


def test_the_control_is_drawn_by_its_seed_and_leaves_the_rest_unscored(queue, photos, tmp_path):
    def drawn(target, **more):
        found = queue(target, order="random", **more)
        return [r["file"] for r in rows(tmp_path / target / "queue.csv")], found["scored"]

    names, scored = drawn("one", seed=1)
    assert scored == 3 and drawn("two", seed=1, number=5)[0][:3] == names
    assert len({tuple(drawn(f"s{seed}", seed=seed)[0]) for seed in range(4)}) > 1
    (photos / names[0]).write_bytes(b"?")  # another one takes its place
    again, _ = drawn("three", seed=1)
    assert len(again) == 3 and again[:2] == names[1:]
    assert [r["file"] for r in rows(tmp_path / "three/unreadable.csv")] == [names[0]]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"number": 0}, "number=0: expected"),
        ({"score": "best"}, "score='best': expected entropy, margin"),
        ({"order": "name"}, "order='name': expected uncertain, random"),
        ({"distinct": 64}, "distinct=64: expected a whole number from 0 to 63"),
    ],
)
def test_settings_that_are_not_allowed(queue, tmp_path, setting, message):
    with pytest.raises(ValueError, match=message):
        queue(**setting)
    assert not (tmp_path / "queue").exists()


# The way back


def corrected(queue_folder):
    """{id: mask} as annotators leave them: one edited (a corner is uncertain, a square is dog),
    one emptied."""
    ids = [
        line.removesuffix(".png") for line in (queue_folder / "train.txt").read_text().splitlines()
    ]
    masks = {name: read_mask(queue_folder / f"masks/{name}.png").copy() for name in ids}
    masks[ids[0]][:5, :5], masks[ids[0]][10:15, 4:9] = 255, 2
    masks[ids[1]][:] = 0
    return masks


COLOURS = {
    "background": (0, 0, 0),
    "dog": (9, 200, 3),
    "cat": (61, 61, 245),
    "ignored": (7, 7, 7),
}  # CVAT's own, not ours
VALUES = {"background": 0, "cat": 1, "dog": 2, "ignored": 255}


def as_cvat(masks, path, colours=COLOURS, extra=()):
    with zipfile.ZipFile(path, "w") as archive:
        lines = [f"{name}:{','.join(map(str, colour))}::\n" for name, colour in colours.items()]
        archive.writestr("labelmap.txt", "# label:color_rgb:parts:actions\n" + "".join(lines))
        archive.writestr(
            "ImageSets/Segmentation/default.txt", "".join(f"{name}\n" for name in masks)
        )
        for name, mask in masks.items():
            if mask.any():  # CVAT writes no mask for an image without a shape
                pixels, data = np.zeros((*mask.shape, 3), np.uint8), io.BytesIO()
                for label, colour in COLOURS.items():
                    pixels[mask == VALUES[label]] = colour
                Image.fromarray(pixels).save(data, "PNG")
                archive.writestr(f"SegmentationClass/{name}.png", data.getvalue())
        for name, data in extra:
            archive.writestr(name, data)
    return path


def as_label_studio(masks, tasks, path):
    done = []
    for number, task in enumerate(tasks, 1):
        mask = masks[task["data"]["file"].removesuffix(".png")]
        height, width = mask.shape
        brushes = {
            label: ((mask == value) * np.uint8(255)).ravel().repeat(4)
            for label, value in VALUES.items()
            if value and (mask == value).any()
        }
        result = [
            {
                "id": f"x-{label}",
                "type": "brushlabels",
                "from_name": "label",
                "to_name": "image",
                "origin": "manual",
                "original_width": width,
                "original_height": height,
                "image_rotation": 0,
                "value": {
                    "format": "rle",
                    "brushlabels": [label],
                    "rle": [int(b) for b in other.encode_rle(values, WORD, list(SIZES))],
                },
            }
            for label, values in brushes.items()
        ]
        done.append(
            {"id": number, "data": task["data"], "annotations": [{"id": number, "result": result}]}
        )
    path.write_text(json.dumps(done))
    return path


@pytest.mark.parametrize("tool", ["cvat", "cvat folder", "label_studio"])
def test_what_comes_back_is_what_a_training_takes(queue, photos, tmp_path, tool):
    queue()
    out = tmp_path / "queue"
    masks = corrected(out)
    if tool == "label_studio":
        given = {
            "label_studio": as_label_studio(
                masks, read_json(out / "label_studio.json"), tmp_path / "export.json"
            )
        }
    else:
        given = {"cvat": as_cvat(masks, tmp_path / "export.zip")}
        if tool == "cvat folder":
            zipfile.ZipFile(tmp_path / "export.zip").extractall(tmp_path / "export")
            given = {"cvat": tmp_path / "export"}
    root, notes = prepare_own(
        tmp_path / "data",
        out / "taxonomy.yaml",
        "reviewed",
        OwnData(photos, split_files={"train": out / "train.txt"}, **given),
    )
    assert any("background" in note for note in notes)
    assert read_split(root, "train") == list(masks)
    for shots in (2, 3):
        data = SegmentationFolder(root, "train", CLASSES, shots=shots, seed=0)
        assert len(data.ids) == shots
        for (image, mask), name in zip((data[i] for i in range(shots)), data.ids, strict=True):
            assert np.array_equal(image, read_image(photos / f"{name}.png")) and np.array_equal(
                mask, masks[name]
            )


def test_our_own_archive_is_read_back_unchanged(queue, photos, tmp_path, capsys):
    queue()
    out = tmp_path / "queue"
    arguments = [
        "--taxonomy",
        str(out / "taxonomy.yaml"),
        "--images",
        str(out / "images"),
        "--cvat",
        str(out / "cvat.zip"),
    ]
    code = main(
        [
            "prepare",
            "own",
            "--root",
            str(tmp_path / "data"),
            *arguments,
            "--split",
            f"train={out / 'train.txt'}",
        ]
    )
    assert code == 0, capsys.readouterr().err
    for file in (out / "train.txt").read_text().splitlines():
        name = file.removesuffix(".png")
        assert np.array_equal(
            read_mask(tmp_path / f"data/own/SegmentationClass/{name}.png"),
            read_mask(out / f"masks/{name}.png"),
        )


def test_exports_of_cvat_that_do_not_fit(queue, photos, tmp_path):
    queue()
    masks = corrected(tmp_path / "queue")
    first = next(iter(masks))

    def own(path, **more):
        return prepare_own(
            tmp_path / "data",
            tmp_path / "queue/taxonomy.yaml",
            "bad",
            OwnData(photos, cvat=path, **more),
        )

    def refused(message, path):
        with pytest.raises(ValueError, match=message):
            own(path)

    horse = {{"dog": "horse"}.get(label, label): colour for label, colour in COLOURS.items()}
    refused(
        "1 labels in it are not a class of the taxonomy: horse. Map",
        as_cvat(masks, tmp_path / "1.zip", horse),
    )
    strange = {"background": (0, 0, 0), "horse": (1, 1, 1), "cow": (2, 2, 2)}
    refused(
        "none of the labels horse, cow is a class of taxonomy",
        as_cvat(masks, tmp_path / "9.zip", strange),
    )
    refused(
        "1 of its 4 images are not in --images.*nowhere",
        as_cvat({**masks, "nowhere": masks[first]}, tmp_path / "2.zip"),
    )
    refused(
        "1 colours that no label",
        as_cvat(masks, tmp_path / "3.zip", {k: c for k, c in COLOURS.items() if k != "dog"}),
    )
    refused(
        "30x29 .*its mask 30x4", as_cvat({**masks, first: masks[first][:4]}, tmp_path / "4.zip")
    )
    refused(
        "damaged, or not an image",
        as_cvat(
            dict(list(masks.items())[1:]),
            tmp_path / "5.zip",
            extra=[(f"SegmentationClass/{first}.png", b"?")],
        ),
    )
    refused(
        "have the same colour", as_cvat(masks, tmp_path / "6.zip", {**COLOURS, "cat": (0, 0, 0)})
    )
    (tmp_path / "no.zip").write_bytes(b"PK no more")
    refused("not a zip file", tmp_path / "no.zip")
    with zipfile.ZipFile(tmp_path / "empty.zip", "w") as archive:
        archive.writestr("annotations.xml", "")
    refused("has no labelmap.txt: export .*CVAT for images", tmp_path / "empty.zip")
    refused(
        "1 colours",
        as_cvat(
            masks,
            tmp_path / "7.zip",
            {"background": (0, 0, 0), "cat": COLOURS["cat"], "ignored": (7, 7, 7)},
        ),
    )
    with pytest.raises(ValueError, match="map: label 'cow' is not in the file; allowed: .*horse"):
        own(as_cvat(masks, tmp_path / "8.zip", horse), mapping={"horse": "dog", "cow": "dog"})
    root, _ = own(
        as_cvat(masks, tmp_path / "8.zip", {**horse, "nothing": (9, 9, 9)}),
        mapping={"horse": "dog"},
    )
    assert np.array_equal(read_mask(root / f"SegmentationClass/{first}.png"), masks[first])


def test_exports_of_label_studio_that_do_not_fit(queue, photos, tmp_path):
    queue()
    out = tmp_path / "queue"
    masks = corrected(out)

    def refused(message, change):
        path = as_label_studio(
            masks, read_json(out / "label_studio.json"), tmp_path / "export.json"
        )
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=message):
            prepare_own(
                tmp_path / "data", out / "taxonomy.yaml", "bad", OwnData(photos, label_studio=path)
            )

    def value(content):
        return content[0]["annotations"][0]["result"][0]["value"]

    refused("not a class of taxonomy .*horse", lambda c: value(c).update(brushlabels=["horse"]))
    refused("not in --images.*nowhere", lambda c: c[0]["data"].update(file="nowhere.png"))
    refused(
        "brush 1 .cat.: damaged run lengths", lambda c: value(c).update(rle=value(c)["rle"][:-9])
    )
    refused("labels 1 images twice", lambda c: c.append(c[0]))
    refused(
        "30x29 .*its mask 30x4",
        lambda c: [r.update(original_height=4) for r in c[0]["annotations"][0]["result"]],
    )


# The command


def test_the_command(finished_run, photos, tmp_path, capsys):
    folder, run, segmenter = finished_run(tmp_path / "run/seed=0")
    given = ["stage=review", "device=cpu", f"run={folder}", f"images={photos}", "review.number=2"]
    assert exit_status("evaluate", *given) == 0, capsys.readouterr().err
    out = folder / "review/photos-uncertain"
    predictor = Predictor(run, segmenter, Views(32))
    [p] = predictor.probabilities([read_image(photos / "a.png")])
    assert p.dtype == torch.float32 and torch.allclose(p.sum(0), torch.ones(p.shape[1:]))
    expected = {f: entropy(predictor.probabilities([read_image(photos / f)])[0]) for f in FILES}
    table = rows(out / "queue.csv")
    assert [r["file"] for r in table] == sorted(FILES, key=lambda f: -expected[f])[:2]
    assert [float(r["score"]) for r in table] == pytest.approx(
        [expected[r["file"]] for r in table], abs=1e-4
    )
    assert read_json(out / "review.json")["identity"]["weights_sha256"] == weights_sha256(
        load_weights(folder)
    )
    assert exit_status("evaluate", *given, "review.order=best") == 2
    assert "review.order='best': expected uncertain, random" in capsys.readouterr().err
