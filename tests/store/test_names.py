"""Names that become folders stay in theirs."""

import pytest

from dd.store.names import folder_name


@pytest.mark.parametrize(
    "name", ["a", "2024", "Фото für uns", "shots=16,seed=0", "über (2)", "a..b", 200 * "a"]
)
def test_plain_names_pass(name):
    assert folder_name(name, "name") == name
    assert folder_name(name, "name", parts=True) == name


def test_several_parts_pass_where_they_may():
    assert folder_name("shapes/real/shots=16", "name", parts=True) == "shapes/real/shots=16"
    with pytest.raises(
        ValueError, match="mask_set='a/b': expected the name of a folder: without /"
    ):
        folder_name("a/b", "mask_set")


WRONG = [
    "",
    " ",
    ".",
    "..",
    "../heat",
    "../../../../esc",
    "/etc",
    "a/../../b",
    "a//b",
    "a/",
    "a/./b",
    ".hidden",
    "a/.hidden",
    "a\\b",
    "a\nb",
    "a\0b",
    "\ud800",
    201 * "a",
    100 * "ю" + "яяя",
    None,
    1,
    1.5,
    True,
    ["a"],
    {"a": 1},
]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("name", WRONG, ids=repr)
def test_other_names_are_refused_in_one_line(name, parts):
    with pytest.raises(ValueError, match="^name=.*: expected the name of a folder") as error:
        folder_name(name, "name", parts)
    assert len(str(error.value)) < 300 and str(error.value).isprintable()
