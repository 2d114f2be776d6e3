# SPDX-License-Identifier: Apache-2.0
"""Loading a checkpoint, compressed or not, for evaluation and generation; local files only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

import moepress.hf  # noqa: F401  (registers the compressed format)
from moepress.checkpoint.reader import CONFIG, read_json
from moepress.errors import CheckpointError, EvaluationError, MoepressError
from moepress.pruning.stored import PRUNING

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_model(
    folder: str | Path, device: torch.device, dtype: str = "auto", *, pruning: bool = True
) -> tuple[Any, Any]:
    """(model, tokenizer) from a folder; without `pruning` it runs all experts, whatever rules the folder has.

    Raises MoepressError for whatever keeps transformers from loading it.
    """
    if dtype not in {*DTYPES, "auto"}:
        raise EvaluationError(f"dtype {dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    if not Path(folder).is_dir():
        raise CheckpointError(f"{folder} is not a folder; download the checkpoint first and name its folder")
    # transformers takes no keyword that config.json does not have
    switch = {PRUNING: False} if not pruning and PRUNING in read_json(Path(folder) / CONFIG) else {}
    kind = DTYPES.get(dtype, torch.float32 if device.type == "cpu" else torch.bfloat16)
    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=kind, local_files_only=True, trust_remote_code=False, use_safetensors=True, **switch
        )
    except MoepressError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        raise CheckpointError(f"{folder} cannot be loaded by transformers: {error}") from error
    return model.to(device).eval(), tokenizer
