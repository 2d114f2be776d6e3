# SPDX-License-Identifier: Apache-2.0
"""What moepress raises when the input, not the program, is at fault.

Every message names the thing, the two numbers or values that disagree, and the way out. The command line prints it
as one line and exits with status 2; anything else that escapes is a defect of moepress.
"""


class MoepressError(ValueError):
    """Base of every error that a user's input can cause."""


class CheckpointError(MoepressError):
    """A checkpoint on disk is missing, damaged, unsafe or not what its description says."""


class ReadError(CheckpointError):
    """A tensor of a sound-looking checkpoint cannot be read now (a disk error, say); finished work is kept."""


class WriteError(CheckpointError):
    """The target cannot be written (a full disk, say); what was done is kept for --resume."""


class PlanError(MoepressError):
    """A plan or a setting contradicts itself or the checkpoint it is meant for."""


class ResumeError(MoepressError):
    """An unfinished run cannot be continued: its source or settings are not those of this run."""


class EvaluationError(MoepressError):
    """An evaluation file or request cannot be used."""


class CalibrationError(MoepressError):
    """A calibration pass cannot be run on this text or model, or is asked for what it cannot give."""


class KernelError(MoepressError):
    """A CUDA kernel cannot be compiled, loaded or launched."""


class PruningError(MoepressError):
    """Expert pruning cannot be done so: rules that do not fit the model, or a model that has nothing to prune."""
