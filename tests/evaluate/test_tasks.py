# SPDX-License-Identifier: Apache-2.0
"""Tasks on models whose answers are known, against a plain computation, and every refusal."""

from __future__ import annotations

import math
import random
import string
from pathlib import Path

import pytest
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from moepress.errors import EvaluationError
from moepress.evaluate.tasks import TASKS, load_task, run_task

# An evaluation-data folder beside the repository, absent in a user's clone.
DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def piqa(goal: str, first: str, second: str, label: int) -> dict:
    return {"goal": goal, "sol1": first, "sol2": second, "label": label}


def random_piqa_rows(count: int) -> list[dict]:
    draw = random.Random(5)

    def words(low: int, high: int) -> str:
        return "".join(draw.choices(string.ascii_letters, k=draw.randint(low, high)))

    return [piqa(words(1, 40), words(1, 20), words(1, 20), draw.randint(0, 1)) for _ in range(count)]


def plain_log_likelihood(model, tokenizer, context: str, continuation: str) -> float:
    ids, skip = tokenizer.encode(context + continuation), len(tokenizer.encode(context))
    with torch.no_grad():
        table = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(table[t - 1, ids[t]].item() for t in range(skip, len(ids)))


def test_lambada_accuracy_and_standard_error_by_hand(write_rows, tokenizer, bigram):
    path = write_rows({"text": "xa dog"}, {"text": "ya cat"}, {"text": "za dig"}, {"text": "wa dog"})
    result = run_task(bigram(bigram.table("a dog")), tokenizer, load_task("lambada", path))
    assert (result.task, result.n, result.truncated) == ("lambada", 4, 0)
    assert result.metrics == {"acc": 0.5}
    assert result.stderr["acc"] == pytest.approx(math.sqrt(4 * 0.25 / 3) / math.sqrt(4))
    assert "greedy match" in result.protocol


def test_white_space_at_the_end_of_the_context_is_scored(write_rows, tokenizer, bigram):
    path = write_rows({"text": "ab\n c"})
    task = load_task("lambada", path)
    expected = bigram(bigram.table("b\n c"))
    unexpected = bigram(bigram.table("bx", "\n c"))  # right about " c", wrong about the line break before it
    assert run_task(expected, tokenizer, task).metrics == {"acc": 1.0}
    assert run_task(unexpected, tokenizer, task).metrics == {"acc": 0.0}


def test_the_continuation_is_the_whole_less_the_tokens_of_the_context(write_rows, bigram):
    vocabulary = {"?": 0, "a": 1, " b": 2, " c": 3}
    words = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    words.pre_tokenizer = Split(Regex(r" ?[a-z]"), behavior="isolated")  # the space belongs to the word
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words)
    table = torch.zeros(4, 4)
    table[1, 2] = table[2, 3] = 9.0
    model = bigram(table)
    result = run_task(model, tokenizer, load_task("lambada", write_rows({"text": "a b c"}, {"text": "a c"})))
    assert result.metrics == {"acc": 0.5}
    assert sorted(model.seen[0].tolist()) == [[1, 0], [1, 2]]


def test_acc_norm_divides_by_the_characters_of_the_choice(write_rows, uniform, tokenizer):
    # With uniform logits a score is -(1 + characters) * log V: the shorter choice wins acc, the
    # longer acc_norm.
    path = write_rows(
        piqa("g", "ab", "abcd", 0),
        piqa("g", "abc", "a", 1),
        piqa("g", "abc", "ab", 1),
        piqa("g", "ab", "abc", 1),
    )
    result = run_task(uniform, tokenizer, load_task("piqa", path))
    assert result.metrics == {"acc": 0.75, "acc_norm": 0.25}
    assert result.stderr["acc"] == result.stderr["acc_norm"] == pytest.approx(0.25)


def test_the_length_is_in_characters_not_bytes(write_rows, uniform, tokenizer):
    # "éé" has 2 characters and 4 bytes. In characters "abc" is longer and wins; in bytes "éé"
    # would.
    path = write_rows({"query": "q", "choices": ["éé", "abc"], "gold": 1})
    assert run_task(uniform, tokenizer, load_task("hellaswag", path)).metrics["acc_norm"] == 1.0


def test_the_first_of_equal_scores_wins(write_rows, uniform, tokenizer):
    path = write_rows(piqa("g", "ab", "cd", 0), piqa("g", "ab", "cd", 1))
    result = run_task(uniform, tokenizer, load_task("piqa", path), batch_size=1)
    assert result.metrics == {"acc": 0.5, "acc_norm": 0.5}


def test_prompts(write_rows):
    example = load_task("piqa", write_rows(piqa("boil", "water ", "fire", 1))).examples[0]
    assert (example.context, example.choices) == ("Question: boil\nAnswer:", ("water ", "fire"))
    row = {"ind": 3, "query": "A man", "choices": ["sits.", "eats.", "is.", "x"], "gold": 2}
    example = load_task("hellaswag", write_rows(row)).examples[0]
    assert (example.context, example.gold, len(example.choices)) == ("A man", 2, 4)


def test_hellaswag_picks_the_likely_ending(write_rows, tokenizer, bigram):
    rows = [{"query": "wq", "choices": ["eb", "ab", "db", "cb"], "gold": gold} for gold in (1, 3, 1, 1)]
    result = run_task(bigram(bigram.table("q ab")), tokenizer, load_task("hellaswag", write_rows(*rows)))
    assert result.metrics == {"acc": 0.75, "acc_norm": 0.75}


@pytest.mark.parametrize("batch_size", [1, 3, 8, 100])
def test_random_model_agrees_with_a_plain_computation(write_rows, llama, tokenizer, batch_size):
    rows = random_piqa_rows(30)
    right = {"acc": 0, "acc_norm": 0}
    for row in rows:
        context, choices = f"Question: {row['goal']}\nAnswer:", (row["sol1"], row["sol2"])
        sums = [plain_log_likelihood(llama, tokenizer, context, " " + choice) for choice in choices]
        norms = [total / len(choice) for total, choice in zip(sums, choices, strict=True)]
        right["acc"] += (sums[1] > sums[0]) == row["label"]
        right["acc_norm"] += (norms[1] > norms[0]) == row["label"]

    result = run_task(llama, tokenizer, load_task("piqa", write_rows(*rows)), batch_size=batch_size)

    assert result.metrics == {name: count / 30 for name, count in right.items()}
    assert right["acc"] != right["acc_norm"]  # else the test could not tell the two apart


def test_over_long_requests_lose_their_left_end(write_rows, tokenizer, bigram):
    model = bigram(bigram.table("a dog"), positions=6)
    task = load_task("lambada", write_rows({"text": "some long text a dog"}, {"text": "a dog"}))
    result = run_task(model, tokenizer, task)
    assert result.metrics == {"acc": 1.0}
    assert result.truncated == 1
    # 7 tokens remain of the first: 6 are read and the last is only a target
    assert "".join(bigram.characters[i] for i in model.seen[0][0]) == "t a do"


def test_limit_and_progress(write_rows, uniform, tokenizer):
    labels = []

    def record(label, total):
        labels.append((label, total))
        from moepress.progress import silent

        return silent(label, total)

    task = load_task("piqa", write_rows(*random_piqa_rows(4), "not reached"), limit=2)
    result = run_task(uniform, tokenizer, task, progress=record)
    assert result.n == 2
    assert labels == [("piqa", 4)]


def test_one_row_has_no_standard_error(write_rows, uniform, tokenizer):
    result = run_task(uniform, tokenizer, load_task("lambada", write_rows({"text": "a b"})))
    assert result.stderr == {"acc": None}


def test_the_known_tasks_are_listed(tmp_path):
    assert list(TASKS) == ["lambada", "piqa", "hellaswag"]
    with pytest.raises(EvaluationError, match='unknown task "arc"; known tasks: lambada, piqa, hellaswag'):
        load_task("arc", tmp_path)


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("lambada", {"txt": "a b"}, 'the field "text" is missing; the row has: txt'),
        ("lambada", {"text": "word"}, "needs a context, a space and a last word"),
        ("lambada", {"text": " word"}, "needs a context, a space and a last word"),
        ("lambada", {"text": "word "}, "needs a context, a space and a last word"),
        ("lambada", {"text": " "}, 'the field "text" is empty'),
        ("piqa", {"goal": "g", "sol1": "a", "label": 0}, 'the field "sol2" is missing'),
        ("piqa", piqa("", "a", "b", 0), 'the field "goal" is empty'),
        ("piqa", piqa("g", "a", "", 0), 'the field "sol2" is empty'),
        (
            "piqa",
            {"goal": "g", "sol1": 1, "sol2": "b", "label": 0},
            '"sol1" must be a string, not int',
        ),
        (
            "piqa",
            piqa("g", "a", "b", 2),
            'the field "label" must be a whole number from 0 to 1, not 2',
        ),
        ("piqa", piqa("g", "a", "b", True), "not True"),
        ("piqa", piqa("g", "a", "b", "1"), "not '1'"),
        ("hellaswag", {"query": "q", "choices": ["a", "b"]}, 'the field "gold" is missing'),
        ("hellaswag", {"query": "q", "choices": "ab", "gold": 0}, "a list of at least 2 strings"),
        ("hellaswag", {"query": "q", "choices": ["a"], "gold": 0}, "a list of at least 2 strings"),
        (
            "hellaswag",
            {"query": "q", "choices": ["a", ""], "gold": 0},
            "other than non-empty strings",
        ),
        ("hellaswag", {"query": "q", "choices": ["a", "b"], "gold": -1}, "from 0 to 1, not -1"),
        ("hellaswag", {"choices": ["a", "b"], "gold": 0}, 'the field "query" is missing'),
        ("hellaswag", "{", "not JSON"),
    ],
)
def test_bad_rows_are_named(write_rows, name, row, message):
    good = {
        "lambada": {"text": "a b"},
        "piqa": piqa("g", "a", "b", 0),
        "hellaswag": {"query": "q", "choices": ["a", "b"], "gold": 0},
    }
    path = write_rows(good[name], row)
    with pytest.raises(EvaluationError, match=r"rows\.jsonl, line 2: ") as caught:
        load_task(name, path)
    assert message in str(caught.value)


def test_refused_requests(write_rows, uniform, tokenizer):
    path = write_rows({"text": "a b"})
    with pytest.raises(EvaluationError, match="limit is 0"):
        load_task("lambada", path, limit=0)
    with pytest.raises(EvaluationError, match="has no rows"):
        load_task("lambada", write_rows("", name="empty.jsonl"))
    with pytest.raises(EvaluationError, match="cannot be read: No such file"):
        load_task("lambada", path.with_name("absent.jsonl"))
    with pytest.raises(EvaluationError, match="batch_size is 0"):
        run_task(uniform, tokenizer, load_task("lambada", path), batch_size=0)


def test_refused_models(write_rows, tokenizer, bigram):
    task = load_task("lambada", write_rows({"text": "a b"}, {"text": "a bcd"}))
    with pytest.raises(EvaluationError, match="line 2: the continuation has 4 tokens, the model has 3 positions"):
        run_task(bigram(positions=3), tokenizer, task)
    with pytest.raises(EvaluationError, match="the model's vocabulary has 50 entries"):
        run_task(bigram(torch.zeros(50, 50)), tokenizer, task)
    table = bigram.table()
    table[bigram.index["b"]] = math.nan
    with pytest.raises(EvaluationError, match="line 2: the model's logits are NaN or infinite"):
        run_task(bigram(table), tokenizer, task)


def test_a_continuation_without_a_token_of_its_own_is_refused(write_rows, uniform):
    merged = Tokenizer(WordLevel({"?": 0}, unk_token="?"))  # the whole text is one token
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=merged)
    with pytest.raises(EvaluationError, match="line 1: the tokenizer gives the context 1 and the continuation 0"):
        run_task(uniform, tokenizer, load_task("lambada", write_rows({"text": "a b"})))


@pytest.mark.skipif(not DATA.is_dir(), reason="the evaluation data is not beside the repository")
@pytest.mark.parametrize(
    ("name", "file", "rows"),
    [
        ("lambada", "lambada_openai_test.jsonl", 5153),
        ("piqa", "piqa_valid.jsonl", 1838),
        ("hellaswag", "hellaswag_val_1500.jsonl", 1500),
    ],
)
def test_published_files_are_accepted_whole(name, file, rows):
    assert len(load_task(name, DATA / file).examples) == rows
