"""Settings: what is allowed passes, what is not is refused in words, and the identity is
computed."""

from typing import Annotated, Literal

import pytest
from annotated_types import Ge, Gt, Le
from pydantic import model_validator

from dd.store.settings import Count, Hint, NoResult, Settings


class Oven(Settings):
    noun = "oven"
    degrees: Annotated[int, Ge(1), Le(300)] = 180
    minutes: Annotated[float, Gt(0), Hint("such as 7.5")] = 7.5
    trays: list[int] | None = None
    size: Count | None = None
    fan: bool | Literal["slow"] = False
    colour: Annotated[str, NoResult("it bakes the same")] = "white"

    @model_validator(mode="after")
    def _not_both(self) -> "Oven":
        if self.fan and self.degrees > 250:
            raise ValueError(f"fan={self.fan} with degrees={self.degrees}: the fan stops at 250")
        return self


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"degrees": 0}, "oven.degrees=0: expected a whole number from 1 to 300"),
        ({"degrees": "3"}, "oven.degrees='3': expected a whole number from 1 to 300"),
        ({"degrees": True}, "oven.degrees=true: expected a whole number from 1 to 300"),
        ({"minutes": 0}, "oven.minutes=0: expected a number above 0, such as 7.5"),
        ({"minutes": float("nan")}, "oven.minutes=nan: expected a number above 0, such as 7.5"),
        ({"trays": [1, "a"]}, "oven.trays=[1, 'a']: expected a list, each a whole number, or null"),
        ({"size": 0}, "oven.size=0: expected a whole number of 1 or more, or null"),
        ({"fan": 3}, "oven.fan=3: expected true or false, or slow"),
        ({"colour": None}, "oven.colour=null: expected text"),
        (
            {"colors": "red"},
            "oven.colors: no such setting; allowed: degrees, minutes, trays, size, fan, colour",
        ),
        ({"fan": True, "degrees": 251}, "fan=True with degrees=251: the fan stops at 250"),
    ],
)
def test_a_refusal_says_what_was_got_and_what_is_allowed(given, said):
    with pytest.raises(ValueError) as error:
        Oven(**given)
    assert str(error.value) == said and type(error.value) is ValueError


def test_the_identity_holds_what_decides_a_result():
    found = Oven(degrees=200, colour="red").identity()
    assert found == {"degrees": 200, "minutes": 7.5, "trays": None, "size": None, "fan": False}


def test_nothing_changes_afterwards():
    with pytest.raises(ValueError, match="frozen"):
        Oven().degrees = 3
