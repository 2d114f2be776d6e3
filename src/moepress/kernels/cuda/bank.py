# SPDX-License-Identifier: Apache-2.0
"""RecordBank: matrices in records on one device, as kernels are told of them; and how argument structs are built."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch

from moepress.kernels.cuda import choose
from moepress.kernels.records import RecordLayout


class BankArgument(ctypes.Structure):
    """Where a kernel finds its matrices: a table of addresses, or a first one and the way to the next."""

    _fields_ = (
        ("experts", ctypes.c_void_p), ("first", ctypes.c_void_p), ("word_bits", ctypes.c_int),
        ("centre", ctypes.c_int), ("stride", ctypes.c_uint64),
    )  # fmt: skip


def structure(name: str, before: str, after: str, numbers: str, floats: str = "") -> Any:
    """A struct of pointers, a bank, pointers, ints and floats, as the kernels' `Arguments` are."""
    fields: list[tuple[str, Any]] = [(each, ctypes.c_void_p) for each in before.split()]
    fields += [("bank", BankArgument)] if after else []
    fields += [(each, ctypes.c_void_p) for each in after.split()] + [(each, ctypes.c_int) for each in numbers.split()]
    fields += [(each, ctypes.c_float) for each in floats.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


@dataclass(frozen=True)
class RecordBank:
    """E matrices [rows, columns] of one group size in records on one CUDA device; their widths may differ."""

    records: tuple[torch.Tensor, ...]
    """For each width, uint8 [count, *layout.shape]."""
    layouts: tuple[RecordLayout, ...]
    where: tuple[tuple[int, int] | None, ...]
    """Expert -> (which of `records`, slot); None: it has no such matrix."""
    table: torch.Tensor
    """int64 [E and more, 2] on the device: address, 0 for none; word bits and, 32 bits up, the middle code. Below,
    of v of compensators, `scratch`."""
    in_order: bool | None = None
    """Whether expert e has slot e of a single tensor; None: not found out yet, which takes 5 us for 128 experts."""

    @classmethod
    def build(
        cls,
        records: Sequence[torch.Tensor],
        layouts: Sequence[RecordLayout],
        where: Sequence[tuple[int, int] | None],
        *,
        is_v: bool = False,
    ) -> RecordBank:
        """The bank with its table. The records must be complete and stay where they are.

        That of v of compensators (`is_v`) has room for as many rows of t as `gemv` can have, 8 KB for 64 columns.

        Waits for the device: a kernel asks for its first records before the work ahead of it on the stream has ended.
        """
        rows = [
            (records[place[0]][place[1]].data_ptr(), layouts[place[0]].word_bits | centre(layouts[place[0]]) << 32)
            if place
            else (0, 0)
            for place in where
        ]
        room = 1 + choose.MAX_PAIRS * t_columns(layouts[0]) // 8 if is_v else 0
        table = torch.zeros(len(rows) + room, 2, dtype=torch.int64)
        table[: len(rows)] = torch.tensor(rows, dtype=torch.int64)
        table = table.to(records[0].device)
        torch.cuda.synchronize(records[0].device)
        return cls(tuple(records), tuple(layouts), tuple(where), table)

    @property
    def scratch(self) -> torch.Tensor:
        """Of v of compensators, int64 [1 + .., 2]: a counter, and rows of t as `gemv` makes them, zeros before.

        A dense layer leaves zeros; t of half of a layer of experts is set to 0 by the next launch of the other half.
        """
        return self.table[len(self.where) :]

    @property
    def scratch_address(self) -> int:
        """Where that begins; a view of it takes 1 us, and launches ask several times."""
        assert len(self.table) > len(self.where), "a bank that is not v's has no room for t"
        return self.table.data_ptr() + 16 * len(self.where)

    @cached_property
    def shape(self) -> choose.Bank:
        return choose.Bank(self.layouts)

    @cached_property
    def argument(self) -> BankArgument:
        """Uniform banks need no table: one load less before the first record is asked for."""
        if are_in_order(self.where) if self.in_order is None else self.in_order:
            first, layout = self.records[0], self.layouts[0]
            return BankArgument(None, first.data_ptr(), layout.word_bits, centre(layout), first.stride(0))
        return BankArgument(self.table.data_ptr(), None, 0, 0, 0)


def are_in_order(where: Sequence[tuple[int, int] | None]) -> bool:
    """Whether expert e has slot e of the first, and so only, tensor of records."""
    return all(place == (0, expert) for expert, place in enumerate(where))


def t_columns(v: RecordLayout) -> int:
    """Of a row of t = v x, as in factor.cuh."""
    return max(32, v.rows)


def centre(layout: RecordLayout) -> int:
    """The middle code, which kernels take off before they scale: what is left of the zero rounds the better."""
    return 1 << (layout.bits - 1) if layout.bits > 1 else 0


class Factors(NamedTuple):
    """The compensators of one half of a layer of experts: W_e + u_e v_e, t = v x first. Ranks are padded to the most.

    Gate and up: v is [2 R, H], those of gate above those of up, and u [2 I, 2 R], rows interleaved as the weights' are,
    with zeros where a row of gate meets the columns of up. Down: v is [R, I] and u [H, R].
    """

    v: RecordBank
    u: RecordBank

    @property
    def ranks(self) -> choose.Ranks:
        return choose.ranks(self.v.layouts[0], self.u.layouts[0])

    @property
    def t_columns(self) -> int:
        """Of a row of t."""
        return t_columns(self.v.layouts[0])

    @property
    def u_columns(self) -> int:
        """Of a row of t where it is taken in whole records of u: v's padding of zero rows makes zeros of theirs."""
        return self.u.layouts[0].padded_columns
