# SPDX-License-Identifier: Apache-2.0
"""Who is timed."""

from __future__ import annotations

from moepress.bench.contenders import Contender, ours
from moepress.bench.gemlite_peer import GemLite
from moepress.bench.humming_peer import Humming
from moepress.bench.plain import PlainDense, PlainExperts


def lineup(kind: str, dtype: str, *, peers: bool = True) -> list[Contender]:
    """Everyone who has a layer of this kind, in the order of the table; `peers` are other projects' kernels."""
    everyone: list[Contender] = [
        ours(), PlainDense(dtype), PlainExperts(dtype, grouped=True), PlainExperts(dtype, grouped=False),
    ]  # fmt: skip
    if peers:
        everyone += [Humming(), GemLite()]
    return [contender for contender in everyone if kind in contender.kinds]
