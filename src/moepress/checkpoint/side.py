# SPDX-License-Identifier: Apache-2.0
"""moepress.json, the side manifest: digests of a folder's files, sealed by its own."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

SIDE_MANIFEST = "moepress.json"
SIDE_VERSION = 1


def seal(side: Mapping[str, Any]) -> bytes:
    """The text of moepress.json, which ends in the digest of what is before it."""
    return json_bytes({**side, "sha256": sha256(json_bytes(side))})


def file_entry(data: bytes) -> dict[str, Any]:
    """What moepress.json says of a file with these bytes."""
    return {"bytes": len(data), "sha256": sha256(data)}


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """As every JSON file of a folder is written."""
    return (json.dumps(value, indent=2) + "\n").encode()


def sha256(data: bytes) -> str:
    """The digest, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
