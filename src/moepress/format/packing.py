# SPDX-License-Identifier: Apache-2.0
"""Dense packing of b-bit codes: b bits cost b bits, for every b from 1 to 8.

Eight codes make one little-endian integer of b bytes; code i sits at bits [i*b, (i+1)*b). For b = 3:

    byte    0                1                2
    bit     7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0  7 6 5 4 3 2 1 0
    code    c c b b b a a a  f e e e d d d c  h h h g g g f f        a is code 0, h is code 7

The last axis is packed; a row whose length is not a multiple of 8 ends in the fewest whole bytes that hold it, its
spare high bits zero. This file is the definition; kernels may reorder after loading, the disk never does.
"""

from __future__ import annotations

import torch

from moepress.format.spec import packed_bytes

_CPU_CHUNK, _GPU_CHUNK = 1 << 20, 1 << 26
"""Codes packed at once: the temporaries take several bytes a code."""


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 codes [..., K], each below 2**bits -> uint8 [..., ceil(K * bits / 8)]."""
    assert codes.dtype == torch.uint8, f"codes must be uint8, got {codes.dtype}"
    if bits == 8:
        return codes.contiguous()
    count = codes.shape[-1]
    rows = codes.flatten(0, -2) if codes.ndim > 1 else codes.unsqueeze(0)
    packed = torch.empty((rows.shape[0], packed_bytes(count, bits)), dtype=torch.uint8, device=codes.device)
    step = max(1, (_CPU_CHUNK if codes.device.type == "cpu" else _GPU_CHUNK) // max(1, count))
    for first in range(0, rows.shape[0], step):
        packed[first : first + step] = _pack_rows(rows[first : first + step], bits)
    return packed.view(*codes.shape[:-1], packed.shape[1])


def _pack_rows(codes: torch.Tensor, bits: int) -> torch.Tensor:
    count = codes.shape[-1]
    padded = torch.nn.functional.pad(codes, (0, -count % 8)).unflatten(-1, (-1, 8))
    # int32 holds eight codes of up to 4 bits: half the temporary memory of int64
    word = torch.zeros(padded.shape[:-1], dtype=torch.int32 if bits <= 4 else torch.int64, device=codes.device)
    for i in range(8):
        word |= padded[..., i].to(word.dtype) << (i * bits)
    packed = torch.empty((*word.shape, bits), dtype=torch.uint8, device=codes.device)
    for j in range(bits):
        packed[..., j] = ((word >> (8 * j)) & 255).to(torch.uint8)
    return packed.flatten(-2)[..., : packed_bytes(count, bits)]


def unpack_codes(packed: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """uint8 [..., ceil(count * bits / 8)] -> uint8 codes [..., count]; the inverse of `pack_codes`."""
    expected = packed_bytes(count, bits)
    assert packed.shape[-1] == expected, f"{count} codes of {bits} bits take {expected} bytes, got {packed.shape[-1]}"
    if bits == 8:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -expected % bits)).unflatten(-1, (-1, bits))
    kind = torch.int32 if bits <= 4 else torch.int64
    # a handful of wide operations: experts are many and small, and each operation costs microseconds
    byte_shifts = torch.arange(0, 8 * bits, 8, dtype=kind, device=packed.device)
    code_shifts = torch.arange(0, 8 * bits, bits, dtype=kind, device=packed.device)
    word = (padded.to(kind) << byte_shifts).sum(-1, keepdim=True, dtype=kind)
    # the mask also removes the sign bits that an arithmetic shift of a full word brings in
    codes = ((word >> code_shifts) & (2**bits - 1)).to(torch.uint8)
    return codes.flatten(-2)[..., :count]
