import json

import numpy as np
import pytest

from dd.__main__ import main
from dd.data.datasets import SegmentationFolder, read_captions, read_split
from dd.embedded.scenes import DOMAINS, scene
from dd.stages import prepare_shapes as prepare
from dd.stages.prepare_shapes import prepare_shapes
from dd.taxonomy import taxonomy

SIZES = {"train": 4, "tune": 2, "test": 3}


def files(root):
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def test_both_domains_hold_their_scenes(tmp_path):
    folders = prepare_shapes(tmp_path, SIZES)
    assert folders == [tmp_path / domain for domain in DOMAINS]
    for domain, root in zip(DOMAINS, folders, strict=True):
        captions = read_captions(root)
        assert len(captions) == sum(SIZES.values())
        for split, number in SIZES.items():
            data = SegmentationFolder(root, split, taxonomy("shapes"))
            assert len(data) == number
            for i, name in enumerate(data.ids):
                drawn, (image, mask) = scene(domain, split, i), data[i]
                assert np.array_equal(image, drawn.image) and np.array_equal(mask, drawn.mask)
                assert captions[name] == {
                    "id": name,
                    "caption": drawn.caption,
                    "classes": list(drawn.classes),
                }


def test_ids_of_the_splits_are_disjoint(tmp_path):
    root = prepare_shapes(tmp_path, SIZES)[0]
    ids = [name for split in SIZES for name in read_split(root, split)]
    assert len(set(ids)) == len(ids) == sum(SIZES.values())


def test_the_generators_scenes_are_not_written(tmp_path):
    root = prepare_shapes(tmp_path, SIZES)[0]
    images = {
        SegmentationFolder(root, s, taxonomy("shapes"))[i][0].tobytes()
        for s in SIZES
        for i in range(SIZES[s])
    }
    assert not images & {scene("shapes", "generator", i).image.tobytes() for i in range(20)}


def test_a_finished_folder_is_kept(tmp_path, monkeypatch):
    prepare_shapes(tmp_path, SIZES)
    before = files(tmp_path)
    monkeypatch.setattr(prepare, "scene", None)
    assert prepare_shapes(tmp_path, SIZES) == [tmp_path / domain for domain in DOMAINS]
    assert files(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed: 0 -> 1"), ({"sizes": {**SIZES, "tune": 3}}, r"sizes\.tune: 2 -> 3")],
)
def test_other_settings_are_refused_and_nothing_changes(tmp_path, change, named):
    prepare_shapes(tmp_path, SIZES)
    before = files(tmp_path)
    with pytest.raises(
        FileExistsError, match=f"data set .*shapes was made with other settings:\n  {named}\n"
    ):
        prepare_shapes(tmp_path, **{"sizes": SIZES, **change})
    assert files(tmp_path) == before


def test_an_interrupted_preparation_is_made_whole(tmp_path, monkeypatch):
    prepare_shapes(tmp_path / "whole", SIZES)
    drawn = []

    def crash(*arguments):
        drawn.append(arguments)
        if len(drawn) == 6:
            raise KeyboardInterrupt
        return scene(*arguments)

    monkeypatch.setattr(prepare, "scene", crash)
    with pytest.raises(KeyboardInterrupt):
        prepare_shapes(tmp_path / "again", SIZES)
    assert not (tmp_path / "again/shapes/run.json").exists()
    monkeypatch.undo()
    prepare_shapes(tmp_path / "again", SIZES)
    assert files(tmp_path / "again") == files(tmp_path / "whole")


def test_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(prepare, "SIZES", SIZES)
    assert main(["prepare", "shapes", "--root", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"ready: {tmp_path / domain}" for domain in DOMAINS
    ]
    assert json.loads((tmp_path / "shapes/run.json").read_text())["identity"]["sizes"] == SIZES
    monkeypatch.setattr(prepare, "SIZES", {"train": 1})
    assert main(["prepare", "shapes", "--root", str(tmp_path)]) == 2
    assert "error: data set" in capsys.readouterr().err


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["prepare", "shpes"])
    assert "choose from" in capsys.readouterr().err
