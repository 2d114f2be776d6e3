# SPDX-License-Identifier: Apache-2.0
"""moepress: Mixture-of-Experts checkpoints at 1 to 4 bits a weight, with the lost accuracy bought back.

`import moepress` registers the format with transformers, so that `AutoModelForCausalLM.from_pretrained(folder)` loads
compressed folders.
"""

from moepress.errors import MoepressError
from moepress.format.spec import WeightSpec
from moepress.hf import warmup  # importing it registers the format; nothing else may be relied on to do it
from moepress.pipeline import compress_checkpoint
from moepress.plan.plan import Plan
from moepress.plan.settings import Settings
from moepress.planning import plan_budget, plan_by_pmq, plan_checkpoint
from moepress.pruning.attach import set_pruning_dial
from moepress.verify import verify_checkpoint
from moepress.version import __version__

__all__ = [
    "MoepressError",
    "Plan",
    "Settings",
    "WeightSpec",
    "__version__",
    "compress_checkpoint",
    "plan_budget",
    "plan_by_pmq",
    "plan_checkpoint",
    "set_pruning_dial",
    "verify_checkpoint",
    "warmup",
]
