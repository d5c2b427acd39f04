"""Splits that keep groups of images together."""

from itertools import combinations

import pytest

from dd.data.groups import group_text, grouped_splits, groups_of


def cameras(*sizes):
    return [f"cam{c}/day{i % 3}/{i:03d}" for c, size in enumerate(sizes) for i in range(size)]


def test_groups_by_expression_folder_and_file(tmp_path):
    ids = cameras(2, 3)
    named = groups_of(ids, r"(?P<camera>cam\d+)")
    assert named.noun == "camera" and {g: len(m) for g, m in named.members().items()} == {
        "cam0": 2,
        "cam1": 3,
    }
    assert groups_of(ids, r"day\d").of["cam1/day2/002"] == "day2"
    assert groups_of(ids, "folder").of["cam1/day2/002"] == "cam1/day2"
    rows = "".join(f"{name}.jpg,part{i % 2}\n" for i, name in enumerate(ids))
    (tmp_path / "parts.csv").write_text(f"image,part\n{rows}\nother.jpg,part9\n")
    listed = groups_of(ids, str(tmp_path / "parts.csv"))
    assert listed.noun == "part" and set(listed.members()) == {"part0", "part1"}
    assert listed.of[ids[3]] == "part1" and listed.by.startswith("parts.csv (")


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("cam(", "is no regular expression"),
        (r"cam1", "2 of 5 images have no group by it, such as"),
        (r"(x?)", "5 of 5 images have no group"),
        (r"cam", "all 5 images are of one group, 'cam'"),
    ],
)
def test_what_is_no_group_is_refused(how, said):
    with pytest.raises(ValueError, match=r"--group .*" + said.replace("(", r"\(")):
        groups_of(cameras(2, 3), how)


def test_a_file_that_is_not_whole_is_refused(tmp_path):
    path = tmp_path / "groups.csv"
    with pytest.raises(FileNotFoundError, match="no such file"):
        groups_of(["a", "b"], str(path))
    for text, said in (
        ("image\na\n", "expected a head"),
        ("image,part\na,\n", "expected a head"),
        ("image,part\na,1\n", r"1 of 2 images are not in it, such as \['b'\]"),
        ("image,part\na,1\na,2\nb,1\n", "a is of two groups, 1 and 2"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            groups_of(["a", "b"], str(path))


@pytest.mark.parametrize("seed", range(5))
def test_no_group_is_in_two_splits_and_sizes_are_the_nearest(seed):
    sizes = (31, 7, 13, 22, 9, 17, 3, 11)
    ids = cameras(*sizes)
    groups = groups_of(ids, r"cam\d+")
    splits, notes = grouped_splits({"val": 0.2, "test": 0.1}, groups, seed)
    assert sorted(i for names in splits.values() for i in names) == sorted(ids)
    where = {split: {groups.of[i] for i in names} for split, names in splits.items()}
    for one, other in combinations(where.values(), 2):
        assert not one & other

    def nearest(wanted, among):
        sums = {sum(c) for n in range(1, len(among)) for c in combinations(among, n)}
        return min(abs(s - wanted) for s in sums)

    left = [size for c, size in enumerate(sizes) if f"cam{c}" not in where["val"]]
    assert abs(len(splits["val"]) - 23) == nearest(23, sizes) == 0
    assert abs(len(splits["test"]) - 11) == nearest(11, left) and notes == []
    assert splits == grouped_splits({"val": 0.2, "test": 0.1}, groups, seed)[0]


def test_another_seed_draws_other_groups():
    groups = groups_of(cameras(*[5] * 20), r"cam\d+")
    drawn = {tuple(grouped_splits({"val": 0.2}, groups, seed)[0]["val"]) for seed in range(6)}
    assert len(drawn) > 3 and all(len(names) == 20 for names in drawn)


def test_a_group_that_is_too_large_is_refused():
    groups = groups_of(cameras(90, 5, 5), r"cam\d+")
    with pytest.raises(ValueError, match="'cam0' has 90 of 100 images, more than the 80 that"):
        grouped_splits({"val": 0.2}, groups, 0)
    splits, _ = grouped_splits({"val": 0.1}, groups, 0)
    assert len(splits["train"]) == 90
    with pytest.raises(ValueError, match="3 groups are too few for 4 splits"):
        grouped_splits({"val": 0.03, "test": 0.03, "tune": 0.03}, groups, 0)


def test_sizes_that_groups_do_not_allow_are_told():
    groups = groups_of(cameras(30, 40, 30), r"(?P<camera>cam\d+)")
    splits, notes = grouped_splits({"val": 0.2}, groups, 0)
    assert len(splits["val"]) == 30
    assert notes == ["val is 0.30 of the images where 0.2 was asked for: cameras are not divided"]


def test_every_split_gets_a_group_even_the_last_ones():
    groups = groups_of(cameras(1, 1, 50, 49), r"cam\d+")
    splits, _ = grouped_splits({"val": 0.02, "tune": 0.3}, groups, 0)
    assert all(splits.values()) and len(splits["val"]) < 3


def test_a_set_that_grows_keeps_its_groups_where_they_are():
    first = groups_of(cameras(5, 5, 5, 5, 5), r"cam\d+")
    kept, _ = grouped_splits({"val": 0.2}, first, 0)
    (old,) = {first.of[i] for i in kept["val"]}
    more = groups_of(cameras(8, 8, 8, 8, 8, 10, 10), r"cam\d+")
    splits, _ = grouped_splits({"val": 0.2}, more, 0, kept)
    assert set(kept["val"]) <= set(splits["val"]) and set(kept["train"]) <= set(splits["train"])
    assert {i for i in more.of if more.of[i] == old} <= set(splits["val"])
    mixed = {"train": kept["train"][1:] + kept["val"], "val": kept["train"][:1]}
    with pytest.raises(ValueError, match="it was not split by this group"):
        grouped_splits({"val": 0.2}, more, 0, mixed)


def test_groups_in_words():
    groups = groups_of(cameras(5, 5, 5), r"(?P<camera>cam\d+)")
    splits, _ = grouped_splits({"val": 0.3}, groups, 0)
    assert group_text(groups.told(splits)) == "split by group: 3 cameras (train 2, val 1)"
