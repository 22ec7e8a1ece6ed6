"""The switch that turns cutting into tiles off, or on: found by trying each setting that the image processor has of its own.

A setting counts where the views become fewer (or more), the text follows, and the family's small model takes both. Each is
tried in a call and on the processor for good, since processors differ in which of the two they listen to.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from PIL import Image

from hfcustom.inspector.record import Size
from hfcustom.inspector.settings import defaults_of, own_settings
from hfcustom.inspector.small import FAULTS, SmallModel
from hfcustom.inspector.target import Subject
from hfcustom.inspector.tokens import placeholder_runs
from hfcustom.inspector.views import Looker

SMALL_PICTURE = (100, 60)  # is cut into tiles by the tiny processors


@dataclass(frozen=True)
class Way:
    """One way to change a setting, and what it did to a picture."""

    code: str  # as a user writes it
    views: int
    tokens: int
    refused: str = ""  # what the processor or the model says to it

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Switch:
    """How an image is cut without any setting, and what each setting that has to do with it does."""

    size: Size  # of the picture that it was tried with
    views: int
    tokens: int
    off: list[Way]  # those that leave fewest views, fewer than without
    on: list[Way]  # those that make more, of an image that is not cut without
    wrong: list[Way]  # tried, and without effect or refused, while another way works

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    def sentence(self) -> str:
        """Return the answer in words."""
        before = said(self.tokens, self.views)
        if self.off:
            best = self.off[0]
            return f"{before} -> {said(best.tokens, best.views)}" + (
                "" if best.views == 1 else ", the fewest there can be"
            )
        if self.on:
            return f"off by default: {before}; on: {said(self.on[0].tokens, self.on[0].views)}"
        return f"no setting changes it: {before}" if self.views > 1 else f"there is nothing to switch off: {before}"


def said(tokens: int, views: int) -> str:
    """Return "1,792 tokens in 7 views"."""
    return f"{tokens:,} token{'' if tokens == 1 else 's'} in {views} view{'' if views == 1 else 's'}"


def find_switch(subject: Subject, looker: Looker, size: Size, small: SmallModel) -> Switch:
    """Try every setting on a picture of a size."""
    plain = _measure(subject, looker, size)
    ways: list[tuple[Way, str]] = []
    for name, value in _candidates(subject.processor):
        for code, processor, call in _ways(subject.processor, name, value):
            way = _try(subject, looker.other(processor), size, code, call)
            if not way.refused and (way.views, way.tokens) != plain:
                way = _accepted(small, (name, value), way, call)
            ways.append((way, name))
    worked = [(way, name) for way, name in ways if not way.refused]
    fewer = [(way, name) for way, name in worked if way.views < plain[0] and way.tokens <= plain[1]]
    fewest = min((way.views for way, _ in fewer), default=0)
    off = [(way, name) for way, name in fewer if way.views == fewest]
    on = [(way, name) for way, name in worked if way.views > plain[0] == 1]
    names = {name for _, name in (off or on)}
    wrong = [way for way, name in ways if name in names and (way, name) not in (off or on)]
    return Switch(size, *plain, [way for way, _ in off], [] if off else [way for way, _ in on], wrong)


def _candidates(processor: Any) -> Iterator[tuple[str, Any]]:
    """Yield (setting, another value): the other truth value, the least number, one canvas of the size of a tile."""
    for name, value in own_settings(processor).items():
        if isinstance(value, bool):
            yield name, not value
        elif isinstance(value, int) and name.startswith("max_") and value > 1:
            yield name, 1
        elif (
            isinstance(value, list)
            and value
            and all(isinstance(item, list | tuple) and len(item) == 2 for item in value)
        ):
            side = min(min(item) for item in value)
            yield name, [[side, side]]


def _ways(processor: Any, name: str, value: Any) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Yield (code, processor, settings of the call) for each place where a setting can stand."""
    yield f"processor(..., {name}={value})", processor, {name: value}
    changed = copy.deepcopy(processor)
    setattr(changed.image_processor, name, value)
    yield f"processor.image_processor.{name} = {value}", changed, {}
    if name in defaults_of(processor):
        changed = copy.deepcopy(processor)
        changed.images_kwargs = {**defaults_of(processor), name: value}
        yield f"processor.images_kwargs = {{**processor.images_kwargs, {name!r}: {value}}}", changed, {}


def _try(subject: Subject, looker: Looker, size: Size, code: str, call: dict[str, Any]) -> Way:
    try:
        return Way(code, *_measure(subject, looker, size, **call))
    except FAULTS as error:
        return Way(code, 0, 0, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _accepted(small: SmallModel, setting: tuple[str, Any], way: Way, call: dict[str, Any]) -> Way:
    """Ask the small model; if it refuses and its config has a field of that name, once more with that changed too."""
    name, value = setting
    picture = Image.effect_noise(SMALL_PICTURE, 64).convert("RGB")
    processor = small.processor()
    value = next((other for known, other in _candidates(processor) if known == name), value)
    if not call:
        place = way.code.partition(" = ")[0]
        processor = next(one for code, one, _ in _ways(processor, name, value) if code.startswith(place))
    settings = {name: value} if call else {}
    refused = small.accepts(processor, picture, {}, **settings)
    if refused and name in small.subject.module.tiny_config().to_dict():
        if not small.accepts(processor, picture, {name: value}, **settings):
            return replace(way, code=f"{way.code}; model.config.{name} = {setting[1]}")
    return replace(way, refused=refused)


def _measure(subject: Subject, looker: Looker, size: Size, **call: Any) -> tuple[int, int]:
    """Return how many views a picture becomes and how many tokens it takes."""
    look = looker.look(size, **call)
    tokens = 0 if subject.placeholder is None else sum(placeholder_runs(look.features, subject.placeholder))
    return look.crops(), tokens
