import hashlib
import shutil
import signal

import pytest
import pytorch_lightning as pl
import torch

from dd import config
from dd.evaluation.supervision import supervision
from dd.stages.train_segmenter import load_weights, train_segmenter
from dd.store import checkpoints
from dd.store.locks import Busy, Lock
from dd.store.provenance import read_json, write_json
from dd.training.segmentation import EMA, LastCheckpoint, Segmentation

RECORD = {"taxonomy": {"name": "pets", "names": ["cat", "dog"]}, "supervision": "A", "scale": 8}


class Raise(pl.Callback):
    """Something happens at the end of a step, after the checkpoint."""

    def __init__(self, step, what):
        self.step, self.what = step, what

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            raise self.what


class Start(pl.Callback):
    """Keeps step and weights as the training begins."""

    def on_train_start(self, trainer, module):
        self.step = trainer.global_step
        self.weights = {k: v.clone() for k, v in module.segmenter.state_dict().items()}


@pytest.fixture
def run(tmp_path, tiny_segmenter, toy_data, make_trainer):
    """``run(name, steps=4, callbacks=(), identity={...}, record=RECORD, width=4,
    init_from=None)``."""

    def start(
        name, steps=4, callbacks=(), identity=None, record=RECORD, width=4, seed=0, init_from=None
    ):
        folder = tmp_path / name
        module = Segmentation(
            tiny_segmenter(width=width, seed=seed), ["background", "cat", "dog"], learning_rate=0.05
        )
        trainer = make_trainer(
            folder, steps, [EMA(0.7), LastCheckpoint(str(folder / "checkpoints"), 2), *callbacks]
        )
        identity = {"seed": seed, "trainer": {"max_steps": steps}} if identity is None else identity
        return train_segmenter(
            folder, module, toy_data(), lambda: trainer, identity, record, init_from=init_from
        )

    return start


def files(folder):
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_finished_run_says_what_it_is(run, tmp_path):
    done = run("first")
    assert done == read_json(tmp_path / "first/run.json")
    assert done["identity"] == {"seed": 0, "trainer": {"max_steps": 4}} and done["steps"] == 4
    assert RECORD.items() <= done.items()
    content = torch.load(tmp_path / "first/checkpoints/last.ckpt", weights_only=True)
    average = {k.removeprefix("segmenter."): v for k, v in content["state_dict"].items()}
    parts = []
    for name, value in sorted(average.items()):
        parts.append(f'["{name}", "{str(value.dtype)[6:]}", {list(value.shape)}]\n'.encode())
        parts.append(value.numpy().tobytes())
    assert done["weights_sha256"] == hashlib.sha256(b"".join(parts)).hexdigest()
    assert {"versions", "git_commit", "command", "seconds"} <= done.keys()


def test_a_finished_run_is_left_alone(run, tmp_path):
    done = run("first")
    before = files(tmp_path / "first")
    assert run("first", callbacks=[Raise(1, RuntimeError("trained again"))]) == done
    assert files(tmp_path / "first") == before


def test_a_finished_run_with_a_damaged_checkpoint_is_not_called_finished(run, tmp_path):
    run("first")
    path = tmp_path / "first/checkpoints/last.ckpt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match="first is finished, but its checkpoints/last.ckpt is damaged: its SHA-256"
    ):
        run("first")
    path.unlink()
    with pytest.raises(ValueError, match="is damaged: it is gone. Restore a copy of it"):
        run("first")


def test_a_folder_that_another_process_trains_in_is_left_alone(run, tmp_path):
    (tmp_path / "first").mkdir()
    with Lock(tmp_path / "first") as other:
        before = files(tmp_path / "first")
        with pytest.raises(
            Busy, match="first is being written by process .*Runs of another name train beside it"
        ):
            run("first")
        assert files(tmp_path / "first") == before and other.alone()
    assert run("first")["steps"] == 4 and not (tmp_path / "first/.lock").exists()


@pytest.mark.parametrize("finished", [True, False])
def test_other_settings_are_refused_and_nothing_changes(run, tmp_path, finished):
    if finished:
        run("first")
    else:
        with pytest.raises(RuntimeError):
            run("first", callbacks=[Raise(3, RuntimeError("crash"))])
    before = files(tmp_path / "first")
    with pytest.raises(
        FileExistsError,
        match=r"run .*first was made with other settings:\n  seed: 0 -> 1\n  trainer\.max_steps: "
        r"4 -> 5\n",
    ):
        run("first", steps=5, seed=1)
    with pytest.raises(FileExistsError, match="learning rate falls to 0 at the last step") as more:
        run("first", steps=9)
    onwards = f"name=first_9 init_from={tmp_path / 'first'} trainer.max_steps=5"
    assert str(more.value).endswith(onwards)
    assert ("finish it (trainer.max_steps=4), then" in str(more.value)) != finished
    with pytest.raises(FileExistsError, match="remove the folder to make it again.$"):
        run("first", steps=3)
    assert files(tmp_path / "first") == before


def test_an_interrupted_run_goes_on_from_its_last_checkpoint(run, tmp_path):
    with pytest.raises(RuntimeError, match="crash"):
        run("first", steps=6, callbacks=[Raise(5, RuntimeError("crash"))])
    assert not (tmp_path / "first/run.json").exists()
    start = Start()
    assert run("first", steps=6, callbacks=[start])["steps"] == 6
    assert start.step == 4
    run("second", steps=6)
    assert same(load_weights(tmp_path / "first"), load_weights(tmp_path / "second"))
    one, other = (read_json(tmp_path / name / "run.json") for name in ("first", "second"))
    assert one["weights_sha256"] == other["weights_sha256"]  # equal tensors, whatever the files are


def test_a_stopped_training_is_reported_as_stopped(run, tmp_path):
    handler = signal.getsignal(signal.SIGINT)
    try:
        with pytest.raises(KeyboardInterrupt, match="training stopped at step 3 of 4"):
            run("first", callbacks=[Raise(3, KeyboardInterrupt())])
    finally:
        signal.signal(signal.SIGINT, handler)  # Lightning ignores it from the first one on
    assert not (tmp_path / "first/run.json").exists()
    assert run("first")["steps"] == 4


def test_a_training_that_ends_early_is_not_finished(run, tmp_path):
    class Enough(pl.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 2

    with pytest.raises(KeyboardInterrupt, match="training stopped at step 2 of 4"):
        run("first", callbacks=[Enough()])
    assert not (tmp_path / "first/run.json").exists()


# Weights of a run


def test_averaged_and_raw_weights(run, tmp_path):
    run("first")
    checkpoint = torch.load(tmp_path / "first/checkpoints/last.ckpt", weights_only=True)
    average, raw = load_weights(tmp_path / "first"), load_weights(tmp_path / "first", "raw")
    with pytest.raises(ValueError, match="weights='Raw'; allowed: ema, raw"):
        load_weights(tmp_path / "first", "Raw")
    assert average.keys() == raw.keys() and all(
        k.startswith(("backbone.", "head.")) for k in average
    )
    assert same(
        average, {k.removeprefix("segmenter."): v for k, v in checkpoint["state_dict"].items()}
    )
    assert same(
        raw, {k.removeprefix("segmenter."): v for k, v in checkpoint["current_model_state"].items()}
    )
    assert not same(average, raw)


@pytest.mark.parametrize("weights", ["ema", "raw"])
def test_weights_that_are_not_those_of_the_run_are_refused(run, tmp_path, weights):
    mine, theirs = run("first")["weights_sha256"], run("other", seed=1)["weights_sha256"]
    for name in ("last.ckpt", "SHA256SUMS"):  # a sound file, of another run
        shutil.copy(tmp_path / "other/checkpoints" / name, tmp_path / "first/checkpoints" / name)
    said = (
        rf"last.ckpt holds other weights \(sha256 {theirs[:12]}.*first/run.json names "
        rf".*{mine[:12]}"
    )
    with pytest.raises(ValueError, match=said):
        load_weights(tmp_path / "first", weights)
    old = {k: v for k, v in read_json(tmp_path / "other/run.json").items() if k != "weights_sha256"}
    write_json(tmp_path / "other/run.json", {**old, "checkpoint_sha256": "0" * 64})
    with pytest.raises(ValueError, match="other/run.json.*weights_sha256"):
        load_weights(tmp_path / "other", weights)


def test_an_unfinished_run_has_no_weights(run, tmp_path):
    with pytest.raises(RuntimeError):
        run("first", callbacks=[Raise(3, RuntimeError("crash"))])
    for name in ("first", "nowhere"):
        with pytest.raises(
            FileNotFoundError,
            match=rf"{name} is not a finished training run .*train it with train\.py",
        ):
            load_weights(tmp_path / name)


# Fine-tuning


def test_fine_tuning_begins_with_the_averaged_weights(run, tmp_path):
    run("first")
    start = Start()
    run("second", seed=1, callbacks=[start], init_from=tmp_path / "first")
    assert start.step == 0
    assert same(start.weights, load_weights(tmp_path / "first"))
    assert not same(load_weights(tmp_path / "second"), load_weights(tmp_path / "first"))


def test_an_interrupted_fine_tuning_goes_on_with_its_own_weights(run, tmp_path):
    run("first")
    with pytest.raises(RuntimeError):
        run(
            "second",
            seed=1,
            callbacks=[Raise(3, RuntimeError("crash"))],
            init_from=tmp_path / "first",
        )
    start = Start()
    run("second", seed=1, callbacks=[start], init_from=tmp_path / "first")
    assert start.step == 2 and not same(start.weights, load_weights(tmp_path / "first"))


def test_a_run_with_other_classes_is_no_start(run, tmp_path):
    run("first")
    other = {**RECORD, "taxonomy": {"name": "farm", "names": ["cow", "pig"]}}
    with pytest.raises(
        ValueError, match=r"trained for the classes \['cat', 'dog'\], this run has \['cow', 'pig'\]"
    ):
        run("second", record=other, init_from=tmp_path / "first")
    assert not (tmp_path / "second").exists()


def test_a_list_of_classes_may_be_called_otherwise(run, tmp_path):
    """As one that came back from a labelling tool: the names count."""
    run("first")
    run(
        "second",
        record={**RECORD, "taxonomy": {"name": "reviewed", "names": ["cat", "dog"]}},
        init_from=tmp_path / "first",
    )


@pytest.mark.parametrize("change", ["a layer more", "a wider layer"])
def test_another_segmenter_is_no_start(run, tmp_path, change):
    run("first")
    path = tmp_path / "first/checkpoints/last.ckpt"
    if change == "a layer more":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state_dict"]["segmenter.head.extra"] = torch.zeros(1)
        checkpoints.save(checkpoint, path)
        state = {k.removeprefix("segmenter."): v for k, v in checkpoint["state_dict"].items()}
        done = read_json(tmp_path / "first/run.json")
        write_json(
            tmp_path / "first/run.json",
            {**done, "weights_sha256": checkpoints.weights_sha256(state)},
        )
    with pytest.raises(
        ValueError, match=r"init_from=.*its segmenter is another one(?s:.)*Use the same segmenter="
    ):
        run("second", width=4 if change == "a layer more" else 5, init_from=tmp_path / "first")
    assert not (tmp_path / "second/run.json").exists()


def test_an_unfinished_run_is_no_start(run, tmp_path):
    write_json(tmp_path / "first/run.json", RECORD)
    with pytest.raises(FileNotFoundError, match="first is not a finished training run"):
        run("second", init_from=tmp_path / "first")


def test_a_checkpoint_cannot_run_code(run, tmp_path):
    run("first")
    path, reached = tmp_path / "first/checkpoints/last.ckpt", tmp_path / "reached"

    class Evil:
        def __reduce__(self):
            return reached.write_text, ("code ran",)

    checkpoints.save({"state_dict": Evil()}, path)
    with pytest.raises(Exception, match="(?i)weights.only"):
        load_weights(tmp_path / "first")
    assert not reached.exists()


# What a run is called


def trained(source, shots=None, after=None, teacher=None, **more):
    masks = {
        "settings": {},
        "heat": "",
        **({"teacher": {"trained_on": teacher}} if teacher else {}),
    }
    where = (
        {"synthetic": {"mask_settings": masks}} if source == "mixed" else {"mask_settings": masks}
    )
    return {
        "source": source,
        "shots": shots,
        "after": after,
        **({} if source == "real" else where),
        **more,
    }


SYNTHETIC, FEW, ALL = trained("synthetic"), trained("real", 16), trained("real", "all")


@pytest.mark.parametrize(
    ("trained_on", "before", "expected"),
    [
        (SYNTHETIC, None, "A"),
        (trained("synthetic", after=SYNTHETIC), "A", "A"),
        (trained("synthetic", teacher=SYNTHETIC), None, "A"),
        (trained("synthetic", teacher=trained("synthetic", teacher=SYNTHETIC)), None, "A"),
        (FEW, None, "real"),
        (ALL, None, "real"),
        (
            trained("real", 16, after=SYNTHETIC),
            "A",
            "A",
        ),  # fine-tuned: the class of the synthetic set
        (trained("real", 16, after=trained("mixed", 8)), "B", "B"),
        (trained("real", "all", after=trained("mixed", 8)), "B", "B"),  # however many follow
        (trained("mixed", 16), None, "B"),
        (trained("mixed", "all"), None, "real"),
        (trained("mixed", 16, teacher=ALL), None, "real"),
        (trained("synthetic", after=FEW), "real", "B"),
        (trained("synthetic", teacher=FEW), None, "B"),
        (trained("synthetic", teacher=ALL), None, "real"),
        # a teacher that was fine-tuned is of class A itself, but saw real labels
        (trained("synthetic", teacher=trained("real", 16, after=SYNTHETIC)), None, "B"),
        (
            trained("synthetic", teacher=trained("synthetic", teacher=trained("mixed", 16))),
            None,
            "B",
        ),
        (trained("synthetic", after=trained("synthetic", teacher=ALL)), "real", "real"),
    ],
)
def test_only_a_run_that_no_real_label_reached_is_of_class_a(trained_on, before, expected):
    assert supervision(trained_on, [], before) == expected


@pytest.mark.parametrize(
    "edit",
    [
        {"taxonomy": {"name": "pets", "names": ["cat"]}},
        {
            "segmenter": {
                "_target_": "dd.segmenters.deeplabv3.DeepLabV3",
                "depth": 18,
                "base_channels": 16,
            }
        },
    ],
)
def test_a_run_json_of_another_segmenter_is_named(finished_run, tmp_path, edit):
    """Its checksum is right: whoever edited it meant to."""
    folder, run, _ = finished_run(tmp_path / "run")
    write_json(folder / "run.json", {**run, **edit})
    with pytest.raises(
        ValueError, match=r"run: its segmenter is another one, or has other classes"
    ):
        config.trained_run(folder)
    write_json(folder / "run.json", {**run, "weights_sha256": 5})
    with pytest.raises(
        ValueError, match=r"run.json is damaged: weights_sha256 is 5, expected a text"
    ):
        config.trained_run(folder)
