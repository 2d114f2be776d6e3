# SPDX-License-Identifier: Apache-2.0
"""Training of selectors: everything else of the model is frozen, and the user's target is met, not hoped for.

    decide      whether kept weights take over the sum of all, where the family does that: what loses less
    measure     each step runs the model unpruned on a few windows and backwards once, and fits every selector to the
                costs that this shows (objective.py); at the end the price of an expert is set so that the target share
                of activations is dropped
    distil      each step runs the model unpruned and with drawn choices, and lowers KL + price * experts run. The price
                is a controlled multiplier: it rises while too little is dropped and falls while too much is
    calibrate   on windows that were not trained on, the price is set again, for the choices that will really run

A step is a function of the trainer's state, its windows and the step's number, whose generator it seeds; so a run that
is continued from a stored state ends in the same bytes (on the CPU, where sums have one order).

The two phases, their order and all constants are ours. Legend: T tokens, L sites, k choices, W windows.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from moepress.errors import PruningError
from moepress.kernels.selector.reference import worth_running
from moepress.progress import Progress, silent
from moepress.pruning.attach import attach, detach
from moepress.pruning.baselines import chance_rules, threshold_for
from moepress.pruning.objective import cost_loss, divergence, draw_choice, measured_costs, mix, scores_of
from moepress.pruning.rule import Prune, Pruned, Rule, rescale
from moepress.pruning.selector import PROJECTIONS, Selector
from moepress.pruning.sites import Site, moe_sites

State = dict[str, Any]
"""What a run is continued from; tensors and plain values, on the CPU."""

_PASSES = 2
"""Of calibration: dropping in one layer changes what the next ones see."""
_WARM = 0.1
"""Share of a phase in which its learning rate rises."""
_GAIN = 1.0
"""How fast the price follows the share that is dropped: a step's factor is exp(gain * what lacks)."""
_BETAS = (0.9, 0.98)
_TRIED = 4
"""Windows on which renormalising is decided. It doubles what dropping 30 % costs one model, trebles it in another."""
_TEMPERATURES = 1.0, 0.2
"""Of the drawn choices, first and last, where 1 is the price of an expert."""


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """All that a user may ask for."""

    target: float = 0.2
    """Share of the routed activations to drop."""
    measure_steps: int = 96
    distil_steps: int = 32
    batch: int = 2
    """Windows a step."""
    held: int = 48
    """Windows that are not trained on, for calibration."""
    fits: int = 4
    """Updates of the selectors on the costs of one step."""
    fit_rate: float = 3e-3
    """Peak learning rate of the measuring phase."""
    distil_rate: float = 2e-3
    """Peak learning rate of the distilling phase."""
    renormalise: bool | None = None
    """Whether kept weights take over the sum of all; None: what loses less, of a family that renormalises its own."""
    projections: int = PROJECTIONS
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"measure_steps": 1, "distil_steps": 0, "batch": 1, "held": 1, "fits": 1, "projections": 1}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise PruningError(f"{name} is {getattr(self, name)}; the least is {low}")
        if not 0 < self.target < 1:
            raise PruningError(f"a target of {self.target:g} is no share; give one between 0 and 1, such as 0.2")

    @property
    def steps(self) -> int:
        return self.measure_steps + self.distil_steps

    @property
    def windows(self) -> int:
        """How many the run needs."""
        return self.steps * self.batch + self.held


@dataclass(frozen=True)
class Trained:
    """Selectors and what they do to the windows that were held out."""

    selectors: list[Selector]
    """For `moe_sites(model)`, on the CPU."""
    renormalises: bool | None
    """Whether they let kept weights take over the sum; None: the family's own way."""
    dropped: float
    """Share of the routed activations."""
    divergence: float
    """KL(unpruned || pruned) in nats a token."""
    parameters: int
    """Of all selectors."""


def train(
    model: Any,
    ids: torch.Tensor,
    settings: TrainingSettings,
    *,
    state: State | None = None,
    save: Callable[[State], None] = lambda state: None,
    save_every: int = 16,
    progress: Progress = silent,
) -> Trained:
    """Trains selectors for `model`, which is in eval mode, without rules and differentiable (dense.py), on windows of
    token ids [W, T].

    `state` continues a run from what `save` was given last. Raises PruningError where the model, the windows or the
    target do not allow it, and where a loss is not finite.
    """
    trainer = _Trainer(model, settings)
    _check_windows(ids, settings)
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(settings.seed))
    held, lessons = ids[order[: settings.held]], ids[order[settings.held : settings.windows]]
    if state is None:
        trainer.decide(held[:_TRIED])
    else:
        trainer.load(state)
    _run(trainer, trainer.measure, settings.measure_steps, lessons, "measuring costs", save, save_every, progress)
    if math.isnan(trainer.price):
        trainer.begin_distilling(held, progress)
    _run(trainer, trainer.distil, settings.steps, lessons, "distilling", save, save_every, progress)
    return trainer.finish(held, progress)


def _run(
    trainer: _Trainer,
    phase: Callable[[torch.Tensor], None],
    last: int,
    lessons: torch.Tensor,
    label: str,
    save: Callable[[State], None],
    save_every: int,
    progress: Progress,
) -> None:
    """All steps of a phase that are not done yet."""
    if trainer.step >= last:
        return
    batch = trainer.settings.batch
    with progress(label, last - trainer.step) as advance:
        while trainer.step < last:
            phase(lessons[trainer.step * batch :][:batch])
            trainer.step += 1
            if trainer.step % save_every == 0 or trainer.step == last:
                save(trainer.state())
            advance(1)


class _Trainer:
    """The state of a run, and its steps."""

    def __init__(self, model: Any, settings: TrainingSettings) -> None:
        if model.training:
            raise PruningError("the model is in training mode, where a loss may be random; call model.eval() first")
        self.model, self.settings = model, settings
        self.sites = moe_sites(model)
        self._check_target()
        self.selectors = [Selector(site.hidden_size, site.num_experts, settings.projections) for site in self.sites]
        for number, selector in enumerate(self.selectors):
            selector.initialise(settings.seed * len(self.sites) + number)
            selector.to(model.device)
        self.step, self.price = 0, math.nan
        self.renormalises: bool | None = None
        self._optimise()

    def decide(self, held: torch.Tensor) -> None:
        """Settles whether kept weights take over the sum: as asked, or what loses less at the target by chance."""
        wanted = self.settings.renormalise
        if wanted is None and any(site.renormalises for site in self.sites):
            wanted = self._loss_by_chance(held, True) <= self._loss_by_chance(held, False)
        self._settle(wanted)

    def measure(self, ids: torch.Tensor) -> None:
        """One step of the first phase on windows [batch, T]."""
        seen = self._slopes(ids.to(self.model.device))
        if self.step == 0:
            for selector, (_, *routed, costs) in zip(self.selectors, seen, strict=True):
                selector.begin_at(*routed, costs)
        for number in range(self.settings.fits):
            done = (self.step + number / self.settings.fits) / self.settings.measure_steps
            self._set_rate(self.settings.fit_rate * min(1.0, done / _WARM) * (1 - done))
            pairs = zip(self.selectors, seen, strict=True)
            losses = [cost_loss(selector.log_costs(*routed), costs) for selector, (*routed, costs) in pairs]
            self._descend(torch.stack(losses).sum())

    def begin_distilling(self, held: torch.Tensor, progress: Progress) -> None:
        """Settles the price, in nats, and makes it the selectors' unit."""
        self.price = self._calibrate(held, progress, "pricing", unpruned=True)
        self._optimise()

    def distil(self, ids: torch.Tensor) -> None:
        """One step of the second phase on windows [batch, T]."""
        settings, ids = self.settings, ids.to(self.model.device)
        done = (self.step - settings.measure_steps) / settings.distil_steps
        self._set_rate(settings.distil_rate * min(1.0, (done * settings.distil_steps + 1) / 8) * (1 - 0.9 * done))
        first, last = _TEMPERATURES
        choices = _Choices(first * (last / first) ** done, self._generator())
        with torch.no_grad():
            teacher = self.model(ids, use_cache=False).logits
        with self._attached([choices.pruner(*pair) for pair in zip(self.sites, self.selectors, strict=True)]):
            student = self.model(ids, use_cache=False).logits
        self._descend(divergence(teacher, student) + self.price * choices.drawn / ids.numel())
        offered = sum(site.top_k for site in self.sites) * ids.numel()
        self.price *= math.exp(_GAIN * (settings.target - (1 - choices.likeliest / offered)))

    def finish(self, held: torch.Tensor, progress: Progress) -> Trained:
        """Calibrates and reports."""
        self._calibrate(held, progress, "calibrating")
        kept = offered = 0
        total = 0.0
        with torch.no_grad(), progress("checking", len(held)) as advance:
            for ids in held:
                row = ids.unsqueeze(0).to(self.model.device)
                teacher = self.model(row, use_cache=False).logits
                records: list[torch.Tensor] = []
                with self._attached(self._recorders(records)):
                    total += divergence(teacher, self.model(row, use_cache=False).logits).item()
                kept += sum(int(worth_running(z).sum()) for z in records)
                offered += sum(z.numel() for z in records)
                advance(1)
        selectors = [selector.cpu().requires_grad_(False) for selector in self.selectors]
        for selector in selectors:
            selector.renormalises = self.renormalises
        parameters = sum(parameter.numel() for selector in selectors for parameter in selector.parameters())
        return Trained(selectors, self.renormalises, 1 - kept / offered, total / len(held), parameters)

    def state(self) -> State:
        """What `load` takes; a copy, which later steps leave alone."""
        return copy.deepcopy({
            "step": self.step,
            "price": self.price,
            "renormalises": self.renormalises,
            "selectors": [selector.state_dict() for selector in self.selectors],
            "optimiser": self._optimiser.state_dict(),
        })  # fmt: skip

    def load(self, state: State) -> None:
        self.step, self.price = state["step"], state["price"]
        self._settle(state["renormalises"])
        for selector, own in zip(self.selectors, state["selectors"], strict=True):
            selector.load_state_dict(own)
        self._optimiser.load_state_dict(state["optimiser"])

    def _settle(self, renormalises: bool | None) -> None:
        self.renormalises = renormalises
        if renormalises is not None:
            self.sites = [replace(site, renormalises=renormalises) for site in self.sites]

    def _loss_by_chance(self, held: torch.Tensor, renormalises: bool) -> float:
        """KL in nats a token over windows, with the weakest choices dropped at random."""
        rules: list[Rule] = list(chance_rules(self.sites, self.settings.target, strongest=True))
        for rule in rules:
            rule.renormalises = renormalises
        total = 0.0
        with torch.no_grad():
            for ids in held.unsqueeze(1).to(self.model.device):
                teacher = self.model(ids, use_cache=False).logits
                with self._attached(rules):
                    total += divergence(teacher, self.model(ids, use_cache=False).logits).item()
        return total / len(held)

    def _slopes(self, ids: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """hidden [n, H], ids, weights and measured costs [n, k] of every site, n tokens of windows."""
        seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

        def tap(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pruned:
            leaf = weights.detach().float().requires_grad_()
            seen.append((hidden.detach(), ids, leaf))
            return ids, leaf.to(weights.dtype)

        with self._attached([tap] * len(self.sites)):
            logits = self.model(ids, use_cache=False).logits.float().flatten(0, 1)
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self._generator()).squeeze(1)
        loss = cross_entropy(logits, drawn, reduction="sum")
        _finite(loss, "the loss of a window")
        slopes = torch.autograd.grad(loss, [leaf for *_, leaf in seen])
        return [
            (hidden, ids, leaf.detach(), measured_costs(slope, leaf.detach(), site.renormalises))
            for site, (hidden, ids, leaf), slope in zip(self.sites, seen, slopes, strict=True)
        ]

    def _calibrate(self, held: torch.Tensor, progress: Progress, label: str, *, unpruned: bool = False) -> float:
        """Sets the unit of costs so that the target is met at dial 0; what the new unit is in the old one.

        The first pass is over the `unpruned` model where costs have no unit yet.
        """
        product = 1.0
        with torch.no_grad(), progress(label, _PASSES * len(held)) as advance:
            for number in range(_PASSES):
                records: list[torch.Tensor] = []
                with self._attached(self._recorders(records, silent=unpruned and not number)):
                    for ids in held:
                        self.model(ids.unsqueeze(0).to(self.model.device), use_cache=False)
                        advance(1)
                price = price_for(records, self.settings.target)
                for selector in self.selectors:
                    selector.reprice(price)
                product *= price
        return product

    def _recorders(self, records: list[torch.Tensor], *, silent: bool = False) -> list[Prune]:
        """Functions that prune as the selectors say, unless `silent`, and put log-costs into `records`."""

        def recorder(site: Site, selector: Selector) -> Prune:
            def record(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pruned:
                records.append(selector.log_costs(hidden, ids, weights.float()))
                if silent:
                    return ids, weights
                return ids, rescale(weights, worth_running(records[-1]), site.renormalises)

            return record

        return [recorder(*pair) for pair in zip(self.sites, self.selectors, strict=True)]

    @contextmanager
    def _attached(self, functions: Sequence[Prune | Rule]) -> Iterator[None]:
        attach(self.model, functions)
        try:
            yield
        finally:
            detach(self.model)

    def _optimise(self) -> None:
        parameters = [parameter for selector in self.selectors for parameter in selector.parameters()]
        self._optimiser = torch.optim.Adam(parameters, betas=_BETAS)

    def _set_rate(self, rate: float) -> None:
        for group in self._optimiser.param_groups:
            group["lr"] = rate

    def _descend(self, loss: torch.Tensor) -> None:
        _finite(loss, f"the loss of step {self.step}")
        self._optimiser.zero_grad()
        loss.backward()
        self._optimiser.step()

    def _generator(self) -> torch.Generator:
        """Of this step alone."""
        return torch.Generator(self.model.device).manual_seed(self.settings.seed * self.settings.steps + self.step)

    def _check_target(self) -> None:
        if all(site.top_k < 2 for site in self.sites):
            raise PruningError("a router that chooses 1 expert a token leaves nothing to drop")
        offered = sum(site.top_k for site in self.sites)
        limit = (offered - len(self.sites)) / offered
        if self.settings.target >= limit:
            raise PruningError(
                f"a target of {self.settings.target:g} cannot be met: one expert a token is kept, so less than "
                f"{limit:.4g} of the activations can be dropped"
            )


class _Choices:
    """Draws how many experts to keep, and adds up how many those are."""

    def __init__(self, temperature: float, generator: torch.Generator) -> None:
        self._temperature, self._generator = temperature, generator
        self.drawn: torch.Tensor | float = 0.0
        """With a gradient."""
        self.likeliest = 0
        """What would be kept without chance."""

    def pruner(self, site: Site, selector: Selector) -> Prune:
        def prune(hidden: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Pruned:
            # the choice, not what earlier choices did to its inputs, is what a selector answers for
            log_costs = selector.log_costs(hidden.detach(), ids, weights.detach().float())
            descending, order = log_costs.sort(dim=-1, descending=True, stable=True)
            choice = draw_choice(scores_of(descending), self._temperature, self._generator)
            counts = torch.arange(1, site.top_k + 1, device=choice.device, dtype=choice.dtype)
            self.drawn = self.drawn + (choice @ counts).sum()
            self.likeliest += int(worth_running(log_costs.detach()).sum())
            ids, weights = (each.gather(-1, order) for each in (ids, weights))
            return ids, mix(choice, weights.float(), site.renormalises).to(weights.dtype)

        return prune


def price_for(records: Sequence[torch.Tensor], target: float) -> float:
    """The price of an expert at which `target` of the activations is dropped, from log-costs [n, k] of many tokens and
    layers; the closest that ties allow."""
    others = torch.cat([z.sort(dim=-1).values[:, :-1].flatten() for z in records])
    return math.exp(threshold_for(others, sum(z.numel() for z in records), target))


def _finite(loss: torch.Tensor, name: str) -> None:
    if not torch.isfinite(loss):
        raise PruningError(
            f"{name} is {loss.item()}; load the model in float32 or bfloat16, and if it is, the checkpoint is damaged"
        )


def _check_windows(ids: torch.Tensor, settings: TrainingSettings) -> None:
    if ids.ndim != 2 or len(ids) < settings.windows or ids.shape[1] < 2:
        raise PruningError(
            f"training needs {settings.windows} windows of 2 tokens or more, not token ids of shape {tuple(ids.shape)}"
        )
