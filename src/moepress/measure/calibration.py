# SPDX-License-Identifier: Apache-2.0
"""CalibrationSettings: what a calibration measures, checked. Pure, no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from moepress.errors import CalibrationError, PlanError
from moepress.format.spec import BITS, WeightSpec
from moepress.graph.view import ROUTED, WeightRef
from moepress.plan.plan import COMPENSATED, label_of
from moepress.quantize.sites import Width

METHODS = ("gptq", "hqq", "rtn")
FEEDS = ("full", "compressed")
MIN_TOKENS = 64
"""An expert that fewer tokens reach counts as not measured."""
COMPENSATED_BITS = (2, 3, 4)
"""Widths that are offered with a compensator: from 5 bits on, more bits are the better use of the bytes."""
FACTOR_BITS = 4
MEASURED_BITS = 4
"""Wider ones are extrapolated from this one, where it is on the menu, instead of quantised."""
RATIO = 1.1
"""An error of b > 4 bits over that of 4 bits is this times (15 / (2^b - 1))^2. Over 930 weights of a 106 M-weight model
90 % of gptq's losses at 5, 6 and 8 bits lie within -6 and +15 % of it, and plans made with it cost the same."""
PMQ_GROUP = 128
PMQ_BITS = (1, 2, 3, 4)
"""Widths at which an expert's loss is measured with the quantiser that will be used."""


@dataclass(frozen=True, kw_only=True)
class CalibrationSettings:
    """Unknown or contradictory values raise CalibrationError."""

    method: str = "gptq"
    """The quantiser whose errors are measured: gptq, hqq or rtn."""
    bits: tuple[int, ...] = BITS
    group_sizes: tuple[int, ...] = (64, 128)
    ranks: tuple[int, ...] | None = None
    """Ranks of compensators to predict for weights that every token passes; 16 and 64, none with rtn, by default."""
    feed: str = "full"
    """What a layer reads: "full", the states of the original model, or "compressed", those of one whose weights before
    this one have `feed_bits` bits."""
    feed_bits: int = 4
    sweeps: int = 1
    """Of gptq's descent, for the tables alone; compressing does more, and an allocation hardly changes by it."""
    min_tokens: int = MIN_TOKENS
    seed: int = 0
    """Of the windows and the probes."""
    probe_windows: int = 4
    """Windows for sensitivities that are measured layer by layer."""
    gradient_windows: int = 32
    """Windows for whole-model gradients, where the caller takes them."""

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise CalibrationError(f"method {self.method!r} is unknown; choose one of {', '.join(METHODS)}")
        if self.feed not in FEEDS:
            raise CalibrationError(f"feed {self.feed!r} is unknown; choose one of {', '.join(FEEDS)}")
        for name, least in (("sweeps", 0), ("min_tokens", 0), ("probe_windows", 1), ("gradient_windows", 1)):
            if getattr(self, name) < least:
                raise CalibrationError(f"{name} is {getattr(self, name)}; the least is {least}")
        self._check_ranks()
        try:
            for bits in (*self.bits, self.feed_bits):
                for group_size in self.group_sizes:
                    WeightSpec(bits=bits, group_size=group_size)
        except PlanError as error:
            raise CalibrationError(str(error)) from error
        for name in ("bits", "group_sizes"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise CalibrationError(f"{name} are {values}; give each value once, and at least one")

    def _check_ranks(self) -> None:
        able = self.method in COMPENSATED
        ranks = self.ranks if self.ranks is not None else (16, 64) if able else ()
        if ranks and not able:
            raise CalibrationError(f"ranks are {ranks}, but {self.method} has no compensators; drop the ranks")
        if min(ranks, default=1) < 1 or len(set(ranks)) < len(ranks):
            raise CalibrationError(f"ranks are {ranks}; give each once, and none below 1")
        object.__setattr__(self, "ranks", tuple(ranks))

    def menu(self, ref: WeightRef) -> dict[Width, str]:
        """Bits and group size -> label, of what this weight's shape allows without a compensator."""
        return {
            (bits, size): label_of(self.method, WeightSpec(bits=bits, group_size=size))
            for bits in self.bits
            for size in self.group_sizes
            if size <= ref.shape[1]
        }

    def compensated(self, ref: WeightRef, width: Width) -> dict[int, str]:
        """Rank -> label, for compensators to offer with this width."""
        bits, size = width
        if ref.group == ROUTED or bits not in COMPENSATED_BITS or width not in self.menu(ref):
            return {}
        ranks = [rank for rank in self.ranks or () if rank <= min(ref.shape)]
        specs = {r: WeightSpec(bits=bits, group_size=size, rank=r, factor_bits=FACTOR_BITS) for r in ranks}
        return {rank: label_of(self.method, spec) for rank, spec in specs.items()}

    def labels(self, ref: WeightRef) -> list[str]:
        """All labels of a weight, in a fixed order."""
        return [
            label
            for width, plain in self.menu(ref).items()
            for label in (plain, *self.compensated(ref, width).values())
        ]

    def widths(self, ref: WeightRef) -> list[Width]:
        """All that must be quantised: the menu, and what PMQ's losses and the feed need beside it."""
        extra: Sequence[Width] = ()
        if ref.group == ROUTED and self.method != "rtn":
            extra = [(bits, PMQ_GROUP) for bits in PMQ_BITS]
        measured = [width for width in self.menu(ref) if width not in self.extrapolated(ref)]
        return list(dict.fromkeys((*measured, *extra, *((self.feed_width,) if self.replaces else ()))))

    def extrapolated(self, ref: WeightRef) -> dict[Width, tuple[Width, float]]:
        """Width -> the width it is extrapolated from, and by what factor."""
        if MEASURED_BITS not in self.bits:
            return {}
        return {
            (bits, size): ((MEASURED_BITS, size), RATIO * ((2**MEASURED_BITS - 1) / (2**bits - 1)) ** 2)
            for bits, size in self.menu(ref)
            if bits > MEASURED_BITS
        }

    @property
    def replaces(self) -> bool:
        """Whether weights are replaced once they are measured."""
        return self.feed == "compressed"

    @property
    def feed_width(self) -> Width:
        return self.feed_bits, PMQ_GROUP

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}
