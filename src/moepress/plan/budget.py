# SPDX-License-Identifier: Apache-2.0
"""Budget: how small the result shall be, as a user types it. Pure, no torch.

    2.5bpw                      bits per compressed weight: codes, scales, zeros and factors
    18GB 18GiB 500MB 900MiB     bytes of everything stored: compressed weights and the tensors that are kept
    123456789B                  the same in bytes

GB and MB are powers of ten, GiB and MiB powers of two. Numbers are taken exactly, as fractions.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from moepress.errors import PlanError

UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
MAX_BPW = 16
"""What a weight takes uncompressed: more cannot be meant."""

_FORM = re.compile(r"(\d{1,15}(?:\.\d{1,15})?)\s*([A-Za-z]+)", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Just one of the two is set."""

    text: str
    """As it was typed."""
    bpw: Fraction | None = None
    """Bits per compressed weight."""
    total_bytes: int | None = None
    """Bytes of all tensors."""

    def bytes_for(self, weight_numel: int, kept_bytes: int) -> int:
        """Bytes that the compressed weights may take, `weight_numel` of them beside `kept_bytes` of kept tensors.

        Raises PlanError where the kept tensors alone fill the budget, or where there is no weight to compress.
        """
        if weight_numel < 1:
            raise PlanError(f"budget {self.text}: there is no weight to compress; keep fewer of them")
        if self.bpw is not None:
            return int(self.bpw * weight_numel / 8)
        assert self.total_bytes is not None, f"budget {self.text} has neither bpw nor bytes"
        if self.total_bytes <= kept_bytes:
            raise PlanError(
                f"budget {self.text} is {self.total_bytes:,} bytes, and what is kept as it is (embeddings, norms, "
                f"routers and the like) takes {kept_bytes:,} already; ask for more or keep less"
            )
        return self.total_bytes - kept_bytes


def parse_budget(text: str) -> Budget:
    """`2.5bpw`, `18GB`, `18GiB`, `500MB` or `123456789B`, in any case. Raises PlanError for anything else."""
    found = _FORM.fullmatch(text.strip())
    unit = found.group(2).lower() if found else ""
    if found is None or unit not in {"bpw", *UNITS}:
        raise PlanError(
            f"budget {text!r} is not understood; write bits per weight (2.5bpw) or a size with its unit (18GB, 18GiB, "
            "500MB, 123456789B)"
        )
    number = Fraction(found.group(1))
    if unit == "bpw":
        if not 0 < number <= MAX_BPW:
            raise PlanError(f"budget {text!r}: {float(number):g} bits per weight is not above 0 and at most {MAX_BPW}")
        return Budget(text=text.strip(), bpw=number)
    size = number * UNITS[unit]
    if size < 1 or (unit == "b" and size.denominator > 1):
        raise PlanError(f"budget {text!r} is {float(size):g} bytes; give a whole number of bytes of at least 1")
    return Budget(text=text.strip(), total_bytes=int(size))
