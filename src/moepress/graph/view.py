# SPDX-License-Identifier: Apache-2.0
"""ModelGraph: tensor names -> roles, in forward order. Pure: knows names and shapes, opens nothing, needs no torch.

Every tensor of the source gets exactly one fate. `weights` are the matrices that can be compressed, each a whole tensor
or one expert's rows of a stacked one; `kept` are copied as they are; `folded` (FP8 block scales) live on inside the
weights they scale. A tensor that fits nowhere is an error that names it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from moepress.errors import CheckpointError

ROUTED = "expert"
DENSE_GROUPS = ("attn", "shared", "mlp")
"""Role groups that every token uses: MiLo's dense set."""


@dataclass(frozen=True)
class SoftmaxRouter:
    """A router that is a linear, a softmax over all experts and the top k of it (kernels/router/reference.py).

    `module` is its name in the block, beside the experts; `scaling` the key of the config's factor of the weights, if
    there is one; `only_if` what the config must say for the router to be of this kind.
    """

    module: str = "gate"
    float32_weights: bool = False
    float32_logits: bool = False
    scaling: str | None = None
    only_if: tuple[tuple[str, object], ...] = ()


@dataclass(frozen=True)
class Family:
    """One architecture's naming, as data. Templates hold {layer} and {expert} where numbers stand.

    `weights` maps a template of a tensor's name to its role, such as `attn.q` or `expert.down`. A tuple of roles means
    a stacked tensor [experts, rows, in_features] whose rows are that many equal blocks, one per role.
    `bank` is the template of the module that holds a layer's experts, as the files spell it, and `renames` are the
    substitutions from the files' spelling to that of transformers' modules. `renormalises` says whether the router
    scales a token's top-k weights to a fixed sum; None where the config's `norm_topk_prob` says it. `router` is None
    for any but the usual kind.
    """

    model_type: str
    weights: Mapping[str, str | tuple[str, ...]]
    kept: Mapping[str, str]
    bank: str
    renames: tuple[tuple[str, str], ...] = ()
    renormalises: bool | None = None
    router: SoftmaxRouter | None = None

    def module_name(self, stored: str) -> str:
        """A stored tensor or module name in transformers' spelling."""
        for old, new in self.renames:
            stored = stored.replace(old, new)
        return stored


@dataclass(frozen=True)
class WeightRef:
    """One (N, K) matrix. `name` is unique and readable; `tensor` is where its values lie in the source."""

    name: str
    tensor: str
    role: str
    layer: int
    shape: tuple[int, int]
    expert: int | None = None
    slot: int | None = None
    """Index into the first dimension of a stacked source tensor."""
    rows: tuple[int, int] | None = None
    """Row range inside that slot."""
    bank: str | None = None

    @property
    def group(self) -> str:
        """attn, shared, mlp or expert."""
        return self.role.split(".")[0]

    @property
    def projection(self) -> str:
        """gate, up, down, or an attention projection's letter."""
        return self.role.split(".", 1)[1]

    @property
    def module(self) -> str:
        """The stored name of the linear module that this weight belongs to."""
        return self.name.removesuffix(".weight")

    @property
    def numel(self) -> int:
        return self.shape[0] * self.shape[1]


@dataclass(frozen=True)
class KeptTensor:
    """A tensor that is copied; `role` is router, norm, embedding, head, bias or other."""

    name: str
    role: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelGraph:
    """The whole checkpoint by fate."""

    family: Family
    weights: tuple[WeightRef, ...]
    kept: tuple[KeptTensor, ...]
    folded: tuple[str, ...]


def build_graph(family: Family, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> ModelGraph:
    """Tensor name -> (dtype, shape) to a ModelGraph. Raises CheckpointError for a tensor with no fate.

    A tensor of one dimension that no template knows (a bias, a norm) is kept; a matrix that none knows is an error,
    because it may be an expert under an unexpected name, and experts must not stay at full size unnoticed.
    """
    weights: list[WeightRef] = []
    kept: list[KeptTensor] = []
    folded: list[str] = []
    for name, (dtype, shape) in tensors.items():
        if name.endswith("_scale_inv"):
            folded.append(name)
        elif found := _match(family.weights, name):
            weights.extend(_refs(family, name, shape, *found))
        elif found := _match(family.kept, name):
            kept.append(KeptTensor(name, str(found[0]), dtype, shape))
        elif len(shape) <= 1:
            kept.append(KeptTensor(name, "bias" if name.endswith("bias") else "other", dtype, shape))
        else:
            raise CheckpointError(
                f"{name} {shape} is no tensor that moepress knows in family {family.model_type}; "
                "the checkpoint may be of another architecture than its config.json says"
            )
    _check_folded(folded, tensors)
    order = {"attn": 0, "mlp": 1, "shared": 2, ROUTED: 3}
    weights.sort(key=lambda ref: (ref.layer, order[ref.group], -1 if ref.expert is None else ref.expert))
    _check_banks(weights)
    return ModelGraph(family, tuple(weights), tuple(sorted(kept, key=_kept_order)), tuple(folded))


def _refs(
    family: Family, name: str, shape: tuple[int, ...], role: object, layer: int, expert: int | None
) -> Iterable[WeightRef]:
    bank = family.bank.format(layer=layer)
    if 0 in shape:
        raise CheckpointError(f"{name} has shape {shape}, which holds no value; the checkpoint is damaged")
    if isinstance(role, str):
        if len(shape) != 2:
            raise CheckpointError(f"{name} has shape {shape}; a weight of role {role} has two dimensions")
        own = bank if expert is not None else None
        yield WeightRef(name, name, role, layer, (shape[0], shape[1]), expert=expert, bank=own)
        return
    assert isinstance(role, tuple)
    if len(shape) != 3 or shape[1] % len(role):
        raise CheckpointError(f"{name} has shape {shape}; stacked experts are (experts, {len(role)} x rows, inputs)")
    rows = shape[1] // len(role)
    for slot in range(shape[0]):
        for i, each in enumerate(role):
            label = f"{name}#{slot}.{each.split('.')[1]}"
            yield WeightRef(
                label, name, each, layer, (rows, shape[2]),
                expert=slot, slot=slot, rows=(i * rows, (i + 1) * rows), bank=bank,
            )  # fmt: skip


def _match(templates: Mapping[str, object], name: str) -> tuple[object, int, int | None] | None:
    for template, role in templates.items():
        if found := _compiled(template).fullmatch(name):
            numbers = found.groupdict()
            expert = numbers.get("expert")
            return role, int(numbers.get("layer") or -1), None if expert is None else int(expert)
    return None


@cache
def _compiled(template: str) -> re.Pattern[str]:
    pattern = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d{1,5})")
    return re.compile(pattern.replace(r"\{expert\}", r"(?P<expert>\d{1,5})").replace(r"\*", "[^.]+"))


def _kept_order(tensor: KeptTensor) -> tuple[int, str]:
    # embeddings first, layers by number, then the rest: close to forward order, and independent of the files' order
    layer = re.search(r"\.(\d{1,5})\.", tensor.name)
    return (-1 if tensor.role == "embedding" else int(layer.group(1)) if layer else 10**6, tensor.name)


def _check_folded(folded: list[str], tensors: Mapping[str, object]) -> None:
    for name in folded:
        if name.removesuffix("_scale_inv") not in tensors:
            raise CheckpointError(f"{name} has no tensor to scale; the checkpoint is incomplete")


def _check_banks(weights: list[WeightRef]) -> None:
    """Each bank has experts 0..E-1, each with gate, up and down of one shape per role."""
    banks: dict[str, dict[tuple[int, str], WeightRef]] = {}
    for ref in weights:
        if ref.bank is not None and ref.expert is not None:
            bank = banks.setdefault(ref.bank, {})
            bank[ref.expert, ref.projection] = ref
    for name, bank in banks.items():
        count = max(expert for expert, _ in bank) + 1
        for expert in range(count):
            for projection in ("gate", "up", "down"):
                found = bank.get((expert, projection))
                if found is None:
                    raise CheckpointError(f"{name}: expert {expert} of {count} has no {projection} weight")
                like = bank[0, "down" if projection == "down" else "gate"]
                if found.shape != like.shape:
                    raise CheckpointError(f"{found.name} has shape {found.shape} but {like.name} has {like.shape}")
