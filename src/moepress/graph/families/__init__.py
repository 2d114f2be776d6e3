# SPDX-License-Identifier: Apache-2.0
"""The architectures that moepress knows, one declarative table a file; the file's name is the `model_type`."""

from __future__ import annotations

from moepress.errors import CheckpointError
from moepress.graph.families import (
    deepseek,
    deepseek_v2,
    deepseek_v3,
    glm4_moe,
    granitemoe,
    mixtral,
    olmoe,
    qwen2_moe,
    qwen3_moe,
)
from moepress.graph.view import Family

_MODULES = (mixtral, qwen2_moe, qwen3_moe, olmoe, deepseek, deepseek_v2, deepseek_v3, glm4_moe, granitemoe)
FAMILIES: dict[str, Family] = {module.FAMILY.model_type: module.FAMILY for module in _MODULES}


def family_of(model_type: object) -> Family:
    """The family of a config's `model_type`; CheckpointError lists the known ones otherwise."""
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise CheckpointError(
            f"config.json says model_type {model_type!r}, which moepress does not know; known: {known}"
        )
    return FAMILIES[model_type]
