"""Slices of the images on which a model is right significantly less often than on the others.

    properties            -> conditions   a level, a fifth of the numbers, or one end of them
    correct, conditions   -> p-values     is the model worse there than on the other images?
                          -> adjusted     for the number of conditions, by permutation
                          -> the worst    is named if it is significant; its images are left out
      again, until none is significant
      -> `SliceReport`    every slice, and the worse ones without repetitions

The p-value of a slice is Fisher's exact test, one-sided. Conditions overlap (dark images have
little contrast), so the p-values are adjusted with the step-down minP procedure of Westfall and
Young ("Resampling-Based Multiple Testing", 1993, algorithm 2.8; Ge, Dudoit and Speed, Test 12(1),
2003, box 4): the errors are shuffled, and the smallest p-value of each shuffle is compared with the
observed ones. That keeps the probability of naming any slice by chance below `max_p`.

A large bad slice hides smaller ones, because its errors are among "the other images". So the images
of a slice that was named are left out, and the others are tested again. Where no slice is worse,
none is named in the first round and there is no second: the probability stays the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from arrowhead.data.catalog import Catalog
from arrowhead.errors import ConfigError
from arrowhead.evaluation.metrics import wilson_interval
from arrowhead.examine.image_properties import ImageProperties, measure_images
from arrowhead.examine.permutation import PermutationTest
from arrowhead.examine.predictions import Predictions
from arrowhead.examine.properties import (
    Property,
    catalog_properties,
    label_properties,
    measured_properties,
)
from arrowhead.examine.table_columns import read_table_columns

LOW_SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4)  # of the images at one end of a property's numbers
FIFTHS = (0.2, 0.4, 0.6, 0.8)
CUT_SHARES = tuple(sorted({*LOW_SHARES, *(round(1 - one, 2) for one in LOW_SHARES)}))
NOT_IN_TABLE = ("name", "is_part", "row", "without", "same_images")
MAX_ROUNDS = 12  # of leaving out a slice and testing the others again
LISTED_WITH_ROWS = 6  # of the slices that are not worse: whose rows are known


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceConfig:
    """Which slices are examined and named."""

    min_images: int = 20
    """Examine no slice with fewer images, nor one that leaves fewer others."""
    max_p: float = 0.02
    """Name a slice if its adjusted p-value is at most this: the probability of naming any slice
    where errors do not depend on the properties."""
    permutations: int = 2000
    """Number of shuffles from which p-values are adjusted."""

    def __post_init__(self) -> None:
        if self.min_images < 1:
            raise ConfigError(
                f"--min-images is {self.min_images}.", "1 or more.", "give a number such as 20."
            )
        if not 0 < self.max_p < 1:
            raise ConfigError(
                f"--max-p is {self.max_p}.", "a probability above 0 and below 1.", "give 0.02."
            )
        if self.permutations < 1 / self.max_p:
            raise ConfigError(
                f"--permutations is {self.permutations}, too few for --max-p {self.max_p}.",
                f"{math.ceil(1 / self.max_p)} or more.",
                "give more permutations or a larger --max-p.",
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutImages:
    """N images that a model was not trained on, and what it says about them.

    Attributes:
        row: int64 (N,), rows of the catalog, ascending.
        image_id: uint64 (N,), as in `Features`.
        correct: bool (N,); with several labels per image float64, the share of right decisions.
        predicted: The names of the predicted label or labels of each image; None to leave them out.
    """

    row: NDArray[np.int64]
    image_id: NDArray[np.uint64]
    correct: NDArray[np.bool_] | NDArray[np.float64]
    predicted: Sequence[tuple[str, ...]] | None = None

    @staticmethod
    def from_predictions(predictions: Predictions) -> HeldOutImages:
        """The held-out images of a bundle's predictions."""
        held_out = predictions.held_out
        correct, predicted = predictions.correct, predictions.predicted[held_out]
        if predictions.multi:
            correct = (predictions.predicted == predictions.label).mean(1)
        return HeldOutImages(
            row=predictions.row[held_out],
            image_id=predictions.image_id[held_out],
            correct=correct[held_out],
            predicted=[tuple(predictions.names(one)) for one in predicted],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """Images that fulfil a condition, and how often the model is right on them.

    Attributes:
        name: The condition, such as "brightness below 41.2".
        property: The property that it is about.
        is_part: Whether it is a level or a fifth, which do not overlap, rather than one end.
        images: Number of images.
        accuracy, low, high: Share of right decisions and its 95 % interval (Wilson).
        rest_images, rest_accuracy: The same of the other images for which the property is known.
        difference, difference_low, difference_high: accuracy - rest_accuracy and its 95 % interval
            (Newcombe, Statistics in Medicine 17(8), 1998, method 10).
        p: One-sided p-value that the slice is worse; None for a slice that is not tested.
        adjusted_p: The same, adjusted for the number of slices.
        row: int64 (images,), rows of the catalog; empty unless the slice is a worse one or among
            the first LISTED_WITH_ROWS others.
        without: Names of the worse slices whose images are left out here, of the slice and of the
            rest.
        same_images: Names of other worse slices that this one explains.
    """

    name: str
    property: str
    is_part: bool
    images: int
    accuracy: float
    low: float
    high: float
    rest_images: int
    rest_accuracy: float
    difference: float
    difference_low: float
    difference_high: float
    p: float | None
    adjusted_p: float | None
    row: NDArray[np.int64]
    without: tuple[str, ...] = ()
    same_images: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class SliceReport:
    """The accuracy by slice.

    Attributes:
        images, accuracy, low, high: All compared images, their accuracy and its 95 % interval.
        slices: Every examined slice: by p-value, then accuracy; those that are not tested last.
        worse: The slices that are significantly worse than the rest, in the order in which they
            were found; each is measured without the images of those before it.
        tested: Number of slices that the p-values are adjusted for in the first round.
        notes: Sentences for the reader.
    """

    images: int
    accuracy: float
    low: float
    high: float
    slices: tuple[Slice, ...]
    worse: tuple[Slice, ...]
    tested: int
    notes: tuple[str, ...] = ()

    @property
    def others(self) -> list[Slice]:
        """The tested slices that are neither worse nor explained by a worse one."""
        named = {name for one in self.worse for name in (one.name, *one.same_images)}
        return [one for one in self.slices if one.p is not None and one.name not in named]

    def table(self) -> list[dict[str, Any]]:
        """One row per slice for `tables.write_table`, the worse ones first."""
        names = {one.name for one in self.worse}
        rest = [one for one in self.slices if one.name not in names]
        columns = [field.name for field in fields(Slice) if field.name not in NOT_IN_TABLE]
        return [
            {"slice": one.name, "worse": "yes" if one.name in names else "no"}
            | {column: getattr(one, column) for column in columns}
            | {"without": "; ".join(one.without), "same_images": "; ".join(one.same_images)}
            for one in (*self.worse, *rest)
        ]


# ------------------------------------------------------------------------------ conditions


@dataclass(frozen=True, slots=True)
class _Condition:
    """The images whose code of a property is at least `first` and below `end`."""

    property: int
    name: str
    first: int
    end: int
    is_part: bool


@dataclass(frozen=True, slots=True)
class _Coded:
    """A property as small whole numbers: codes int32 (N,), 0 where it is not known."""

    source: Property
    code: NDArray[np.int32]
    conditions: tuple[_Condition, ...]

    def mask(self, condition: _Condition) -> NDArray[np.bool_]:
        """The images that fulfil a condition, bool (N,)."""
        mask_N: NDArray[np.bool_] = (self.code >= condition.first) & (self.code < condition.end)
        return mask_N

    def only(self, kept_N: NDArray[np.bool_]) -> _Coded:
        """The same conditions, for some of the images."""
        return replace(self, code=self.code[kept_N])


def _encode(number: int, source: Property, usable_N: NDArray[np.bool_]) -> _Coded:
    """Divide a property into conditions; number: its index; usable_N: the images to use."""
    known_N = source.known & usable_N
    code_N = np.zeros(len(known_N), np.int32)
    if source.levels:
        code_N[known_N] = source.value[known_N] + 1
        conditions = [
            _Condition(number, f"{source.name}: {level}", index + 1, index + 2, True)
            for index, level in enumerate(source.levels)
        ]
        return _Coded(source, code_N, tuple(conditions))
    value_K = np.sort(source.value[known_N].astype(np.float64))
    if not len(value_K):
        return _Coded(source, code_N, ())
    # Equal numbers are never divided: a cut is a number that occurs, and starts the upper part.
    cut_by_share = {share: value_K[int(share * len(value_K))] for share in CUT_SHARES}
    cuts = sorted(set(cut_by_share.values()) - {value_K[0]})
    code_N[known_N] = np.searchsorted(cuts, source.value[known_N], "right") + 1
    code_of = {cut: index + 2 for index, cut in enumerate(cuts)}
    ends = {share: code_of.get(cut, 1) for share, cut in cut_by_share.items()}
    top = len(cuts) + 2
    fifths = list(zip((0.0, *FIFTHS), (*FIFTHS, 1.0), strict=True))
    ranges = [(ends.get(low, 1), ends.get(high, top), True) for low, high in fifths]
    ranges += [(1, ends[share], False) for share in LOW_SHARES]
    ranges += [(ends[round(1 - share, 2)], top, False) for share in LOW_SHARES]
    unique: dict[tuple[int, int], bool] = {}
    for first, end, is_part in ranges:
        if first < end and (first, end) != (1, top):
            unique.setdefault((first, end), is_part)
    conditions = [
        _Condition(number, _range_name(source.name, first, end, cuts), first, end, is_part)
        for (first, end), is_part in unique.items()
    ]
    return _Coded(source, code_N, tuple(conditions))


def _range_name(name: str, first: int, end: int, cuts: Sequence[float]) -> str:
    """A range of codes in words; code 1 is below the first cut."""
    low = f"{cuts[first - 2]:.4g}" if first > 1 else ""
    high = f"{cuts[end - 2]:.4g}" if end - 2 < len(cuts) else ""
    if not low:
        return f"{name} below {high}"
    return f"{name} {low} to below {high}" if high else f"{name} {low} or more"


# ---------------------------------------------------------------------------------- slices


def find_slices(
    correct_N: NDArray[np.bool_] | NDArray[np.float64],
    row_N: NDArray[np.int64],
    properties: Sequence[Property],
    config: SliceConfig = SliceConfig(),
) -> SliceReport:
    """Compare the accuracy of slices with that of the other images.

    Args:
        correct_N: Whether the model is right on each image; with several labels per image the
            share of right decisions, 0 to 1. Only images that it was not trained on.
        row_N: Rows of the catalog.
        properties: Their properties. If two give the same images, the first names the slice.
        config: Which slices are examined and named.
    """
    correct_N = np.asarray(correct_N, np.float64)
    usable_N = np.ones(len(correct_N), bool)  # where everything that was sampled is known
    for one in properties:
        if one.sampled and one.known.any():
            usable_N &= one.known
    every_N = np.ones(len(correct_N), bool)
    coded = [
        _encode(number, one, usable_N if one.sampled else every_N)
        for number, one in enumerate(properties)
    ]
    worse, found, tested = _find_worse(coded, correct_N, usable_N, config)
    low, high = wilson_interval(float(correct_N.sum()), len(correct_N))
    report = SliceReport(
        images=len(correct_N),
        accuracy=float(correct_N.mean()) if len(correct_N) else math.nan,
        low=low,
        high=high,
        slices=tuple(one for one, _ in found),
        worse=tuple(replace(one, row=row_N[mask_N]) for one, mask_N in worse),
        tested=tested,
    )
    with_rows = {one.name for one in report.others[:LISTED_WITH_ROWS]}
    listed = [
        replace(one, row=row_N[coded[place.property].mask(place)]) if one.name in with_rows else one
        for one, place in found
    ]
    return replace(report, slices=tuple(listed))


_Found = list[tuple[Slice, _Condition]]


def _find_worse(
    coded: Sequence[_Coded],
    correct_N: NDArray[np.float64],
    usable_N: NDArray[np.bool_],
    config: SliceConfig,
) -> tuple[list[tuple[Slice, NDArray[np.bool_]]], _Found, int]:
    """Name the worst slice if it is significant, and test the others without its images; repeat.

    A slice that overlaps with an earlier one of the same property (brightness below 41, below 60)
    is listed with that one instead of being named, and so is one that was significant until the
    images of others were left out.

    Returns:
        The worse slices with their images, bool (N,); all slices and the number of tested ones of
        the first round.
    """
    worse: list[Slice] = []
    own: list[NDArray[np.bool_]] = []  # the images by which a slice is measured
    every: list[NDArray[np.bool_]] = []  # those that fulfil its condition
    also: dict[str, _Condition] = {}
    kept_N = np.ones(len(correct_N), bool)
    first: tuple[_Found, int] | None = None
    for _ in range(MAX_ROUNDS):
        rest = [one.only(kept_N) for one in coded]
        found, tested = _compare(rest, correct_N[kept_N], usable_N[kept_N], config)
        first = first or (found, tested)
        significant = [
            (one, condition)
            for one, condition in found
            if one.adjusted_p is not None and one.adjusted_p <= config.max_p
        ]
        if not significant:
            break
        one, condition = significant[0]
        also |= {other.name: place for other, place in significant}
        mask_N = coded[condition.property].mask(condition)
        is_part_of_earlier = any(
            before.property == one.property and (mask_N & mask).any()
            for before, mask in zip(worse, every, strict=True)
        )
        if not is_part_of_earlier:
            worse.append(replace(one, without=tuple(before.name for before in worse)))
            own.append(mask_N & kept_N)
            every.append(mask_N)
        kept_N &= ~mask_N
    assert first is not None
    for name in [one.name for one in worse]:
        del also[name]
    for name, condition in also.items():
        mask_N = coded[condition.property].mask(condition)
        nearest = int(np.argmax([(mask_N & mask).sum() for mask in every]))
        same = (*worse[nearest].same_images, name)
        worse[nearest] = replace(worse[nearest], same_images=same)
    return list(zip(worse, own, strict=True)), *first


def _compare(
    coded: Sequence[_Coded],
    correct_N: NDArray[np.float64],
    usable_N: NDArray[np.bool_],
    config: SliceConfig,
) -> tuple[_Found, int]:
    """Test and measure every slice of N images.

    Returns:
        Slices with their conditions, by p-value, then accuracy, those that are not tested last;
        and the number of those that are.
    """
    test = PermutationTest(1 - correct_N, usable_N)
    conditions = _select_conditions(coded, test, config)
    tested = [one for one in conditions if coded[one.property].source.tested]
    p, adjusted_p = test.run(
        [coded[one.property].code for one in tested],
        [(one.first, one.end) for one in tested],
        [coded[one.property].source.sampled for one in tested],
        config.permutations,
    )
    p_values = dict(zip(tested, zip(p, adjusted_p, strict=True), strict=True))
    found = []
    for condition in conditions:
        one = coded[condition.property]
        mask_N = one.mask(condition)
        rest_N = (usable_N & ~mask_N) if one.source.sampled else ~mask_N
        pair = p_values.get(condition, (None, None))
        measured = _measure(condition, one.source, correct_N[mask_N], correct_N[rest_N], pair)
        found.append((measured, condition))
    found.sort(key=lambda pair: (math.inf if pair[0].p is None else pair[0].p, pair[0].accuracy))
    return found, len(tested)


def _select_conditions(
    coded: Sequence[_Coded], test: PermutationTest, config: SliceConfig
) -> list[_Condition]:
    """The conditions with enough images on both sides, without those that select equal images."""
    selected: list[_Condition] = []
    seen: set[bytes] = set()
    for one in coded:
        universe = test.images(one.source.sampled)
        counts = np.concatenate([[0], np.cumsum(np.bincount(one.code))])
        for condition in one.conditions:
            last = len(counts) - 1
            images = counts[min(condition.end, last)] - counts[min(condition.first, last)]
            if not config.min_images <= images <= universe - config.min_images:
                continue
            bits = np.packbits(one.mask(condition)).tobytes()
            key = hashlib.blake2b(bits, digest_size=16).digest()
            if key not in seen:
                seen.add(key)
                selected.append(condition)
    return selected


def _measure(
    condition: _Condition,
    source: Property,
    correct_S: NDArray[np.float64],
    correct_R: NDArray[np.float64],
    p: tuple[float, float] | tuple[None, None],
) -> Slice:
    """Measure a slice of S images against the R others; p: p-value and adjusted p-value."""
    low, high = wilson_interval(float(correct_S.sum()), len(correct_S))
    rest_low, rest_high = wilson_interval(float(correct_R.sum()), len(correct_R))
    accuracy, rest = float(correct_S.mean()), float(correct_R.mean())
    difference = accuracy - rest
    return Slice(
        name=condition.name,
        property=source.name,
        is_part=condition.is_part,
        images=len(correct_S),
        accuracy=accuracy,
        low=low,
        high=high,
        rest_images=len(correct_R),
        rest_accuracy=rest,
        difference=difference,
        difference_low=difference - math.hypot(accuracy - low, rest_high - rest),
        difference_high=difference + math.hypot(high - accuracy, rest - rest_low),
        p=p[0],
        adjusted_p=p[1],
        row=np.zeros(0, np.int64),
    )


def examine_slices(
    catalog: Catalog,
    images: HeldOutImages,
    config: SliceConfig = SliceConfig(),
    measured: ImageProperties | None = None,
) -> SliceReport:
    """Compare slices by label, split, folder, columns of the table, and measured properties.

    Predicted labels are listed, but not tested: a class that is seldom right when it is predicted
    may just be a rare one (bench/slices.py: of 100 runs without any cause of errors 100 named it).

    Args:
        catalog: The images of a store.
        images: Those to compare, and whether the model is right on them.
        config: Which slices are examined and named.
        measured: The properties of some of the images; None: those of a sample are measured.
    """
    row_N = images.row
    given = catalog_properties(catalog, row_N)
    if images.predicted is not None:
        given += label_properties("predicted label", images.predicted, tested=False)
    columns, notes = read_table_columns(catalog, row_N)
    measured = measured or measure_images(catalog, row_N, images.image_id)
    numbers, measured_notes = measured_properties(measured, row_N)
    report = find_slices(images.correct, row_N, [*given, *columns, *numbers], config)
    return replace(report, notes=(*notes, *measured_notes))
