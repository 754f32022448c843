"""Looks for the setting of a config that makes an RL step fastest on some devices.

An update and sampling share the mesh, and nothing else of what is looked for. So the best
update and the best sampling are found apart for each mesh, and their sum is compared. Each
is found axis by axis: from a first setting an axis is walked for as long as that gets
better, then the next one, until no axis improves it; nor does a step up that does not fit
with one down on another axis, since all share the memory. Nothing here knows what a setting
means or how it is priced (`prices`).
"""

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

Setting = Mapping[str, Any]  # dotted field of a config -> value

UPDATE, SAMPLING = "update", "sampling"
KINDS = (UPDATE, SAMPLING)
FAR = 1.5  # a first setting so many times slower than the best ends its mesh


@dataclasses.dataclass(frozen=True)
class Price:
    """What a setting costs.

    Attributes:
      seconds: of an RL step, by part. memory: bytes of one device, by moment.
      why: it cannot be taken; "" = it can. Seconds may be missing then.
    """

    seconds: Mapping[str, float]
    memory: Mapping[str, int]
    why: str = ""

    @property
    def total(self) -> float:
        """Seconds of all parts; infinite for a setting that cannot be taken."""
        return math.inf if self.why else sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Axis:
    """Settings of the same fields, from the one that needs least memory to the most."""

    name: str
    choices: Sequence[Setting]


class Space(Protocol):
    """What is searched.

    Attributes:
      own: the config's own values of all fields of `axes`, and of the mesh.
      meshes: settings of the mesh.
    """

    own: Setting
    meshes: Sequence[Setting]

    def axes(self, kind: str, mesh: Setting) -> Sequence[Axis]:
        """What can be changed of one of `KINDS` on a mesh."""

    def start(self, kind: str, mesh: Setting, like: Setting) -> Setting:
        """The first to try on a mesh: what comes nearest to a setting of another."""

    def price(self, kind: str, setting: Setting, *, full: bool = False) -> Price:
        """What a setting costs; `full`: of the whole program, and not of parts of it."""

    def bound(self, kind: str, mesh: Setting) -> float:
        """Seconds below which no setting of a mesh comes."""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A setting of all fields."""

    setting: Setting
    update: Price
    sampling: Price

    @property
    def why(self) -> str:
        """Why it cannot be taken; "" = it can."""
        return self.update.why or self.sampling.why

    @property
    def total(self) -> float:
        """Seconds of an RL step."""
        return self.update.total + self.sampling.total

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step, by part."""
        return {**self.update.seconds, **self.sampling.seconds}

    @property
    def memory(self) -> dict[str, int]:
        """Bytes of one device, by moment."""
        return {**self.update.memory, **self.sampling.memory}


@dataclasses.dataclass
class Found:
    """What a search has found so far; it grows.

    Attributes:
      own: the config as it is, once it is priced.
      candidates: the best of each mesh that has one, and `own` if it fits; the fastest
        first.
      refused: what cannot be taken, and why. left: meshes that were given up, and why.
      complete: nothing is left to try. confirmed: the first candidate was priced in full.
    """

    own: Candidate | None = None
    candidates: list[Candidate] = dataclasses.field(default_factory=list)
    refused: list[tuple[Setting, str]] = dataclasses.field(default_factory=list)
    left: list[tuple[Setting, str]] = dataclasses.field(default_factory=list)
    complete: bool = False
    confirmed: bool = False

    @property
    def best(self) -> Candidate | None:
        """The fastest that fits."""
        return self.candidates[0] if self.candidates else None

    @property
    def total(self) -> float:
        """Its seconds; infinite as long as there is none."""
        return self.best.total if self.best else math.inf

    def add(self, candidate: Candidate) -> None:
        """Takes in a candidate that fits."""
        self.candidates.append(candidate)
        self.candidates.sort(key=lambda x: x.total)


def search(space: Space, *, confirm: bool = False, found: Found | None = None) -> Found:
    """The fastest setting of each mesh; the fastest of all comes first.

    Args:
      confirm: whether the fastest is priced in full, and the next if it does not fit.
      found: what is added to, so that a caller has it should this be interrupted.
    """
    found = Found() if found is None else found
    prices = {kind: _Memo(space, kind, found) for kind in KINDS}
    mesh = {name: space.own[name] for name in space.meshes[0]}
    found.own = Candidate(space.own, *(prices[kind](space.own) for kind in KINDS))
    if not found.own.why:
        found.add(found.own)
    others = [x for x in space.meshes if x != mesh]
    others.sort(key=lambda x: sum(space.bound(kind, x) for kind in KINDS))
    for mesh in [x for x in space.meshes if x == mesh] + others:
        _search_mesh(space, mesh, prices, found)
    if confirm:
        _confirm(space, found)
    found.complete = True
    return found


def _search_mesh(
    space: Space, mesh: Setting, prices: Mapping[str, "_Memo"], found: Found
) -> None:
    """Adds the best setting of a mesh, unless it cannot be the best of all."""
    like = found.best.setting if found.best else space.own
    least = {kind: space.bound(kind, mesh) for kind in KINDS}
    halves: dict[str, tuple[Setting, Price]] = {}
    for kind in (SAMPLING, UPDATE):  # the one that is priced sooner first
        rest = sum(least[other] for other in KINDS if other not in halves)
        known = sum(price.total for _, price in halves.values())
        if known + rest >= found.total:
            seconds = f"{known + rest:,.4g} s"
            found.left.append((mesh, f"a step takes {seconds} at the least"))
            return
        axes, start = space.axes(kind, mesh), space.start(kind, mesh, like)
        enough = FAR * getattr(found.best, kind).total if found.best else math.inf
        setting, price = descend({**mesh, **start}, axes, prices[kind], enough=enough)
        if price.why:
            found.left.append((mesh, f"no {kind} fits: {price.why}"))
            return
        halves[kind] = setting, price
    setting = {**halves[UPDATE][0], **halves[SAMPLING][0]}
    found.add(Candidate(setting, *(halves[kind][1] for kind in KINDS)))


def _confirm(space: Space, found: Found) -> None:
    """Prices the fastest in full, then the next, until one fits."""
    while found.best and not found.confirmed:
        setting = found.candidates.pop(0).setting
        full = Candidate(
            setting, *(space.price(kind, setting, full=True) for kind in KINDS)
        )
        if full.why:
            found.refused.append((setting, full.why))
        else:
            found.candidates.insert(0, full)
            found.confirmed = True


class _Memo:
    """The price of each setting, asked for once; what cannot be taken is noted."""

    def __init__(self, space: Space, kind: str, found: Found):
        self._space, self._kind, self._found = space, kind, found
        self._known: dict[tuple, Price] = {}

    def __call__(self, setting: Setting) -> Price:
        of_kind = {
            x for axis in self._space.axes(self._kind, setting) for x in _names(axis)
        }
        of_kind |= {*self._space.meshes[0]}
        setting = {name: setting[name] for name in setting if name in of_kind}
        key = tuple(sorted(setting.items(), key=lambda x: x[0]))
        if key not in self._known:
            price = self._known[key] = self._space.price(self._kind, setting)
            if price.why:
                self._found.refused.append((setting, price.why))
        return self._known[key]


def _names(axis: Axis) -> Iterator[str]:
    yield from axis.choices[0]


def descend(
    start: Setting,
    axes: Sequence[Axis],
    price: Callable[[Setting], Price],
    *,
    enough: float = math.inf,
) -> tuple[Setting, Price]:
    """The best setting that walks along axes come to, and its price.

    Where the first setting cannot be taken, the one that needs least memory is the first.

    Args:
      enough: a first price above this is not improved.
    """
    best = start, price(start)
    for axis in axes:
        if best[1].why:
            best = _walk(axis, best, price)
    if best[1].why:
        least = {name: x for axis in axes for name, x in axis.choices[0].items()}
        best = {**start, **least}, price({**start, **least})
    improves = best[1].total <= enough
    while improves:
        before = best[1].total
        for axis in axes:
            best = _walk(axis, best, price)
        if best[1].total == before and not best[1].why:
            best = _exchange(axes, best, price)
        improves = best[1].total < before
    return best


def _exchange(
    axes: Sequence[Axis], at: tuple[Setting, Price], price: Callable[[Setting], Price]
) -> tuple[Setting, Price]:
    """The best of a step up on an axis, which does not fit, with one down on another."""
    best, (setting, _) = at, at
    for up in axes:
        more = _beside(up, setting, 1)
        if more is None or not price({**setting, **more}).why:
            continue
        for down in axes:
            less = _beside(down, setting, -1)
            if down is up or less is None:
                continue
            tried = {**setting, **more, **less}
            cost = price(tried)
            best = (tried, cost) if cost.total < best[1].total else best
    return best


def _index(axis: Axis, setting: Setting) -> int:
    """Which of an axis's choices a setting has."""
    mine = {name: setting[name] for name in axis.choices[0]}
    return [dict(x) for x in axis.choices].index(mine)


def _beside(axis: Axis, setting: Setting, step: int) -> Setting | None:
    """The choice so many steps from a setting's own; None beyond the ends."""
    i = _index(axis, setting) + step
    return axis.choices[i] if 0 <= i < len(axis.choices) else None


def _walk(
    axis: Axis, at: tuple[Setting, Price], price: Callable[[Setting], Price]
) -> tuple[Setting, Price]:
    """The best along an axis: upwards as long as it gets better, else downwards.

    From a setting that cannot be taken it goes downwards only, to the first that can.
    """
    setting, known = at
    here = _index(axis, setting)
    upwards, downwards = axis.choices[here + 1 :], axis.choices[:here][::-1]
    for choices in (downwards,) if known.why else (upwards, downwards):
        best = at
        for choice in choices:
            tried = {**setting, **choice}
            cost = price(tried)
            if cost.total < best[1].total:
                best = tried, cost
            elif not best[1].why:
                break
        if best is not at:
            return best
    return at
