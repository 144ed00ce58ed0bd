"""What the reference says of the dataset: the right numbers, computed once, and never those of
something else.
"""

import json
import os

import pytest
from helpers import perturbed, random_groups, tiny

from losses import sequence_logps
from spo import checkpoint
from spo.groups import make_batch
from spo.reference import ReferenceCache, complete, with_reference_logps


def test_the_numbers_are_those_of_the_groups_in_their_order():
    model, groups = tiny().double(), random_groups(7, 3)
    for size in (None, 1, 4):
        for group in with_reference_logps(groups, model, size):
            batch = make_batch([group])
            expected = sequence_logps(model(batch.tokens), batch.tokens, batch.mask)
            assert group.reference_logps == pytest.approx(expected.tolist(), abs=1e-10)
    assert [g.line for g in with_reference_logps(groups, model, 2)] == [g.line for g in groups]


@pytest.fixture
def asked(capsys):
    """(groups, wanted, model, cache) -> (the numbers of the wanted groups, what was said)."""

    def ask(groups, wanted, model, cache):
        capsys.readouterr()
        done = complete(groups, wanted, model, cache, None)
        known = [group.reference_logps is not None for group in done]
        assert known == [i in wanted for i in range(len(groups))]
        return [done[i].reference_logps for i in wanted], capsys.readouterr().out.splitlines()

    return ask


def test_only_what_is_wanted_is_computed_and_only_once(tmp_path, asked):
    model, groups, data = tiny(), random_groups(6, 2), str(tmp_path / "data.jsonl")
    checkpoint.save_pt(start := str(tmp_path / "start.pt"), model)
    cache = ReferenceCache(data, groups, start, "float32")
    first, said = asked(groups, [1, 4], model, cache)
    assert said == ["the reference reads 2 groups, once"]
    assert asked(groups, [1, 4], None, ReferenceCache(data, groups, start, "float32")) == (
        first,
        [],
    )
    both, said = asked(groups, [1, 2, 4], model, cache)
    assert said == ["the reference reads 1 groups, once"] and [both[0], both[2]] == first


@pytest.mark.parametrize(
    "what", ["data and tokenizer", "one word", "weights", "dtype", "damaged", "folder"]
)
def test_what_is_of_something_else_is_computed_anew_and_said(tmp_path, what, asked):
    model, groups, data, dtype = (
        tiny(),
        random_groups(6, 2),
        str(tmp_path / "data.jsonl"),
        "float32",
    )
    checkpoint.save_pt(start := str(tmp_path / "start.pt"), model)
    cache = ReferenceCache(data, groups, start, dtype)
    asked(groups, range(6), model, cache)
    if what == "data and tokenizer":
        groups = random_groups(6, 2, seed=5)
    elif what == "one word":  # of one response: as many tokens as before
        response = groups[2].responses[1]
        groups[2].responses[1] = [response[0] + 1, *response[1:]]
        what = "data and tokenizer"
    elif what == "weights":
        checkpoint.save_pt(start, model := perturbed(model))
    elif what == "dtype":
        dtype = "bfloat16"
    elif what == "damaged":
        os.truncate(cache.path, os.path.getsize(cache.path) - 20)
    else:
        data = str(tmp_path / "nowhere" / "data.jsonl")
    found, said = asked(groups, range(6), model, ReferenceCache(data, groups, start, dtype))
    assert found == [g.reference_logps for g in with_reference_logps(groups, model)]
    assert said[-1] == "the reference reads 6 groups, once" or "not kept" in said[-1]
    assert what == "folder" or what in said[0] and "computed anew" in said[0]


def test_a_run_reads_the_reference_once_and_a_second_run_not_at_all(workshop, capsys):
    logs = []
    for said in (True, False):
        folder = workshop("dpo", "--eval_stories=0", "--max_iters=4")
        assert ("the reference reads" in capsys.readouterr().out) is said
        with open(os.path.join(folder, "log.jsonl"), encoding="utf-8") as f:
            logs.append(
                [
                    {k: v for k, v in json.loads(line).items() if k != "tokens_per_second"}
                    for line in f
                ]
            )
    assert logs[0] == logs[1] and "margin" in logs[0][0]
