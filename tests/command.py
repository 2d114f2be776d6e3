# SPDX-License-Identifier: Apache-2.0
"""What a run of the command line leaves; the fixture `cli` makes such runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass
class Run:
    """What a command left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out.splitlines()[-1])


Cli = Callable[..., Run]
