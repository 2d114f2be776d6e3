# SPDX-License-Identifier: Apache-2.0
"""Zero-shot tasks by log-likelihood, scored from local files by the conventions of EleutherAI's
lm-eval (0.4).

Each row gives a context and one or more continuations; the model never generates:

    score(c) = sum over the tokens of c of log p(token | context, earlier tokens of c)

- lambada: the context is the text up to its last space, the continuation " " + last word; a row
  counts when every token of the continuation is the model's first choice.
- piqa, hellaswag: `acc` picks the highest score, `acc_norm` the highest score per character of the
  choice, without the space in front of it. (lm-eval divides by the length of the string in
  characters; where this is called byte length, the two agree on ASCII only.) The first of equal
  scores wins.

Where the continuation begins, in tokens: white space at the end of the context moves to the
continuation, then the context and the whole are tokenised and the continuation is the whole minus
as many tokens as the context has. Requests beyond the model's positions lose tokens on the left,
and the result counts them.

Refused: rows without the fields of their task, with the file, the line and the field; a
continuation that has no token of its own or alone exceeds the model's positions; logits that are
NaN or infinite.
"""

# B batch, T tokens, V vocabulary

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from moepress.errors import EvaluationError
from moepress.evaluate.jsonl import Row, read_rows
from moepress.evaluate.scoring import (
    check_vocabulary,
    encode,
    inference,
    log_probabilities,
    max_positions,
    suffix_logits,
)
from moepress.progress import Progress, silent


@dataclass(frozen=True, kw_only=True)
class Example:
    """One row of a task: what the model reads, what it may say, and which choice is right."""

    context: str
    choices: tuple[str, ...]
    gold: int
    line: int
    """Line of the file, from 1."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task's rows, read and checked."""

    name: str
    path: Path
    examples: tuple[Example, ...]


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Scores of one task, each with its standard error."""

    task: str
    n: int
    """Rows."""

    metrics: Mapping[str, float]
    """Shares of right rows, 0 to 1: `acc`, and `acc_norm` for tasks with choices."""

    stderr: Mapping[str, float | None]
    """Of each metric: sample standard deviation of the rows / sqrt(n). None for a single row."""

    truncated: int
    """Continuations whose context was cut on the left to fit the model's positions."""

    protocol: str
    """What was scored, in words; print it beside the figures."""


@dataclass(frozen=True, kw_only=True)
class TaskFormat:
    """How a row of a task becomes an example, and what is measured."""

    read: Callable[[Row], Example]
    measure: Callable[[Example, Sequence[_Score]], dict[str, bool]]
    protocol: str


@dataclass(frozen=True, kw_only=True)
class _Request:
    """One continuation to score: the last `scored` of `ids`; at least one token precedes them."""

    ids: list[int]
    scored: int
    truncated: bool
    line: int


@dataclass(frozen=True, kw_only=True)
class _Score:
    log_likelihood: float
    greedy: bool
    """Whether every token was the model's first choice."""


def load_task(name: str, path: str | Path, limit: int | None = None) -> Task:
    """Read a JSON-lines file, or its first `limit` rows, as the task `name`, a key of `TASKS`.

    Fields: lambada `text`; piqa `goal`, `sol1`, `sol2`, `label` (0 or 1); hellaswag `query`,
    `choices`, `gold`. Texts are taken as they are: what lm-eval does to HellaSwag's raw fields must
    have been done to `query`.

    Raises EvaluationError for an unknown task, a limit below 1, an unreadable or empty file, and a
    row that lacks something; rows after the limit are not looked at.
    """
    if name not in TASKS:
        raise EvaluationError(f'unknown task "{name}"; known tasks: {", ".join(TASKS)}')
    if limit is not None and limit < 1:
        raise EvaluationError(f"limit is {limit}; use at least 1, or none for the whole file")
    examples = tuple(TASKS[name].read(row) for row in islice(read_rows(path), limit))
    if not examples:
        raise EvaluationError(f"{path} has no rows")
    return Task(name=name, path=Path(path), examples=examples)


def run_task(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    batch_size: int = 8,
    progress: Progress = silent,
) -> TaskResult:
    """Score every row of `task`, zero-shot, `batch_size` continuations per forward pass.

    The batch size changes speed and memory, not the result, up to the rounding of the model's
    dtype. Special tokens are those that the tokenizer adds by default.

    Raises EvaluationError for a batch size below 1, token ids outside the model's vocabulary, and
    what the module's docstring lists.
    """
    if batch_size < 1:
        raise EvaluationError(f"batch_size is {batch_size}; use at least 1")
    requests = _requests(model, tokenizer, task)
    scores = iter(_scores(model, requests, batch_size, task, progress))
    form = TASKS[task.name]
    outcomes = [form.measure(example, list(islice(scores, len(example.choices)))) for example in task.examples]
    columns = {metric: [outcome[metric] for outcome in outcomes] for metric in outcomes[0]}
    return TaskResult(
        task=task.name,
        n=len(outcomes),
        metrics={metric: sum(column) / len(column) for metric, column in columns.items()},
        stderr={metric: _standard_error(column) for metric, column in columns.items()},
        truncated=sum(request.truncated for request in requests),
        protocol=form.protocol,
    )


def _read_lambada(row: Row) -> Example:
    context, _, word = row.words("text").rpartition(" ")
    if not context.strip() or not word:
        row.fail('the field "text" needs a context, a space and a last word')
    return Example(context=context, choices=(word,), gold=0, line=row.line)


def _read_piqa(row: Row) -> Example:
    return Example(
        context=f"Question: {row.words('goal')}\nAnswer:",
        choices=(row.words("sol1"), row.words("sol2")),
        gold=row.index("label", 2),
        line=row.line,
    )


def _read_hellaswag(row: Row) -> Example:
    choices = row.value("choices")
    if not isinstance(choices, list) or len(choices) < 2:
        row.fail('the field "choices" must be a list of at least 2 strings')
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        row.fail('the field "choices" holds something other than non-empty strings')
    return Example(
        context=row.words("query"),
        choices=tuple(choices),
        gold=row.index("gold", len(choices)),
        line=row.line,
    )


def _measure_greedy(example: Example, scores: Sequence[_Score]) -> dict[str, bool]:
    return {"acc": scores[example.gold].greedy}


def _measure_choices(example: Example, scores: Sequence[_Score]) -> dict[str, bool]:
    sums = [score.log_likelihood for score in scores]
    per_character = [total / len(choice) for total, choice in zip(sums, example.choices, strict=True)]
    return {
        "acc": sums.index(max(sums)) == example.gold,
        "acc_norm": per_character.index(max(per_character)) == example.gold,
    }


TASKS: dict[str, TaskFormat] = {
    "lambada": TaskFormat(
        read=_read_lambada,
        measure=_measure_greedy,
        protocol="LAMBADA, 0-shot, greedy match of the last word (lm-eval lambada_openai)",
    ),
    "piqa": TaskFormat(
        read=_read_piqa,
        measure=_measure_choices,
        protocol="PIQA, 0-shot, log-likelihood; acc_norm per character (lm-eval piqa)",
    ),
    "hellaswag": TaskFormat(
        read=_read_hellaswag,
        measure=_measure_choices,
        protocol="HellaSwag, 0-shot, log-likelihood; acc_norm per character (lm-eval hellaswag)",
    ),
}
"""The tasks that `load_task` knows, by name."""


def _requests(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task) -> list[_Request]:
    """All continuations of all rows, in order."""
    limit = max_positions(model) or math.inf
    requests = []
    for example in task.examples:
        where = f"{task.path}, line {example.line}"
        context = example.context.rstrip()
        gap = example.context[len(context) :] + " "
        skip = len(encode(tokenizer, context))
        for choice in example.choices:
            ids = encode(tokenizer, context + gap + choice)
            requests.append(_request(ids, skip, limit, example.line, where))
            check_vocabulary(model, ids)
    return requests


def _request(ids: list[int], skip: int, limit: float, line: int, where: str) -> _Request:
    scored = len(ids) - skip
    if skip < 1 or scored < 1:
        raise EvaluationError(
            f"{where}: the tokenizer gives the context {skip} and the continuation "
            f"{max(scored, 0)} tokens of their own; each needs at least 1"
        )
    if scored > limit:
        raise EvaluationError(f"{where}: the continuation has {scored} tokens, the model has {limit} positions")
    # The last token is only ever a target, so one token more than the positions fits.
    excess = max(len(ids) - 1 - limit, 0)
    return _Request(ids=ids[int(excess) :], scored=scored, truncated=excess > 0, line=line)


def _scores(
    model: PreTrainedModel,
    requests: list[_Request],
    batch_size: int,
    task: Task,
    progress: Progress,
) -> list[_Score]:
    """One score per request, in the order of `requests`."""
    # Longest first: an out-of-memory error comes at once, and rows of a batch need little padding.
    # Length counts from the first scored token too, because all rows of a batch keep as many logits
    # as the one that needs most.
    order = sorted(range(len(requests)), key=lambda i: (-len(requests[i].ids), requests[i].scored, i))
    scores: dict[int, _Score] = {}
    with inference(model), progress(task.name, len(requests)) as advance:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            scores.update(zip(batch, _score_batch(model, [requests[i] for i in batch]), strict=True))
            _refuse_nan([(requests[i], scores[i]) for i in batch], task.path)
            advance(len(batch))
    return [scores[i] for i in range(len(requests))]


def _refuse_nan(scored: Iterable[tuple[_Request, _Score]], path: Path) -> None:
    for request, score in scored:
        if math.isnan(score.log_likelihood):
            raise EvaluationError(f"{path}, line {request.line}: the model's logits are NaN or infinite")


def _score_batch(model: PreTrainedModel, batch: list[_Request]) -> list[_Score]:
    lengths = [len(request.ids) - 1 for request in batch]
    width = max(lengths)
    ids_BT = torch.zeros(len(batch), width, dtype=torch.long)
    mask_BT = torch.zeros(len(batch), width, dtype=torch.long)
    for row, (request, length) in enumerate(zip(batch, lengths, strict=True)):
        # Padding stands on the right, where a causal model's earlier positions cannot see it.
        ids_BT[row, :length] = torch.tensor(request.ids[:-1])
        mask_BT[row, :length] = 1
    starts = [length - request.scored for request, length in zip(batch, lengths, strict=True)]
    logits_BTV = suffix_logits(model, ids_BT, mask_BT, width - min(starts))
    return [
        _score(logits_TV[start - min(starts) :][: request.scored], request)
        for logits_TV, start, request in zip(logits_BTV, starts, batch, strict=True)
    ]


def _score(logits_TV: torch.Tensor, request: _Request) -> _Score:
    targets_T = torch.tensor(request.ids[-request.scored :])
    return _Score(
        log_likelihood=log_probabilities(logits_TV, targets_T).double().sum().item(),
        greedy=torch.equal(logits_TV.argmax(dim=-1).cpu(), targets_T),
    )


def _standard_error(column: Sequence[bool]) -> float | None:
    n = len(column)
    if n == 1:
        return None
    share = sum(column) / n
    return math.sqrt(share * (1 - share) / (n - 1))
