# SPDX-License-Identifier: Apache-2.0
"""The two sizes that belong beside every quality figure: bits per weight, and bytes held in memory.

    bits per weight = 8 * bytes stored / weights of the original model

Bytes stored means all of them: codes, scales, zeros, compensators and the tensors left as they
were. Refused: sizes that cannot be (no weight, negative bytes), and a model of which a part is
still on the meta device and so has no bytes yet.
"""

from __future__ import annotations

from itertools import chain

from torch import nn

from moepress.errors import EvaluationError


def bits_per_weight(num_bytes: int, num_weights: int) -> float:
    """Bits: 8 * `num_bytes` / `num_weights`; EvaluationError for no weight or negative bytes."""
    if num_weights < 1:
        raise EvaluationError(f"bits per weight need at least one weight, not {num_weights}")
    if num_bytes < 0:
        raise EvaluationError(f"a size cannot be {num_bytes} bytes")
    return 8 * num_bytes / num_weights


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the storages behind the model's parameters and buffers, each storage once.

    Tied tensors and views of one storage count once; a view of a part counts its whole storage,
    because that is what stays in memory. Tensors that a module keeps outside its parameters and
    buffers are not seen.

    Raises EvaluationError, with the tensor's name, for a tensor on the meta device.
    """
    sizes: dict[tuple[str, int], int] = {}
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise EvaluationError(f"{name} is on the meta device and has no bytes; load the model first")
        storage = tensor.untyped_storage()
        sizes[str(tensor.device), storage.data_ptr()] = storage.nbytes()
    return sum(sizes.values())
