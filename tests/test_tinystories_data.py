"""Text -> ranked groups -> files -> batches: formats, what is refused, what is scored."""

import itertools
import math
import random
import re

import pytest
import torch
from helpers import tiny, write

import tinystories_data as data
from judge import BothOrders
from spo import parallel, pretokenize
from spo.checkpoint import save_pt
from spo.generate import tile_evenly
from spo.groups import EncodedGroup, encode_groups, make_batch, micro_batches, split_by_cost
from spo.records import RankedGroup, read_groups, require


def test_every_format_is_read_best_first(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"prompt": "p", "responses": ["a", "b", "c"], "ranking": [1, 2, 0], "note": "kept"},
        "",
        {"responses": ["a", "b", "c"], "best": 2, "finished": [True, True, False]},
        {"prompt": "p", "chosen": "good", "rejected": "bad"},
        {"text": "a story"},
        {"prompt": "p", "responses": ["a", "b"]},
        {"text": "cut", "finished": False, "seed": 0, "checkpoint": "x"},
    )
    assert read_groups(path) == [
        RankedGroup("p", ("b", "c", "a"), (True,) * 3, "ranking", 1),
        RankedGroup("", ("c", "a", "b"), (False, True, True), "best", 3),
        RankedGroup("p", ("good", "bad"), (True, True), "ranking", 4),
        RankedGroup("", ("a story",), (True,), "text", 5),
        RankedGroup("p", ("a", "b"), (True, True), "text", 6),
        RankedGroup("", ("cut",), (False,), "text", 7),
    ]


@pytest.mark.parametrize(
    "line,message",
    [
        ("{not json", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        ("[1]", "not a JSON object"),
        ({"prompt": 3, "text": "a"}, "prompt is not a text"),
        ({"responses": []}, "needs"),
        ({"chosen": "a"}, 'has "chosen" and no "rejected"'),
        ({"responses": ["a", 2]}, "not a text"),
        ('{"text": "half \\ud800 a pair"}', "text holds \\ud800, half of a surrogate pair"),
        ({"responses": ["a", "b"], "ranking": [1, 1]}, "no permutation of 0..1"),
        ({"responses": ["a", "b"], "ranking": [True, False]}, "no permutation"),
        ({"responses": ["a", "b"], "ranking": [1, 2]}, "no permutation"),
        ({"responses": ["a", "b"], "best": 2}, '"best" 2 is not an index below 2'),
        ({"responses": ["a", "b"], "best": "0"}, "not an index"),
        ({"responses": ["a", "b"], "finished": [True]}, '"finished" is not a list of 2'),
    ],
)
def test_a_malformed_line_is_named(tmp_path, line, message):
    path = write(tmp_path / "d.jsonl", {"text": "fine"}, line)
    with pytest.raises(ValueError, match="d.jsonl line 2: ") as error:
        read_groups(path)
    assert message in str(error.value)


def test_no_file_no_groups_and_other_encodings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="none.jsonl: no such file"):
        read_groups(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no groups"):
        read_groups(write(tmp_path / "d.jsonl", "", ""))
    (tmp_path / "d.jsonl").write_bytes('{"text": "caf\u00e9"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 1: not a line of JSON in UTF-8"):
        read_groups(str(tmp_path / "d.jsonl"))


@pytest.mark.parametrize(
    "need,record,message",
    [
        (
            "pair",
            {"responses": ["a", "b", "c"], "ranking": [0, 1, 2]},
            "compares pairs, the group has 3",
        ),
        ("pair", {"responses": ["a", "b"]}, "needs preferences, and this is text; .*rank"),
        (
            "ranking",
            {"responses": ["a", "b", "c"], "best": 0},
            "needs a full ranking, and of this group only the best is known",
        ),
        ("best", {"responses": ["a", "b", "c"]}, "needs the best response named"),
    ],
)
def test_a_dataset_that_does_not_fit_the_loss_is_refused_by_line(tmp_path, need, record, message):
    path = write(tmp_path / "d.jsonl", record)
    with pytest.raises(ValueError, match=f"d.jsonl line 1: .*{message}"):
        require(read_groups(path), need, path, "some_loss")


def test_groups_of_different_sizes_are_refused(tmp_path):
    path = write(
        tmp_path / "d.jsonl",
        {"responses": ["a", "b"], "best": 0},
        {"responses": ["a", "b", "c"], "best": 0},
    )
    with pytest.raises(ValueError, match="line 2: group has 3 responses, expected 2 as in line 1"):
        require(read_groups(path), "best", path, "spo_bon")


def test_the_best_of_two_is_a_full_ranking(tmp_path):
    path = write(tmp_path / "d.jsonl", {"responses": ["a", "b"], "best": 1})
    (group,) = read_groups(path)
    assert group.order == "ranking" and group.responses == ("b", "a")
    require([group], "pair", path, "dpo")


def test_terminator_is_scored_and_kept_and_none_is_invented(tokenizer):
    groups = [RankedGroup("Once upon", (" a time.", " a day"), (True, False), "ranking", 1)]
    (group,), drops = encode_groups(groups, tokenizer, eos_id=1, max_seq_len=64)
    assert (
        group.prompt == tokenizer.encode("Once upon", bos=True)
        and group.prompt[0] == 1
        and not drops
    )
    assert group.responses == [tokenizer.encode("a time.") + [1], tokenizer.encode("a day")]
    batch = make_batch([group])
    scored = [row[mask].tolist() for row, mask in zip(batch.tokens, batch.mask, strict=True)]
    assert scored == group.responses  # neither BOS, nor prompt, nor padding
    assert batch.lengths.tolist() == [[len(r) for r in group.responses]]


def test_a_response_is_what_follows_the_prompt_to_the_letter(tokenizer):
    """A text that begins gets sentencepiece's space; one that goes on has its own, or none."""
    for prompt, text in [
        ("Once upon a time", ", there was"),
        ("Once upon a time", " there"),
        ("Lil", "y ran."),
        ("", "Once"),
    ]:
        start, ids = tokenizer.encode(prompt, bos=True), tokenizer.encode_after(prompt, text)
        assert (
            tokenizer.decode(start + ids) == prompt + text
            and tokenizer.decode_after(start, ids) == text
        )
        groups = [RankedGroup(prompt, (text, " x"), (True, True), "ranking", 1)]
        assert encode_groups(groups, tokenizer, 1, 64)[0][0].responses[0] == ids + [1]


def test_the_mask_goes_by_length_not_by_token_value():
    """BOS, terminator and padding may share an id, and a response may hold it."""
    batch = make_batch([EncodedGroup([0], [[0, 5, 0, 0], [0]], 1)])
    assert batch.mask.tolist() == [
        [False, True, True, True, True],
        [False, True, False, False, False],
    ]


def test_empty_identical_and_overlong_responses_are_dropped_and_counted(tokenizer):
    def group(line, *responses):
        return RankedGroup("", responses, (True,) * len(responses), "ranking", line)

    groups = [
        group(1, "a", "b"),
        group(2, "a", " \n"),
        group(3, "a", "a"),
        group(4, "a", "b " * 99),
        group(5, "", "b"),
    ]
    encoded, drops = encode_groups(groups, tokenizer, 1, max_seq_len=32)
    assert [g.line for g in encoded] == [1]
    assert drops == {
        "an empty response": [2, 5],
        "identical responses": [3],
        "longer than 32 tokens": [4],
    }


def test_a_ranking_is_indices_best_first_all_the_way_down(tmp_path):
    """A 3-cycle: [1, 2, 0] read as places instead of indices would put "a" second."""
    members = [{"prompt": "", "text": t} for t in ("a", "b", "c")]
    (record,) = data.agreed_records([members], [BothOrders([1, 2, 0], [1, 2, 0])])
    path = write(tmp_path / "d.jsonl", record)
    assert read_groups(path)[0].responses == ("b", "c", "a")
    best = write(tmp_path / "best.jsonl", data.to_best_of_n(record))
    assert read_groups(best)[0].responses == ("b", "a", "c")
    pair = write(tmp_path / "pair.jsonl", *data.to_pairs(record, "best_worst"))
    assert read_groups(pair)[0].responses == ("b", "a")
    every = write(tmp_path / "all.jsonl", *data.to_pairs(record, "all"))
    assert [g.responses for g in read_groups(every)] == [("b", "c"), ("b", "a"), ("c", "a")]


def test_a_story_that_was_cut_stays_one_through_rank_best_of_n_and_pairs():
    """No terminator is put behind it: it would be trained to stop there."""
    members = [{"prompt": "", "text": t, "finished": t != "b"} for t in "abc"]
    members[2].pop("finished")  # of a file that does not say: whole
    record = data.agreed_records([members], [BothOrders([2, 1, 0], [2, 1, 0])])[0]
    assert record["finished"] == [True, False, True] and record["ranking"] == [2, 1, 0]
    assert data.to_best_of_n(record)["finished"] == [True, False, True]
    (pair,) = data.to_pairs(record | {"ranking": [1, 0, 2]}, "best_worst")
    assert pair["responses"] == ["b", "c"] and pair["finished"] == [False, True]
    for pair in data.to_pairs(record, "all"):
        assert pair["finished"] == [text != "b" for text in pair["responses"]]


def test_groups_never_mix_prompts():
    stories = [{"prompt": p, "text": f"{p}{i}"} for p in "xyz" for i in range(3)]
    groups, left_out = data.group_stories(stories, 2)
    assert [[m["text"] for m in g] for g in groups] == [
        ["x0", "x1"],
        ["y0", "y1"],
        ["z0", "z1"],
    ] and left_out == {"fewer than 2 to one prompt": 3}
    assert tile_evenly(["x", "y"], 6) == ["x", "x", "x", "y", "y", "y"]


def test_groups_that_no_judge_could_rank_are_left_out_and_counted():
    stories = [{"prompt": "", "text": t} for t in ("a", "b", "a", "a", "a", " ")]
    groups, left_out = data.group_stories(stories, 2)
    assert groups == [stories[:2]] and left_out == {
        "in a group with identical stories": 2,
        "in a group with an empty story": 2,
    }


def test_from_generate_to_check(tmp_path, tokenizer, capsys):
    """The files of one command are what the next one reads."""
    model, file = tiny(vocab_size=512), lambda name: str(tmp_path / name)
    save_pt(file("m.pt"), model)
    common = [
        f"--checkpoint={file('m.pt')}",
        f"--tokenizer={tokenizer.path}",
        "--max_new_tokens=40",
        "--num_stories=60",
    ]
    data.main(["generate", *common, f"--out={file('s.jsonl')}", "--batch_size=3"])
    data.main(["generate", *common, f"--out={file('t.jsonl')}"])
    assert (tmp_path / "s.jsonl").read_bytes() == (
        tmp_path / "t.jsonl"
    ).read_bytes()  # whatever the batch size
    data.main(
        ["rank", f"--stories={file('s.jsonl')}", f"--out={file('r.jsonl')}", "--group_size=5"]
    )
    data.main(["best_of_n", f"--data={file('r.jsonl')}", f"--out={file('b.jsonl')}"])
    data.main(["pairs", f"--data={file('r.jsonl')}", f"--out={file('p.jsonl')}", "--pairs=all"])
    kept = int(
        re.search(r"kept (\d+)", capsys.readouterr().out)[1]
    )  # some of these stories are alike to the judge
    data.main(["check", f"--data={file('b.jsonl')}", f"--tokenizer={tokenizer.path}"])
    assert f"{kept} of 5 responses, known of their order: best" in capsys.readouterr().out
    assert 0 < kept and len(read_groups(file("p.jsonl"))) == 10 * kept
    with pytest.raises(ValueError, match="b.jsonl line 1: needs .* full"):
        data.main(["pairs", f"--data={file('b.jsonl')}"])


def test_the_demos_text_is_seeded_and_an_interrupted_build_goes_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(data, "DEMO_STORIES", 200)
    monkeypatch.setattr(data, "DEMO_VOCAB", 512)
    with monkeypatch.context() as broken:  # killed while the tokenizer was made
        broken.setattr(
            pretokenize, "train_tokenizer", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            data.demo_text()
    stories = (tmp_path / "data/demo/stories.jsonl").read_bytes()
    data.demo_text()
    assert (tmp_path / "data/demo/stories.jsonl").read_bytes() == stories
    first = (tmp_path / "data/demo/tokenizer.model").read_bytes()
    (tmp_path / "data/demo/ranked.jsonl").write_text("of a former recipe")
    monkeypatch.setattr(data, "DEMO_SEED", 7)  # another recipe: nothing of the former one stays
    data.demo_text()
    assert not (tmp_path / "data/demo/ranked.jsonl").exists()
    assert (tmp_path / "data/demo/stories.jsonl").read_bytes() != stories
    monkeypatch.setattr(data, "DEMO_SEED", 1337)
    data.demo_text()
    assert (tmp_path / "data/demo/tokenizer.model").read_bytes() == first


def test_unknown_words_come_back_through_byte_fallback(tokenizer):
    for text in ("Zo\u00eb 2024 \u4f60\u597d!", "line\nbreak"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert torch.tensor(tokenizer.encode("a", bos=True, eos=True))[[0, -1]].tolist() == [1, 2]


def test_groups_are_cut_where_padding_and_passes_cost_least():
    random_lengths = random.Random(0)
    for _ in range(200):
        tokens = sorted(random_lengths.randint(1, 9) for _ in range(random_lengths.randint(1, 8)))
        most, overhead = random_lengths.randint(1, 30), random_lengths.randint(0, 6)

        def cost(ends):
            parts = [tokens[a:b] for a, b in itertools.pairwise(ends)]
            allowed = all(
                part and (len(part) * part[-1] <= most or len(part) == 1) for part in parts
            )
            return sum(len(part) * part[-1] + overhead for part in parts) if allowed else math.inf

        inner = range(1, len(tokens))
        every_way = (
            [0, *some, len(tokens)]
            for k in range(len(tokens))
            for some in itertools.combinations(inner, k)
        )
        assert cost(split_by_cost(tokens, most, overhead)) == min(map(cost, every_way))


def test_micro_batches_hold_every_group_once_and_agree_on_their_number(monkeypatch):
    model = tiny(max_seq_len=250)
    groups = [EncodedGroup([1, 2], [[i] * (1 + 7 * i), [i] * 3], i) for i in range(1, 32)]
    for size, agreed in ((None, None), (None, 17), (4, None), (4, 9)):
        others = (lambda own, agreed=agreed: agreed) if agreed else (lambda own: own)
        monkeypatch.setattr(parallel, "all_reduce_max", others)
        batches = micro_batches(groups, size, model)
        assert not agreed or len(batches) == agreed
        firsts = [int(row[2]) for batch in batches for row in batch.tokens[::2]]
        assert sorted(firsts) == list(range(1, 32))
        assert all(
            batch.tokens.shape[1] % 32 == 0 or batch.tokens.shape[1] == 250 for batch in batches
        )
