# SPDX-License-Identifier: Apache-2.0
"""Launches `pack`: stored parts, or codes of a byte each, -> records."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import torch

from moepress.format.spec import packed_bytes
from moepress.kernels.cuda.functions import find_function
from moepress.kernels.records import BLOCKS, Base, RecordLayout

SOURCE = "pack.cu"
_THREADS = 256
_TILE = {1: 2048, 2: 1024, 3: 1024}
"""Columns of a block, by the bits that a code is stored in; 512 for others."""
_POINTERS = "packed scale zero up_packed up_scale up_zero records"
_NUMBERS = "rows row_bytes groups row_groups across record_bytes tiles groups_log2 span_log2 piece last_mask"


class PackArguments(ctypes.Structure):
    """What the kernel takes."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in _POINTERS.split()), *((name, ctypes.c_int) for name in _NUMBERS.split())
    )  # fmt: skip


def launch_pack(sources: Sequence[Base], stored_bits: int, layout: RecordLayout, records: torch.Tensor) -> None:
    """Fills records [E, *layout.shape] from packed [E, n, bytes], scale and zero [E, n, G], contiguous on its device.

    `sources` are those of a weight of n = N rows, or of gate and up of n rows each, interleaved. A code is stored in
    `stored_bits`: the layout's bits, or 8 whatever they are. AssertionError as in `pack_arguments`.
    """
    if not records.numel():
        return
    arguments = pack_arguments(sources, stored_bits, layout, records)
    function = find_function(SOURCE, pack_instance(stored_bits, layout), records.device.index)
    function.launch(len(records) * arguments.row_groups * arguments.tiles, _THREADS, 0, (arguments,))


def pack_instance(stored_bits: int, layout: RecordLayout) -> str:
    return f"pack<{stored_bits}, {layout.word_bits}, {layout.units}>"


def pack_arguments(
    sources: Sequence[Base], stored_bits: int, layout: RecordLayout, records: torch.Tensor
) -> PackArguments:
    """What the kernel is told. AssertionError for tensors on several devices, or not contiguous."""
    tensors = [tensor for source in sources for tensor in source]
    for tensor in (*tensors, records):
        assert tensor.device == records.device, f"parts are on {tensor.device}, their records on {records.device}"
        assert tensor.is_contiguous(), "parts must be contiguous"
    row_bytes = packed_bytes(layout.columns, stored_bits)
    spare = 8 * row_bytes - layout.columns * stored_bits
    aligned = math.gcd(16, row_bytes, *(packed.data_ptr() for packed, _, _ in sources))  # all rows begin there
    addresses = [tensor.data_ptr() for tensor in tensors]
    return PackArguments(
        *addresses, *([None] * (6 - len(addresses))), records.data_ptr(), sources[0][0].shape[1], row_bytes,
        layout.groups, layout.row_blocks // BLOCKS, layout.records_per_row_block, layout.record_bytes,
        math.ceil(layout.padded_columns / _TILE.get(stored_bits, 512)), layout.groups_per_record.bit_length() - 1,
        layout.records_per_group.bit_length() - 1, {16: 16, 8: 4, 4: 4}.get(aligned, 1), 255 >> spare,
    )  # fmt: skip
