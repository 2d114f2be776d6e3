# SPDX-License-Identifier: Apache-2.0
"""Two ways into a model that is not ours: stop a run where a module gets its input, and put another forward in place.

`forward` is set on the instance, so that all other attributes that the model's code reads stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from moepress.errors import CalibrationError


class Reached(Exception):
    """Carries the input of the module at which a run was stopped."""

    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value


def input_of(module: nn.Module, run: Callable[[], Any]) -> torch.Tensor:
    """What `run()` hands to `module`; nothing after that is computed."""

    def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Reached(args[0] if args else kwargs["hidden_states"])

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        run()
    except Reached as reached:
        return reached.value
    finally:
        handle.remove()
    raise CalibrationError(f"the model does not use its {type(module).__name__}; this architecture cannot be measured")


@contextmanager
def forward_as(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside the block, calling `module` calls `function`."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward
