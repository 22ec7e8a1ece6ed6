"""The file and line where a class of the user's says something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from hfcustom.origins import Place, assignment_place, attribute_place, is_users, overrides, place_of


def plain(some_class: Any) -> Any:
    return some_class


class Base(nn.Module):
    depth = 1

    def forward(self, x: Any) -> Any:
        return x


@plain
@plain
class Mine(Base):  # class
    depth: int = 2  # attribute

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2, 2))  # inner
        self.inner[0] = nn.Linear(2, 3)
        self.inner.extra, self.other = nn.ReLU(), nn.Tanh()  # tuple
        self.register_buffer("table", None)  # buffer

    @property
    def size(self) -> int:
        return 3

    def forward(self, x: Any) -> Any:  # method
        return self.inner(x)


def line(place: Place | None) -> str:
    assert place is not None and place.file == __file__
    return Path(__file__).read_text().splitlines()[place.line - 1].rpartition("# ")[2]


def test_classes_attributes_and_methods() -> None:
    assert line(place_of(Mine)) == "class" and line(attribute_place(Mine, "depth")) == "attribute"
    assert line(attribute_place(Mine, "forward")) == "method" and line(place_of(Mine.forward)) == "method"
    assert attribute_place(Mine, "nothing") is None


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("inner", "inner"),
        ("inner.1.weight", "inner"),
        ("inner.extra", "tuple"),
        ("other", "tuple"),
        ("table", "buffer"),
    ],
)
def test_what_is_set_on_self(path: str, found: str) -> None:
    assert line(assignment_place(Mine, path)) == found


def test_only_what_overrides_something_counts() -> None:
    assert overrides(Mine) == {"forward": Mine} and not overrides(Mine, {"forward"})
    assert is_users(Mine) and not is_users(nn.Linear)


def test_a_class_without_a_file_has_no_place() -> None:
    space: dict[str, Any] = {"nn": nn}
    exec("class Typed(nn.Module):\n    def forward(self, x):\n        return x", space)
    assert place_of(space["Typed"]) is None and assignment_place(space["Typed"], "a") is None
