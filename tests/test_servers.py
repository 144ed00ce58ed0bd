"""Servers as they are: what refuses one story and what all, and in whose words it is said."""

import json
import os

import pytest
from fake_api import FakeApi
from helpers import write
from test_chat import KEY, close, flags, honest, make_groups, make_stories, quality  # noqa: F401

import judge
import spo_train
import tinystories_data as data
from judge import ApiJudge, rank_in_both_orders
from spo.answer import Answer, proxy_before, read_answer
from spo.chat import Stopped
from spo.config import parse
from spo.journal import Journal
from spo.offline_judge import is_english
from spo.unusable import why_unusable


def refusing(api: FakeApi, word: str, status: str) -> FakeApi:
    api.refuses = lambda stories: status if any(word in story for story in stories) else ""
    return api


def flagged(group: list[str]) -> list[str]:
    return ["FLAGGED " + group[0], *group[1:]]


def score(story: str) -> float:
    return quality(story) if "quality" in story else 0.0


# --- one request, or all of them -----------------------------------------------------------------


@pytest.mark.parametrize("status", ["400", "403", "413", "422", "500"])
@pytest.mark.parametrize("workers", [1, 8])
@pytest.mark.parametrize("place", [0, 3])
def test_one_refused_story_is_invalid_and_the_others_are_ranked(flags, status, workers, place):  # noqa: F811
    groups = make_groups(4)
    groups[place] = flagged(groups[place])
    with refusing(FakeApi(score=score), "FLAGGED", status) as api:
        judge = ApiJudge(flags(api, workers=workers))
        results = rank_in_both_orders(judge, groups, None)
        assert [r.ranking for r in results] == [
            None if i == place else honest(group) for i, group in enumerate(groups)
        ]
        assert "this input was flagged (content_filter)" in judge.why_invalid(groups[place])
        assert f"answered {status}" in judge.why_invalid(groups[place])
        assert "2 of 8 refused" in judge.note
        asked = sum(api.asked.values())
        close(judge)
        judge = ApiJudge(flags(api, workers=workers))  # the journal knows it
        assert rank_in_both_orders(judge, groups, None) == results
        assert sum(api.asked.values()) == asked
        close(judge)
        api.refuses = lambda stories: ""
        judge = ApiJudge(flags(api, judge_attempts=4))  # and can be told to ask again
        assert rank_in_both_orders(judge, groups, None)[place].ranking == honest(groups[place])


@pytest.mark.parametrize("status", ["400", "403", "422"])
def test_what_every_request_gets_stops_with_the_servers_words(flags, status):  # noqa: F811
    with refusing(FakeApi(score=score), "", status) as api:
        judge = ApiJudge(flags(api, workers=1))
        with pytest.raises(Stopped, match=f"answered {status}: .* it says: this input was flagged"):
            rank_in_both_orders(judge, make_groups(4), None)
        assert sum(api.asked.values()) == 2 and not judge.chat.journal.replies


@pytest.mark.parametrize("workers", [1, 8])
def test_a_server_that_turns_to_refusing_everything_marks_nothing_invalid(flags, workers):  # noqa: F811
    """A used-up credit, say: the others may be answered while this is refused."""
    groups = make_groups(12)
    with FakeApi([""] * 5 + ["403"] * 90, score=score, patience=False) as api:
        judge = ApiJudge(flags(api, workers=workers))
        with pytest.raises(Stopped, match="answered 403"):
            rank_in_both_orders(judge, groups, None)
        replies = [r for replies in judge.chat.journal.replies.values() for r in replies]
        assert [reply["finish_reason"] for reply in replies] == ["stop"] * 5


def test_a_request_that_is_always_overloaded_is_invalid_while_others_get_through(flags):  # noqa: F811
    groups = make_groups(4)
    groups[1] = flagged(groups[1])
    with refusing(FakeApi(score=score), "FLAGGED", "503") as api:
        judge = ApiJudge(flags(api, workers=4, judge_retries=4))
        results = rank_in_both_orders(judge, groups, None)
        assert [r.valid for r in results] == [True, False, True, True]


def test_a_refused_story_in_a_training_run(workshop, tokenizer, tmp_path, capsys):
    """Its group is named at the evaluation, and the run goes on without a win-rate."""
    with FakeApi(score=len) as api:
        api.refuses = lambda stories: "400" if sum(map(len, stories)) % 3 == 0 else ""
        words = ["--loss=spo_rank", "--data=ranked.jsonl", "--init_from=start.pt", "--judge=fake"]
        words += [f"--base_url={api.url}", f"--journal={tmp_path / 'j.jsonl'}", "--max_iters=2"]
        words += ["--eval_stories=8", "--max_new_tokens=8", "--batch_size=4", "--workers=2"]
        spo_train.main([*words, "--report=false", f"--tokenizer={tokenizer.path}"])
    captured = capsys.readouterr()
    assert captured.out.count("no win-rate: ") == 2  # at the steps 0 and 2
    assert "refused: it answered 400: this input was flagged" in captured.err


def test_rank_names_the_group_and_keeps_the_others(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    stories = make_stories(6)
    stories[3] = "FLAGGED " + stories[3]
    path = write(tmp_path / "s.jsonl", *[{"prompt": "", "text": story} for story in stories])
    with refusing(FakeApi(score=score), "FLAGGED", "400") as api:
        command = ["rank", f"--stories={path}", "--group_size=2", f"--out={tmp_path / 'r.jsonl'}"]
        command += ["--judge=fake", f"--base_url={api.url}", f"--journal={tmp_path / 'j.jsonl'}"]
        data.main(command)
    captured = capsys.readouterr()
    assert "2 ranked groups" in captured.out and "2 of 6 refused" in captured.out
    assert 'invalid: group 2, "Once upon a time' in captured.err


# --- what a server says --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "status,body,expected",
    [
        (200, '{"error": "Unexpected endpoint"}', Answer(400, None, "Unexpected endpoint", True)),
        (200, '{"error": {"message": "no", "code": 429}}', Answer(429, None, "no", True)),
        (200, '{"error": {"message": "no", "code": "x"}}', Answer(400, None, "no (x)", True)),
        (400, '{"detail": "too long"}', Answer(400, None, "too long", True)),
        (400, '{"message": "too long"}', Answer(400, None, "too long", True)),
        (
            502,
            "<html><style>x</style><h1>Bad</h1>\n gateway</html>",
            Answer(502, None, "Bad gateway"),
        ),
        (503, "", Answer(503, None, "", True)),
        (
            200,
            '{"choices": [{"finish_reason": "error", "error": {"code": 502, "message": "down"}, '
            '"message": {"content": ""}}]}',
            Answer(502, None, "down", True),
        ),
        (
            200,
            '{"choices": [{"finish_reason": "error", "message": {"content": ""}}]}',
            Answer(502, None, "the provider failed", True),
        ),
    ],
)
def test_errors_in_every_dress(status, body, expected):
    assert read_answer(status, body) == expected


def test_a_model_that_refuses_in_its_own_words_or_in_none_is_unusable():
    body = {"choices": [{"finish_reason": "stop", "message": {"refusal": "I will not."}}]}
    assert why_unusable(read_answer(200, json.dumps(body)).reply) == "refused: I will not."
    body = {"choices": [{"finish_reason": "refused", "message": {"content": None}}]}
    reply = read_answer(200, json.dumps(body)).reply
    assert why_unusable(reply) == "refused: no reason given"


def test_an_error_under_status_200_is_that_error_and_costs_nothing(flags):  # noqa: F811
    prices = {"usd_per_million_in": 100.0, "usd_per_million_out": 1000.0}
    with FakeApi(["error 404"] * 9, score=score, patience=False) as api:
        judge = ApiJudge(flags(api, workers=1, **prices))
        with pytest.raises(Stopped, match="answered 404: .*: the upstream provider says no"):
            rank_in_both_orders(judge, make_groups(1), None)
        assert sum(api.asked.values()) == 1 and judge.chat.journal.spent == 0
        close(judge)
    with FakeApi(["error 429", "provider"], score=score, patience=False) as api:
        groups = make_groups(1)
        judge = ApiJudge(flags(api, workers=1))
        assert rank_in_both_orders(judge, groups, None)[0].ranking == honest(groups[0])
        assert judge.chat.lost == 0 and not judge.asked_again


def test_a_provider_that_is_down_leaves_nothing_invalid_behind(flags):  # noqa: F811
    groups = make_groups(2)
    with FakeApi(["provider"] * 99, score=score, patience=False) as api:
        judge = ApiJudge(flags(api, judge_retries=1))
        with pytest.raises(ConnectionError, match="answered 502: the provider failed"):
            rank_in_both_orders(judge, groups, None)
        close(judge)
        api.faults = iter(())
        judge = ApiJudge(flags(api))
        assert [r.ranking for r in rank_in_both_orders(judge, groups, None)] == list(
            map(honest, groups)
        )


def test_a_wait_of_a_day_stops_and_says_when_to_go_on(flags):  # noqa: F811
    with (
        FakeApi(["day"], score=score) as api,
        pytest.raises(
            Stopped,
            match="too many tokens per day; it asks to wait 23 h 58 min; run the same command",
        ),
    ):
        rank_in_both_orders(ApiJudge(flags(api, workers=1)), make_groups(1), None)


def test_a_proxy_before_this_machine_is_named(monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    for host in ("localhost", "127.0.0.1", "192.168.0.7", "gpu-box", "[::1]"):
        assert proxy_before(f"http://{host}:8000/v1") == ""
    monkeypatch.setenv("http_proxy", "http://me:secret@proxy.example:3128")
    for host in ("localhost", "127.0.0.1", "192.168.0.7", "gpu-box"):
        said = proxy_before(f"http://{host}:8000/v1")
        assert f"HTTP_PROXY puts proxy.example before it; NO_PROXY={host}" in said
        assert "secret" not in said
    assert proxy_before("http://api.example.com/v1") == ""
    monkeypatch.setenv("no_proxy", "localhost")
    assert proxy_before("http://localhost:8000/v1") == ""


# --- reasons, and what helps ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault,advice",
    [
        ("thinking", "4 of 4 cut at 2,048 tokens .--judge_max_tokens=8192."),
        ("empty", "4 of 4 empty .a thinking model that was cut"),
        ("no conclusion", "4 of 4 without a conclusion .--judge_attempts=4 asks for those"),
        ("filter", "4 of 4 stopped by a content filter .--judge_attempts=4 asks"),
    ],
)
def test_reasons_are_counted_and_decide_the_advice(tmp_path, fault, advice):
    pairs = [
        write(tmp_path / name, *[{"text": f"{name} {i}"} for i in "ab"]) for name in ("p", "b")
    ]
    with FakeApi([fault] * 9, patience=False) as api, pytest.raises(ValueError, match=advice):
        words = ["--judge=fake", f"--base_url={api.url}", f"--journal={tmp_path / 'j.jsonl'}"]
        judge.main([*pairs, *words])


def test_fifty_unusable_replies_and_none_usable_stop_the_run(flags):  # noqa: F811
    with FakeApi(["thinking"] * 999, score=score, patience=False) as api:
        judge = ApiJudge(flags(api, workers=4))
        with pytest.raises(Stopped, match="50 replies, and none was usable; .* cut at 2,048"):
            rank_in_both_orders(judge, make_groups(100), None)
        assert 50 <= sum(api.asked.values()) <= 54
    with FakeApi(["", *["thinking"] * 60], score=score, patience=False) as api:
        judge = ApiJudge(
            flags(api, workers=1, judge="other", journal=f"{judge.chat.journal.path}2")
        )
        assert len(rank_in_both_orders(judge, make_groups(14), None)) == 14  # one was usable


def test_a_prompt_that_the_server_has_cut_is_no_ranking(flags):  # noqa: F811
    groups = [[story * 40 for story in group] for group in make_groups(1)]
    with FakeApi(score=lambda story: quality(story)) as api:
        api.usage = {"prompt_tokens": 512, "completion_tokens": 9}
        judge = ApiJudge(flags(api))
        assert rank_in_both_orders(judge, groups, None)[0].ranking is None
        assert judge.why_invalid(groups[0]) == "prompt cut by the server to 512 tokens"
        close(judge)
        api.usage = {"prompt_tokens": 5, "completion_tokens": 9}  # it does not count
        judge = ApiJudge(flags(api, judge="another"))
        assert rank_in_both_orders(judge, groups, None)[0].valid


# --- what is sent, and where ---------------------------------------------------------------------


def test_fields_can_be_left_out_and_added(flags, tmp_path):  # noqa: F811
    (group,) = make_groups(1)
    with FakeApi(score=quality) as api:
        plain = ApiJudge(flags(api, journal=str(tmp_path / "a.jsonl")))
        plain.rank(group)
        extra = {"judge_extra": '{"enable_thinking": false}', "judge_temperature": None}
        other = ApiJudge(flags(api, journal=str(tmp_path / "b.jsonl"), **extra))
        other.rank(group)
    assert api.bodies[0]["temperature"] == 0 and "enable_thinking" not in api.bodies[0]
    assert "temperature" not in api.bodies[1] and api.bodies[1]["enable_thinking"] is False
    assert plain.key(group) != other.key(group) and "temperature none" in other.name


@pytest.mark.parametrize("extra", ["[", "[1]", '"a"', '{"model": "x"}', '{"temperature": 1}'])
def test_extra_fields_that_cannot_be(flags, extra):  # noqa: F811
    with FakeApi() as api, pytest.raises(ValueError, match="--judge_extra"):
        ApiJudge(flags(api, judge_extra=extra))


def test_none_is_a_value_of_a_flag_that_may_have_none():
    words = ["--judge_temperature=none", "--max_usd=None"]
    config = parse(judge.JudgeFlags, words, "x")
    assert config.judge_temperature is None and config.max_usd is None
    with pytest.raises(SystemExit):
        parse(judge.JudgeFlags, ["--judge_temperature=cold"], "x")


def test_openais_variable_is_read_and_printed(tmp_path, monkeypatch, capsys):
    paths = [write(tmp_path / name, {"text": name}) for name in ("p", "b")]
    with FakeApi(score=len) as api:
        monkeypatch.setenv("OPENAI_BASE_URL", api.url)
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        judge.main([*paths, "--judge=fake", f"--journal={tmp_path / 'j.jsonl'}"])
        assert f"OPENAI_BASE_URL: the judge is at {api.url}\n" in capsys.readouterr().out
        monkeypatch.setenv("OPENAI_BASE_URL", "localhost")
        with pytest.raises(ValueError, match="OPENAI_BASE_URL: expected something like"):
            judge.main([*paths, "--judge=fake", f"--journal={tmp_path / 'j.jsonl'}"])
    judge.main([*paths, "--judge=offline"])


# --- the journal ---------------------------------------------------------------------------------


def test_lines_of_another_type_are_skipped_and_counted(tmp_path):
    path = str(tmp_path / "j.jsonl")
    good = {
        "id": 1,
        "key": "k",
        "usd": 0.5,
        "reply": {"text": "a", "finish_reason": "stop", "fence": "0"},
    }
    replies = [{"text": 5}, {"finish_reason": ["stop"]}, {"fence": None}, {"max_tokens": "9"}]
    bad = [good | {"id": 9, "reply": good["reply"] | change} for change in replies]
    lines = [json.dumps(line) for line in [good, *bad, good | {"id": "x"}, [1], "text"]]
    with open(path, "w") as f:
        f.write("\n".join([*lines, "{half", json.dumps(good | {"id": 3, "key": "l"})]) + "\n")
    journal = Journal(path)
    assert set(journal.replies) == {"k", "l"} and journal.skipped == 8 and journal.paid == 1.0
    journal.file.close()
    before = os.path.getsize(path)
    journal = Journal(path)
    journal.ask("m", 0.0)
    journal.file.close()
    assert os.path.getsize(path) > before and Journal(path).skipped == 8


def test_texts_that_are_not_english_are_counted(tmp_path, capsys):
    chinese = ["小猫看见了月亮。" * 8, "汤姆吃了苹果。" * 8]
    german = "Es war einmal ein kleines Kind, das ging mit seinem Hund in den tiefen Wald."
    english = "Once upon a time there was a little girl who had a red ball and a big dog."
    assert [is_english(text) for text in (*chinese, german, english, "Red.")] == [False] * 3 + [
        True
    ] * 2
    stories = write(tmp_path / "s.jsonl", *[{"text": text} for text in (*chinese, german, english)])
    command = ["rank", f"--stories={stories}", "--group_size=2", f"--out={tmp_path / 'r.jsonl'}"]
    data.main(command)
    assert "3 of 4 texts are not English: the offline judge reads" in capsys.readouterr().out
