"""The benchmarks run, at sizes that show nothing but that they do: their last line is JSON with
the figures they promise."""

import importlib
import json
import sys

import pytest
import torch

from benchmarks.full_size import MILLIONS, UNETS, build_unet
from benchmarks.reading import means, recorder_of


@pytest.fixture
def figures(monkeypatch, capsys):
    """``figures(name, *arguments)``: the JSON of the last line."""

    def run(name, *arguments):
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        importlib.import_module(f"benchmarks.{name}").main()
        found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        assert found["device"] and found["versions"]["torch"] and found["date"]
        return found

    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


def test_capture(figures):
    (row,) = figures("capture", "--models", "embedded", "--batch", 2, "--steps", 1, "--rounds", 1)[
        "capture"
    ]
    assert row["plain"]["time_over_plain"] == row["plain"]["peak_over_plain"] == 1
    assert (
        row["naive"]["peak_gb"] > row["capture"]["peak_gb"] > 0
    )  # all maps of two images against their mean


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_attention_needs_a_gpu(figures):
    with pytest.raises(SystemExit, match="on a GPU alone"):
        figures("attention")


def test_generate(figures):
    options = (
        "--images",
        3,
        "--batch",
        2,
        "--steps",
        2,
        "--rounds",
        1,
        "--options",
        "channels_last",
    )
    found = figures("generate", *options)["generate"]
    assert list(found) == ["plain", "ours", "channels_last", "in turns"]
    assert all(row["images_per_second"] > 0 and row["over_plain"] > 0 for row in found.values())


def test_label(figures):
    found = figures("label", "--samples", 8, "--rounds", 1)
    assert len(found["masks_per_second"]) == 6 and all(
        v > 0 for v in found["masks_per_second"].values()
    )


def test_scaling(figures):
    found = figures("scaling", "--workers", "--samples", 70, "--classes", 254)
    assert [row["samples"] for row in found["samples"]] == [70] and [
        row["classes"] for row in found["classes"]
    ] == [254]
    assert all(
        row[what]["seconds"] >= 0
        for row in found["samples"]
        for what in ("make", "find complete", "masks")
    )


@pytest.mark.full
def test_scaling_over_workers(figures):
    found = figures("scaling", "--workers", 1, 2, "--images", 8, "--samples", "--classes")
    assert [(row["workers"], row["made"]) for row in found["workers"]] == [(1, 8), (2, 8)]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_the_large_unets_are_read_where_the_paper_reads_them(kind):
    unet = build_unet(kind)  # checks the number of parameters
    states = torch.zeros(1, 77, UNETS[kind]["cross_attention_dim"])
    with torch.no_grad(), recorder_of(unet, states, 16, 32) as recorder:
        unet(torch.zeros(2, 4, 64, 64), torch.tensor([1, 1]), states.repeat(2, 1, 1))
    recorder.check()
    assert means(recorder, "self").shape == (1, 1024, 1024)
    assert means(recorder, "class_prompt").shape == (1, 256, 77)
    assert MILLIONS[kind] == pytest.approx(sum(p.numel() for p in unet.parameters()) / 1e6, abs=0.1)
