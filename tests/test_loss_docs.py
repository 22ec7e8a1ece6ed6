"""Every shipped loss: its docstring names a source, and its examples give what they say."""

from __future__ import annotations

import doctest
import sys
from typing import Any

import pytest
import torch

from hfcustom.losses import LOSSES

SHIPPED = sorted(name for name, loss in LOSSES.items() if loss.function.__module__.startswith("hfcustom."))


def examples_of(function: Any) -> doctest.DocTest:
    """Return the examples of a function's docstring, with the names of its module and the logits and targets of all."""
    given = {
        "logits": torch.tensor([[2.0, 0.0, -1.0], [0.5, 0.5, 0.5]]),
        "targets": torch.tensor([0, 2]),
        "torch": torch,
    }
    names = {**vars(sys.modules[function.__module__]), **given}
    found = doctest.DocTestFinder(recurse=False).find(function, function.__name__, globs=names)
    assert found and found[0].examples, f"the docstring of {function.__name__} has no example: >>> ..."
    return found[0]


@pytest.mark.parametrize("name", SHIPPED)
def test_examples_in_the_docstring_are_true(name: str) -> None:
    runner, said = doctest.DocTestRunner(), list[str]()
    outcome = runner.run(examples_of(LOSSES[name].function), out=said.append)
    assert not outcome.failed, "".join(said)


@pytest.mark.parametrize("name", SHIPPED)
def test_the_example_shows_its_arithmetic(name: str) -> None:
    examples = examples_of(LOSSES[name].function).examples
    assert any("  # " in example.source for example in examples if example.want), (
        "say in a comment where it comes from"
    )


def test_an_example_that_is_wrong_or_missing_is_found() -> None:
    def wrong(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """z_y.

        >>> targets
        tensor([0, 1])
        """
        return logits

    def silent(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """z_y."""
        return logits

    assert doctest.DocTestRunner().run(examples_of(wrong), out=lambda text: None).failed == 1
    with pytest.raises(AssertionError, match="docstring of silent has no example"):
        examples_of(silent)
