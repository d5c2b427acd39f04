"""Which runs are seeds of one recipe, what an arm is called, and which recipe is an arm's main
row."""

import random
import shutil

import pytest

from dd.report.recipes import arm_of, chain, recipe, telling
from dd.report.rows import arrange
from dd.report.summary import collect, separate
from dd.store.provenance import read_json, write_json

SEGMENTER = {"_target_": "dd.segmenters.deeplabv3.DeepLabV3", "depth": 18}
REAL = {
    "source": "real",
    "data": "here",
    "root": "somewhere",
    "split": "train",
    "masks": "m",
    "after": None,
}
MADE = {"settings": {"power": 4, "threshold": 0.6}, "heat": "h0"}
SYNTHETIC = {
    "source": "synthetic",
    "root": "set",
    "split": "train",
    "masks": "SegmentationClass",
    "images": 512,
    "content": "c0",
    "shots": None,
    "after": None,
    "mask_settings": MADE,
}


def a_run(trained_on, seed=0, steps=60, rate=3e-3, weights="w", before=None, **more):
    """run.json as training writes it."""
    trained_on = {**trained_on, "seed": seed, "after": before and before["trained_on"]}
    identity = {
        "segmenter": SEGMENTER,
        "optimizer": {"learning_rate": rate},
        "batch_size": 16,
        "seed": seed,
        "trainer": {"max_steps": steps, "callbacks": {"ema": {"decay": 0.98}}},
        "trained_on": trained_on,
        "init_from_sha256": before and before["weights_sha256"],
        **more,
    }
    return {
        "identity": identity,
        "segmenter": SEGMENTER,
        "trained_on": trained_on,
        "steps": steps,
        "weights_sha256": weights,
        "supervision": "A",
        "seconds": 1.0,
    }


def real(shots, seed=0, **more):
    """Of ``shots`` images, which the seed draws."""
    content = "all of them" if shots == "all" else f"drawn by {seed}"
    data = {**REAL, "shots": shots, "images": 768 if shots == "all" else shots, "content": content}
    return a_run(data, seed, **more)


def by_weights(*runs):
    found = {}
    for run in runs:
        found.setdefault(run["weights_sha256"], []).append(run)
    return found


def test_images_of_a_list_are_no_draw_by_seed():
    data = {**REAL, "shots": 92, "images": 92, "content": "those of the list"}
    listed = a_run({**data, "shots_list": {"file": "92.txt", "images": 92, "ids": "i0"}})
    assert recipe(listed).words == "92 of 92.txt real only" and recipe(listed).shots == "92"
    assert recipe(listed).key != recipe(a_run(data)).key


def test_seeds_differ_in_the_seed_and_in_what_follows_from_it():
    first, second = recipe(real(16, 0)), recipe(real(16, 1))
    assert first.key == second.key and (first.seed, second.seed) == (0, 1)
    origins = [a_run(SYNTHETIC, s, steps=540, weights=f"w{s}") for s in (0, 1)]
    tuned = [real(16, s, before=origins[s]) for s in (0, 1)]
    found = [recipe(run, by_weights(*origins)) for run in tuned]
    assert found[0].key == found[1].key and {r.steps for r in found} == {600}
    held = [a_run({**SYNTHETIC, "hold_out": 8, "content": f"but for {s}"}, s) for s in (0, 1)]
    assert recipe(held[0]).key == recipe(held[1]).key


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rate": 1e-5, "steps": 2}, ["rate 1e-5", "2 steps"]),
        ({"batch_size": 8}, ["batch 8"]),
        ({"trainer": {"max_steps": 60, "callbacks": {"ema": None}}}, ["ema=off"]),
        ({"transform": {"flip": 0.5}}, ["transform"]),
        ({"devices": 4}, ["devices=4"]),
    ],
)
def test_a_setting_makes_another_recipe_and_names_it(change, words):
    plain, other = recipe(real(16)), recipe(real(16, 1, **change))
    assert plain.key != other.key and telling(other.settings, plain.settings) == words


def test_what_is_not_drawn_by_the_seed_counts():
    corrected = real("all")
    corrected["trained_on"]["content"] = "corrected masks"
    assert recipe(real("all")).key != recipe(corrected).key
    assert telling(recipe(corrected).settings, recipe(real("all")).settings) == [
        "other images or masks"
    ]
    assert recipe(real(16)).key != recipe(real(64)).key
    elsewhere = real(16)
    elsewhere["trained_on"]["data"] = "there"
    assert recipe(real(16)).key != recipe(elsewhere).key


def test_images_drawn_from_other_lists_or_masks_are_no_seeds():
    """Two plants whose folders are both called own: the same number of images, drawn from other
    ones."""

    def of(plant, seed):
        run = real(16, seed)
        run["trained_on"] |= {
            "data": "own",
            "root": f"plant_{plant}",
            "drawn_from": f"list {plant}",
        }
        return recipe(run)

    assert of("a", 0).key == of("a", 1).key and of("a", 0).key != of("b", 1).key


def test_runs_that_share_a_start_are_no_independent_seeds():
    """Three fine-tunings of one run: that of its own seed is another recipe, and the row of the
    others names the start."""
    start = a_run(SYNTHETIC, 0, steps=540, weights="w0")
    tuned = [recipe(real(16, s, before=start), by_weights(start)) for s in (0, 1, 2)]
    assert tuned[1].key == tuned[2].key != tuned[0].key
    assert telling(tuned[1].settings, tuned[0].settings) == ["before it seed=0"]
    starts = [a_run(SYNTHETIC, s, steps=540, weights=f"w{s}") for s in (0, 1)]
    each = [recipe(real(16, s, before=starts[s]), by_weights(*starts)) for s in (0, 1)]
    assert each[0].key == each[1].key == tuned[0].key
    gone = [recipe(real(16, s, before=starts[0])) for s in (0, 1)]  # the start is no longer there
    assert gone[0].key != gone[1].key


def test_folders_and_what_a_setting_was_chosen_on_do_not_count():
    plain, other = (
        a_run(SYNTHETIC),
        a_run({**SYNTHETIC, "masks": "masks/again"}, chosen_on={"labels": 128}),
    )
    assert recipe(plain).key == recipe(other).key
    moved = real(16)
    moved["trained_on"]["root"] = "elsewhere"
    assert recipe(real(16)).key == recipe(moved).key


def test_the_run_before_counts_by_its_recipe():
    before = [
        a_run(SYNTHETIC, steps=540, weights="a"),
        a_run(SYNTHETIC, steps=540, rate=1e-3, weights="b"),
    ]
    tuned = [real(16, before=run) for run in before]
    first, second = (recipe(run, by_weights(*before)) for run in tuned)
    assert first.key != second.key
    assert telling(second.settings, first.settings) == ["before it rate 1e-3"]
    gone = recipe(tuned[0])
    assert gone.steps is None and gone.key not in (first.key, second.key)


def test_a_training_that_changes_nothing_is_not_its_own_origin():
    before = a_run(SYNTHETIC, steps=540, weights="same")
    after = real(16, steps=0, weights="same", before=before)
    assert recipe(after, by_weights(after, before)).steps == 540


def test_masks_that_each_seed_made_are_one_recipe():
    teachers = [a_run(SYNTHETIC, s, steps=540, weights=f"w{s}") for s in (0, 1)]
    students = [
        a_run(
            {
                **SYNTHETIC,
                "masks": f"masks/self_{s}",
                "content": f"c{s}",
                "mask_settings": {
                    "settings": {"confidence": None},
                    "images": "i",
                    "teacher": {
                        "weights_sha256": f"w{s}",
                        "supervision": "A",
                        "trained_on": teachers[s]["trained_on"],
                    },
                },
            },
            s,
        )
        for s in (0, 1)
    ]
    found = [recipe(run, by_weights(*teachers)) for run in students]
    assert found[0].key == found[1].key and found[0].arm == "self_training"

    def calibrated(seed, power, shots=16):
        chosen = {
            "by": "calibrate",
            "data": "here",
            "split": "train",
            "shots": shots,
            "seed": seed,
            "ids": [f"i{seed}"],
            "miou": 70.0 + seed,
            "timesteps": [1],
        }
        masks = {"settings": {"power": power}, "heat": "h0", "calibration": chosen}
        return recipe(a_run({**SYNTHETIC, "content": f"c{seed}", "mask_settings": masks}, seed))

    assert calibrated(0, 4).key == calibrated(1, 2).key  # a few images of each seed chose
    assert calibrated(0, 4).key != calibrated(1, 4, shots=64).key
    assert calibrated(0, 4).key != recipe(a_run(SYNTHETIC)).key


def test_draws_of_a_synthetic_set_are_told_where_the_set_is_at_hand(tmp_path):
    runs = []
    for draw in (0, 1):
        identity = {
            "generator": {"weights_sha256": "g"},
            "plan_sha256": f"p{draw}",
            "seed": draw,
            "num_images": 512,
        }
        command = f"generate.py experiment=shapes seed={draw} name=set{draw}"
        made = {"identity": identity, "command": command, "prompts_sha256": "p"}
        write_json(tmp_path / f"set{draw}/run.json", made)
        masks = {**MADE, "heat": f"h{draw}"}
        write_json(tmp_path / f"set{draw}/SegmentationClass/masks.json", {"identity": masks})
        runs.append(
            a_run(
                {**SYNTHETIC, "root": f"set{draw}", "content": f"c{draw}", "mask_settings": masks}
            )
        )
    from dd.report.summary import synthetic_sets

    found = [recipe(run, sets=synthetic_sets(tmp_path)) for run in runs]
    assert found[0].key == found[1].key and [r.draw for r in found] == [0, 1]
    unknown = [recipe(run) for run in runs]
    assert unknown[0].key != unknown[1].key and {r.draw for r in unknown} == {None}
    prompts = {
        "identity": {**identity, "plan_sha256": "q"},
        "command": f"{command} prompts.append=false",
        "prompts_sha256": "others",
    }
    write_json(tmp_path / "set1/run.json", prompts)
    assert len({recipe(run, sets=synthetic_sets(tmp_path)).key for run in runs}) == 2
    for draw, prompts in (
        (0, "p"),
        (1, "edited"),
        (1, "p"),
    ):  # of one experiment, whose prompts somebody edited
        made = read_json(tmp_path / f"set{draw}/run.json") | {
            "prompts_sha256": prompts,
            "command": command,
        }
        write_json(tmp_path / f"set{draw}/run.json", made)
        keys = {recipe(run, sets=synthetic_sets(tmp_path)).key for run in runs}
        assert len(keys) == (1 if prompts == "p" and draw else 2)
    write_json(
        tmp_path / "set1/SegmentationClass/masks.json", {"identity": {**MADE, "heat": "made anew"}}
    )
    assert (
        recipe(runs[1], sets=synthetic_sets(tmp_path)).draw is None
    )  # not the set that was trained on


def test_an_arm_is_what_was_trained_on_in_which_order():
    synthetic, whole = a_run(SYNTHETIC)["trained_on"], real("all")["trained_on"]
    mixed = {"source": "mixed", "shots": 16, "after": None, "synthetic": SYNTHETIC, "real": REAL}
    few = {**REAL, "shots": 8}
    found = {
        "synthetic_only": (synthetic, "synthetic"),
        "finetuned": ({**few, "after": synthetic}, "synthetic, then 8 real"),
        "real_only": (few, "8 real"),
        "mixed": (mixed, "synthetic and 16 real"),
    }
    for arm, (trained_on, words) in found.items():
        assert (arm_of(trained_on), chain(trained_on)) == (arm, words)
    for before, words in (
        (whole, "all real, then 8 real"),
        (mixed, "synthetic and 16 real, then 8 real"),
    ):
        assert (arm_of({**few, "after": before}), chain({**few, "after": before})) == (
            "other",
            words,
        )
    deep = {**few, "after": {**few, "shots": 4, "after": whole}}
    assert chain(deep) == "all real, then 4 real, then 8 real"
    taught = {**SYNTHETIC, "mask_settings": {"teacher": {"trained_on": few}}}
    assert (arm_of(taught), chain(taught)) == ("other", "synthetic with masks of a run on 8 real")


# ------------------------------------------------------------------------------------------ rows


@pytest.fixture
def rows(tmp_path, builder):
    """``rows(root)`` -> ({label: (mIoUs on shapes, variant)}, what is left out) of the runs
    there."""

    def arranged(root):
        folders = [p.parent for p in root.rglob("run.json")]
        random.shuffle(folders)
        entries, left_out = collect(folders)
        left_out += separate(entries, None)
        found, twice = arrange([e for e in entries if e["metrics"]], "shapes")
        values = {
            r.label: ([e["metrics"]["shapes"]["miou"] for e in r.runs], r.variant) for r in found
        }
        return values, left_out + twice

    return arranged


@pytest.fixture
def demo(tmp_path, builder):
    """The runs of the demo, and the test images."""
    tests, root = [builder.test(tmp_path / "data/shapes")], tmp_path / "outputs"
    plain = builder.run(root / "synthetic/seed=0", tests, 0.2, steps=540)
    builder.run(root / "finetune/seed=0", tests, 0.1, 0, "real", 16, plain, steps=60)
    builder.run(root / "real/seed=0", tests, 0.3, 0, "real", 16, steps=600)
    return root, tests


def test_a_run_of_five_steps_is_no_headline_whatever_its_folder(demo, rows, builder):
    root, tests = demo
    before, _ = rows(root)
    builder.run(root / "a/quality/absent/seed=0", tests, 0.9, steps=5)
    found, left_out = rows(root)
    assert not left_out and {name: found[name] for name in before} == before
    assert list(found.keys() - before) == ["synthetic only; 5 steps"]


def test_short_trials_of_several_arms_are_no_headline(tmp_path, rows, builder):
    """The arms have different numbers of steps, their trials the same."""
    tests, root = [builder.test(tmp_path / "data/shapes")], tmp_path / "outputs"
    for seed in range(3):
        builder.run(root / f"synthetic/{seed}", tests, 0.2, seed, steps=540)
        builder.run(root / f"real/{seed}", tests, 0.1, seed, "real", "all", steps=600)
    builder.run(root / "try/synthetic", tests, 0.9, steps=2)
    builder.run(root / "try/real", tests, 0.9, 0, "real", "all", steps=2)
    builder.run(root / "try/long", tests, 0.05, 0, "real", "all", steps=5000)
    found, _ = rows(root)
    assert {name: len(values) for name, (values, _) in found.items()} == {
        "synthetic only": 3,
        "synthetic only; 2 steps": 1,
        "all real only": 3,
        "all real only; 2 steps": 1,
        "all real only; 5000 steps": 1,
    }


def test_names_of_folders_change_nothing(demo, rows, builder, tmp_path):
    root, tests = demo
    builder.run(root / "b/seed=0", tests, 0.9, steps=5)
    builder.run(root / "c/seed=0", tests, 0.4, 0, "real", 16, steps=60)
    builder.run(root / "d/seed=1", tests, 0.4, 1, "real", 16, steps=60)
    found, _ = rows(root)
    assert found["16 real only"][1] is None and len(found["16 real only; 60 steps"][0]) == 2
    for order in range(3):
        names = random.Random(order).sample("pqrstuvw", 6)
        other = tmp_path / f"renamed{order}"
        for name, run in zip(names, sorted(root.rglob("run.json")), strict=True):
            shutil.copytree(run.parent, other / name)
        assert rows(other)[0] == found


def test_two_recipes_are_two_rows_and_not_two_seeds(tmp_path, rows, builder):
    tests, root = [builder.test(tmp_path / "data/shapes")], tmp_path / "outputs"
    builder.run(root / "0", tests, 0.2, 0, steps=60, rate=3e-3)
    builder.run(root / "1", tests, 0.8, 1, steps=2, rate=1e-5)
    found, _ = rows(root)
    assert {name: len(values) for name, (values, _) in found.items()} == {
        "synthetic only": 1,
        "synthetic only; rate 1e-5, 2 steps": 1,
    }


def test_a_sweep_has_one_row_for_each_setting(tmp_path, rows, builder):
    tests, root = [builder.test(tmp_path / "data/shapes")], tmp_path / "outputs"
    for rate in (1e-3, 3e-3, 1e-2):
        for seed in range(2 + (rate == 3e-3)):
            builder.run(root / f"rate={rate},seed={seed}", tests, 0.2, seed, rate=rate)
    found, _ = rows(root)
    assert {name: len(values) for name, (values, _) in found.items()} == {
        "synthetic only": 3,
        "synthetic only; rate 0.01": 2,
        "synthetic only; rate 1e-3": 2,
    }


def test_a_second_run_of_a_recipe_and_seed_is_listed(demo, rows, builder):
    root, tests = demo
    shutil.copytree(root / "real/seed=0", root / "copy")
    again = builder.run(
        root / "labels corrected", tests, 0.5, 0, "real", 16, steps=600, data={"content": "x"}
    )
    found, left_out = rows(root)
    reasons = sorted(why for _, why in left_out)
    assert len(found["16 real only"][0]) == 1 and len(reasons) == 2
    assert all(why.startswith("a second run of the recipe and seed of ") for why in reasons)
    assert any("trained_on.content: " in why for why in reasons)
    assert again.is_dir()


def test_two_controls_are_told_apart_by_their_steps(demo, rows, builder):
    """Also where the short one has more seeds: arms are compared at as many steps in total."""
    root, tests = demo
    for seed in range(3):
        builder.run(root / f"a_short/seed={seed}", tests, 0.8, seed, "real", 16, steps=60)
    found, _ = rows(root)
    assert found["16 real only"][1] is None and len(found["16 real only"][0]) == 1
    assert len(found["16 real only; 60 steps"][0]) == 3


def test_the_reports_own_set_is_the_main_one(tmp_path, rows, builder):
    tests, root = [builder.test(tmp_path / "data/shapes")], tmp_path / "outputs"
    builder.run(root / "own", tests, 0.3)
    for seed in range(3):
        masks = {"settings": {"power": 8}, "heat": "h"}
        builder.run(
            root / f"{seed}",
            tests,
            0.1,
            seed,
            data={"masks": "masks/power=8", "mask_settings": masks},
        )
    found, _ = rows(root)
    assert {name: len(v) for name, (v, variant) in found.items() if variant is None} == {
        "synthetic only": 1
    }


def test_names_that_a_user_gave_ablations_stay_and_pool_equal_recipes_alone(
    tmp_path, rows, builder
):
    tests, root = [builder.test(tmp_path / "data/shapes")], tmp_path / "outputs"
    for seed in (0, 1):
        builder.run(root / f"synthetic/{seed}", tests, 0.2, seed)
        for name, power, steps in (("power=1", 1, 300), ("odd", 3, 300 - 10 * seed)):
            masks = {
                "mask_settings": {"settings": {"power": power}, "heat": "h"},
                "masks": f"masks/{name}",
            }
            builder.run(root / f"ablation/{name}/{seed}", tests, 0.3, seed, steps=steps, data=masks)
    found, _ = rows(root)
    variants = sorted((variant, len(values)) for values, variant in found.values() if variant)
    assert [v for v in variants if v[0] == "power=1"] == [("power=1", 2)]
    odd = [v for v in variants if v[0].startswith("odd, ")]
    assert (
        len(odd) == 2
        and all(n == 1 for _, n in odd)
        and any("290 steps" in name for name, _ in odd)
    )
