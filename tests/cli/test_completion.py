"""What a shell is offered for the settings of a root script."""

from argparse import Namespace

import pytest

from dd import config
from dd.cli.completion import complete_setting


def offered(door, prefix, *before):
    return complete_setting(prefix, Namespace(command=door, settings=[*before]))


@pytest.mark.parametrize("door", ["generate", "train", "evaluate"])
def test_every_key_that_is_offered_exists_and_none_is_missing(tmp_path, monkeypatch, door):
    monkeypatch.chdir(tmp_path)
    keys = [key.removesuffix("=") for key in offered(door, "")]
    composed = config.compose(door, ["name=a"])
    assert set(composed) - {"hydra"} <= {key.partition(".")[0] for key in keys}
    for key in keys:
        node = composed
        for part in key.split(".") if key not in ("experiment", "debug") else ():
            assert part in node, key
            node = node._get_node(part)


def test_choices_and_their_keys(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert offered("generate", "masks=") == ["masks=paper", "masks=refined"]
    assert offered("generate", "experiment=") == [
        f"experiment={e}" for e in ("coco", "shapes", "voc")
    ]
    assert "masks.power=" in offered("generate", "masks.")
    assert "masks.power=" not in offered("generate", "masks.", "masks=refined")
    assert offered("generate", "seed=") == offered("generate", "nothing") == []


def test_what_lies_in_the_working_folder_is_offered_too(tmp_path, monkeypatch):
    (tmp_path / "conf/masks").mkdir(parents=True)
    (tmp_path / "conf/masks/mine.yaml").write_text("sharp: 1\n")
    (tmp_path / "conf/masks/broken.yaml").write_text("a: [")
    monkeypatch.chdir(tmp_path)
    assert offered("generate", "masks=m") == ["masks=mine"]
    assert offered("generate", "masks.", "masks=mine") == ["masks.sharp="]
    assert offered("generate", "masks.", "masks=broken") == []
