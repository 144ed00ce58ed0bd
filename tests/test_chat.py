"""The API judge against a server that misbehaves: what is lost, what is paid twice, what stops,
what leaks.
"""

import base64
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse

import pytest
from fake_api import FINE, LOST, REFUSED, UNUSABLE, FakeApi
from helpers import ROOT

import judge
import tinystories_data as data
from judge import ApiJudge, JudgeFlags, rank_in_both_orders
from spo.answer import Answer, read_answer
from spo.chat import BudgetSpent, Stopped, as_done
from spo.journal import Journal

KEY = "sk-sentinel+/4711-abcdefgh"


REPLY = {"text": "", "finish_reason": "stop", "fence": "0a1b2c3d"}


def quality(story: str) -> float:
    return float(re.search(r"quality (\d+)", story)[1])


def make_stories(count: int, seed: int = 0) -> list[str]:
    """Stories whose honest order is told by a number, in no order."""
    numbers = random.Random(seed).sample(range(10 * count), count)
    return [f"Once upon a time there was a story of quality {number}." for number in numbers]


def make_groups(count: int, n: int = 4) -> list[list[str]]:
    stories = make_stories(count * n)
    return [stories[i : i + n] for i in range(0, len(stories), n)]


def honest(group: list[str]) -> list[int]:
    return sorted(range(len(group)), key=lambda i: -quality(group[i]))


@pytest.fixture
def flags(tmp_path, monkeypatch):
    """Flags for a fake API, quick to try again; the journal is in tmp_path."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(
        "spo.chat.random.uniform", lambda low, high: 0.01
    )  # the back-off's jitter: hundredths of it

    def make(api, **others) -> JudgeFlags:
        settings = {
            "judge": "fake",
            "base_url": api.url,
            "journal": str(tmp_path / "journal.jsonl"),
            "judge_timeout": 1.0,
        }
        return JudgeFlags(**settings | others)

    return make


def rankings(api, flags: JudgeFlags, groups):
    judge = ApiJudge(flags)
    return judge, [result.ranking for result in rank_in_both_orders(judge, groups, None)]


def close(judge: ApiJudge) -> None:
    judge.chat.journal.file.close()


@pytest.mark.parametrize("fault", REFUSED + LOST + UNUSABLE + FINE)
def test_every_fault_once_changes_no_label(flags, fault):
    groups = make_groups(2)
    with FakeApi([fault], score=quality, stall=6.0) as api:
        judge, found = rankings(api, flags(api, judge_timeout=2.0), groups)
        assert api.done[fault] == 1
    assert found == [honest(group) for group in groups]
    again = sum(api.asked.values()) - 4
    assert again == (0 if fault in FINE else 1)
    assert judge.chat.lost == (fault in LOST) and len(judge.asked_again) == (fault in UNUSABLE)


def campaign(flags, count: int, faults: int) -> None:
    """`count` groups against a server with so many faults, drawn at random: as if there had been
    none.
    """
    rng = random.Random(0)
    schedule = [rng.choice(REFUSED + LOST + UNUSABLE + FINE + [""]) for _ in range(faults)]
    groups = make_groups(count)
    with FakeApi(schedule, score=quality, stall=4.0) as api:
        judge, found = rankings(api, flags(api, workers=16, judge_timeout=1.5), groups)
        assert sum(api.done.values()) > faults  # every fault has been met
    assert found == [honest(group) for group in groups]
    journal = judge.chat.journal
    assert len(journal.replies) == 2 * count  # none lost
    for replies in journal.replies.values():
        usable = [judge_reply(judge, r) for r in replies]
        assert [u is not None for u in usable] == [False] * (len(replies) - 1) + [
            True
        ]  # none twice


def judge_reply(api_judge, reply):
    return (
        None
        if reply["finish_reason"] in ("length", "content_filter")
        else judge.parse_conclusion(reply["text"], 4, reply["fence"])
    )


def test_a_hundred_faults_lose_and_double_no_label(flags):
    campaign(flags, count=40, faults=100)


@pytest.mark.slow
def test_a_thousand_faults_lose_and_double_no_label(flags):
    campaign(flags, count=400, faults=1000)


def kill_campaign(tmp_path, kills: int, count: int) -> None:
    """The rank command, killed (-9) `kills` times at random moments, against the unbroken run."""
    stories = tmp_path / "stories.jsonl"
    stories.write_text(
        "".join(json.dumps({"prompt": "", "text": s}) + "\n" for s in make_stories(4 * count))
    )
    rng = random.Random(1)
    environment = os.environ | {"OPENAI_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    journal = tmp_path / "journal.jsonl"

    journals = {"ranked.jsonl": "journal.jsonl", "unbroken.jsonl": "other.jsonl"}

    def command(api, name):
        return [
            sys.executable,
            os.path.join(ROOT, "tinystories_data.py"),
            "rank",
            f"--stories={stories}",
            f"--out={tmp_path / name}",
            "--judge=fake",
            f"--base_url={api.url}",
            "--workers=4",
            f"--journal={tmp_path / journals[name]}",
        ]

    def slow(story):  # so that there is time to be killed in
        time.sleep(0.002)
        return quality(story)

    held: set[str] = set()
    faults = [
        rng.choice([*[""] * 36, "429", "reset after", "twice", "cut json"])
        for _ in range(20 * count)
    ]
    with FakeApi(faults, score=slow) as api:
        for _ in range(kills):
            process = subprocess.Popen(
                command(api, "ranked.jsonl"),
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            target = sum(api.asked.values()) + rng.randrange(1, 2 * count // (kills + 1))
            while sum(api.asked.values()) < target and process.poll() is None:
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.01))
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(0.3)  # what is on its way arrives
            assert not (tmp_path / "ranked.jsonl").exists()
            assert held <= usable_in(journal)
            held = usable_in(journal)
            for question in held:
                api.asked[question] = 0  # from here on nobody may ask for it
        result = subprocess.run(
            command(api, "ranked.jsonl"), env=environment, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        assert [question for question in held if api.asked[question]] == []
    with FakeApi(score=quality) as api:
        unbroken = subprocess.run(
            command(api, "unbroken.jsonl"), env=environment, capture_output=True, text=True
        )
        assert unbroken.returncode == 0, unbroken.stderr
    assert (tmp_path / "ranked.jsonl").read_bytes() == (tmp_path / "unbroken.jsonl").read_bytes()
    for text in (result.stdout, result.stderr, journal.read_text()):
        assert_no_key(text)


def usable_in(journal) -> set[str]:
    """The questions (digests of stories) that a journal has a usable reply to."""
    found = set()
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.exists() else []
    for line in map(json.loads, lines):
        if "reply" in line and judge_reply(None, line["reply"]) is not None:
            found.add(line["key"].split()[-1])
    return found


def test_a_kill_loses_nothing_and_nothing_is_bought_twice(tmp_path):
    kill_campaign(tmp_path, kills=1, count=12)


@pytest.mark.slow
def test_twenty_kills_lose_nothing_and_nothing_is_bought_twice(tmp_path):
    kill_campaign(tmp_path, kills=20, count=400)


# --- what stops ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault,message",
    [
        ("401", "answered 401: the key in OPENAI_API_KEY is missing, wrong, or not allowed"),
        ("403", "answered 403: the key .* it says: bad key: Bearer .key."),
        ("400", "answered 400: it does not accept this request"),
        ("402", "quota is used up"),
        ("quota", "quota is used up"),
        ("404", "answered 404: is --base_url right"),
        ("302", "answered 302: is --base_url right"),
    ],
)
def test_what_asking_again_cannot_help_stops_at_once(flags, fault, message):
    with FakeApi([fault] * 100, score=quality) as api:
        with pytest.raises(Stopped, match=message) as error:
            rankings(api, flags(api, workers=4), make_groups(20))
        time.sleep(0.1)
        tried_out = fault in ("400", "403")  # with a harmless request: is it all of them?
        assert sum(api.asked.values()) <= 4 + tried_out  # one for each worker
    assert_no_key(str(error.value))


def test_an_unusable_reply_is_asked_for_once_more_and_then_is_invalid(flags):
    groups = make_groups(1)
    with FakeApi(["twice", "empty"] * 2, score=quality, patience=False) as api:
        judge = ApiJudge(flags(api, workers=1))
        assert (
            not rank_in_both_orders(judge, groups, None)[0].valid and sum(api.asked.values()) == 4
        )
        close(judge)
        judge, found = rankings(api, flags(api), groups)  # the journal knows that they are invalid
        assert found == [None] and sum(api.asked.values()) == 4
        close(judge)
        judge, found = rankings(
            api, flags(api, judge_attempts=3), groups
        )  # and can be told to ask once more
        assert found == [honest(groups[0])] and sum(api.asked.values()) == 6


def test_a_server_that_never_recovers_ends_the_run_with_what_was_answered(flags):
    with FakeApi(["", "", *["503"] * 100], score=quality, patience=False) as api:
        judge = ApiJudge(flags(api, workers=1, judge_retries=3))
        with pytest.raises(
            ConnectionError, match="4 failures one after the other, the last: it answered 503"
        ):
            rank_in_both_orders(judge, make_groups(4), None)
        assert sum(api.asked.values()) == 6 and len(judge.chat.journal.replies) == 2


def test_nobody_listening_costs_nothing(flags):
    with FakeApi() as api:
        pass
    prices = {"usd_per_million_in": 1.0, "usd_per_million_out": 1.0}
    judge = ApiJudge(flags(api, judge_retries=2, **prices))
    with pytest.raises(ConnectionError, match="3 failures"):
        judge.rank(make_groups(1)[0])
    assert judge.chat.journal.spent == 0


def test_retry_after_holds_everybody(flags):
    with FakeApi(["429 seconds"], score=quality) as api:
        started = time.monotonic()
        rankings(api, flags(api), make_groups(4))
        assert time.monotonic() - started > 0.9


def test_a_request_says_what_the_flags_say(flags):
    with FakeApi(score=quality) as api:
        more = {"judge_token_field": "max_completion_tokens", "judge_max_tokens": 123}
        more |= {"judge_temperature": None, "judge_extra": '{"enable_thinking": false}'}
        close(rankings(api, flags(api, **more), make_groups(1))[0])
        close(rankings(api, flags(api, judge_temperature=0.5), make_groups(2)[1:])[0])
        first, *_, last = api.bodies
    assert first["max_completion_tokens"] == 123 and first["enable_thinking"] is False
    assert not {"max_tokens", "temperature"} & first.keys()
    assert last["temperature"] == 0.5 and last["max_tokens"] == 2048 and last["model"] == "fake"


def test_a_hold_is_never_shortened_by_what_is_answered_meanwhile(flags):
    with FakeApi(score=quality) as api:
        chat = ApiJudge(flags(api)).chat
    chat.hold("100", Answer(429))
    until = chat.hold_until
    assert until - time.monotonic() == pytest.approx(100, abs=20)
    for later in ("", "1", "soon"):
        chat.hold(later, Answer(503))
        assert chat.hold_until == until
    with pytest.raises(Stopped, match="it asks to wait 2 h 0 min"):
        chat.hold("7200", Answer(429))


def test_dribbled_bytes_do_not_extend_the_deadline(flags):
    with FakeApi(["dribble"] * 2, score=quality, patience=False) as api:
        judge, started = ApiJudge(flags(api, judge_timeout=0.5, judge_retries=1)), time.monotonic()
        with pytest.raises(ConnectionError):
            judge.rank(make_groups(1)[0])
        assert time.monotonic() - started < 60  # two whole answers would take two minutes


# --- money ---------------------------------------------------------------------------------------

PRICES = {"usd_per_million_in": 100.0, "usd_per_million_out": 1000.0}


def test_the_budget_is_never_passed_and_can_be_raised(flags):
    """A reply costs 400 * 100 / 1e6 + 200 * 1000 / 1e6 = $0.24, and could have cost $2.1."""
    groups = make_groups(10)
    with FakeApi(score=quality) as api:
        judge = ApiJudge(flags(api, max_usd=4.0, **PRICES))
        with pytest.raises(BudgetSpent, match="--max_usd=4: "):
            rank_in_both_orders(judge, groups, None)
        spent, count = judge.chat.journal.spent, sum(api.asked.values())
        assert spent == pytest.approx(0.24 * count) and 4.0 - 2.4 < spent <= 4.0
        close(judge)
        judge, found = rankings(api, flags(api, max_usd=8.0, **PRICES), groups)
        assert found == [honest(group) for group in groups] and sum(api.asked.values()) == 20
        assert judge.chat.journal.spent == pytest.approx(4.8)


def test_the_bound_of_a_request_is_a_token_for_every_byte(flags):
    """A token is a byte at least, and a letter such as \u00e9 has two; 64 are the template's."""
    with FakeApi(score=quality) as api:
        chat = ApiJudge(flags(api, judge_max_tokens=50, **PRICES)).chat
    for text, size in (("e" * 1000, 1000), ("\u00e9" * 1000, 2000), ("\u4f60" * 10, 30), ("", 0)):
        assert chat.bound(text) == pytest.approx(((size + 64) * 100 + 50 * 1000) / 1e6)


def test_what_was_lost_on_the_way_counts_as_spent(flags):
    with FakeApi(["reset after", "503"], score=quality) as api:
        judge, _ = rankings(api, flags(api, workers=1, **PRICES), make_groups(1))
    journal = judge.chat.journal
    (bound,) = journal.open_asks.values()
    assert bound > 2.0 and journal.spent == pytest.approx(2 * 0.24 + bound)
    assert f"${bound:.4f} uncertain" in judge.note
    close(judge)
    assert Journal(journal.path).spent == pytest.approx(2 * 0.24 + bound)  # and after a restart


def test_a_dry_run_asks_nothing_and_needs_no_key(flags, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("OPENAI_API_KEY")
    monkeypatch.setitem(sys.modules, "tiktoken", None)  # as if its table could not be fetched
    stories = tmp_path / "s.jsonl"
    stories.write_text("".join(json.dumps({"text": s}) + "\n" for s in make_stories(8)))
    data.main(
        [
            "rank",
            f"--stories={stories}",
            "--judge=gpt-4o",
            "--dry_run",
            f"--journal={tmp_path / 'j.jsonl'}",
            "--usd_per_million_in=2.5",
            "--usd_per_million_out=10",
        ]
    )
    printed = capsys.readouterr().out
    tokens = int(re.search(r"([\d,]+) prompt tokens \(bytes/4", printed)[1].replace(",", ""))
    assert "4 requests to ask" in printed and 4 * 300 < tokens < 4 * 800
    assert (
        f"up to 8,192 reply tokens; ${tokens * 2.5e-6 + 8192 * 10e-6:.2f} if every reply" in printed
    )
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        data.main(
            ["rank", f"--stories={stories}", "--judge=gpt-4o", f"--journal={tmp_path / 'k.jsonl'}"]
        )


@pytest.mark.parametrize(
    "usage",
    [
        {"prompt_tokens": 1, "completion_tokens": float("nan")},
        {"prompt_tokens": 10**400, "completion_tokens": 1},
        "free",
        {"prompt_tokens": -(10**6), "completion_tokens": 1},
        {"prompt_tokens": True, "completion_tokens": 1},
        [5],
        {"total_tokens": 5},
    ],
)
def test_a_usage_that_is_not_believable_costs_the_bound(flags, usage):
    with FakeApi(score=quality) as api:
        api.usage = usage
        judge, _ = rankings(api, flags(api, **PRICES), make_groups(1))
    assert 2 * 2.0 < judge.chat.journal.spent < 2 * 2.6


def test_a_gateway_that_times_out_may_have_billed(flags):
    with FakeApi(["504", "500", "503", "429"], score=quality) as api:
        judge, _ = rankings(api, flags(api, workers=1, **PRICES), make_groups(1))
    assert len(judge.chat.journal.open_asks) == judge.chat.lost == 2


def test_a_longer_limit_asks_for_cut_replies_again(flags):
    groups = make_groups(1)
    with FakeApi(["length"] * 4, score=quality, patience=False) as api:
        judge, found = rankings(api, flags(api, judge_max_tokens=10), groups)
        close(judge)
        judge, again = rankings(api, flags(api, judge_max_tokens=10), groups)
        close(judge)
        assert found == again == [None] and sum(api.asked.values()) == 4
        judge = ApiJudge(flags(api, judge_max_tokens=4000))
        assert "2 requests to ask" in judge.estimate([groups[0], groups[0][::-1]])
        assert rank_in_both_orders(judge, groups, None)[0].ranking == honest(groups[0])


@pytest.mark.parametrize(
    "wrong,message",
    [
        ({"base_url": "http://localhost:99999/v1"}, "--base_url"),
        ({"base_url": "http://localhost:abc/v1"}, "--base_url"),
        ({"base_url": "https://host/v1?api-key=x"}, "--base_url"),
        ({"judge_temperature": float("inf")}, "--judge_temperature=inf"),
        ({"judge_timeout": float("inf")}, "--judge_timeout=inf"),
        ({"judge_max_tokens": 10**400}, "--judge_max_tokens=1"),
        ({"max_usd": float("nan")}, "--max_usd=nan"),
        ({"workers": 0}, "--workers=0"),
        ({"judge_timeout": 0}, "--judge_timeout=0"),
        ({"judge_retries": -1}, "--judge_retries"),
        ({"max_usd": 1.0}, "--max_usd: needs --usd_per_million_in"),
        ({"base_url": "localhost:8000"}, "--base_url"),
        ({"base_url": "http://me:secret@host/v1"}, "--base_url"),
        ({"judge_attempts": 0}, "--judge_attempts=0"),
        ({"prompt": "none.txt"}, "none.txt"),
        ({"judge_max_tokens": 0}, "--judge_max_tokens=0"),
    ],
)
def test_flags_that_cannot_work_are_named(tmp_path, wrong, message):
    with pytest.raises((ValueError, OSError), match=message):
        ApiJudge(JudgeFlags(**{"judge": "fake", "journal": str(tmp_path / "j.jsonl")} | wrong))


# --- the journal ---------------------------------------------------------------------------------


def test_a_journal_cut_anywhere_is_read_up_to_there(tmp_path):
    path = str(tmp_path / "j.jsonl")
    journal = Journal(path)
    for i in range(3):
        number = journal.ask(f"key {i}", 0.5)
        journal.append(
            {
                "id": number,
                "key": f"key {i}",
                "usd": 0.1,
                "reply": REPLY | {"text": f"caf\u00e9 {i}"},
            }
        )
    journal.file.close()
    whole = (tmp_path / "j.jsonl").read_bytes()
    for cut in range(len(whole) + 1):
        (tmp_path / "j.jsonl").write_bytes(whole[:cut])
        journal = Journal(path)
        complete = whole[:cut].count(b"\n")
        assert len(journal.replies) == complete // 2
        assert journal.spent == pytest.approx(0.1 * (complete // 2) + 0.5 * (complete % 2))
        journal.ask("another", 0.0)  # what is appended does not join the torn line
        journal.file.close()
        lines = (tmp_path / "j.jsonl").read_bytes().splitlines()
        assert all(map(json.loads, lines))


@pytest.mark.parametrize(
    "content",
    [
        '{"my": "only copy"}',
        "text",
        '{"text": "a"}\n',
        '{"id": 1, "asked": "k", "usd": -1000}\n',
        '{"id": 1, "asked": "k", "usd": NaN}\n',
        '{"id": Infinity, "asked": "k", "usd": 0}\n',
        '{"id": 1, "key": "k", "usd": 0, "reply": {}}\n',
        "[" * 10_000 + "\n",
    ],
)
def test_a_file_that_is_no_journal_stays_as_it_is(tmp_path, content):
    path = tmp_path / "j.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match="j.jsonl line 1: not a line of a journal"):
        Journal(str(path))
    assert path.read_text() == content


def test_a_journal_that_is_none_or_another_runs_is_refused(tmp_path):
    path = tmp_path / "j.jsonl"
    path.write_text('{"text": "a story"}\n')
    with pytest.raises(ValueError, match="j.jsonl line 1: not a line of a journal"):
        Journal(str(path))
    assert path.read_text() == '{"text": "a story"}\n'
    path.unlink()
    journal = Journal(str(path))
    with pytest.raises(ValueError, match="--journal=.*: is in use by"):
        Journal(str(path))
    journal.file.close()


def test_the_same_stories_in_two_groups_are_one_question(flags):
    (group,) = make_groups(1)
    with FakeApi(score=quality) as api:
        _, found = rankings(api, flags(api), [group, group, group[::-1]])
        assert sum(api.asked.values()) == 2
    assert found == [honest(group), honest(group), honest(group[::-1])]


# --- the key -------------------------------------------------------------------------------------


def assert_no_key(text: str) -> None:
    forms = (
        KEY,
        urllib.parse.quote(KEY, safe=""),
        base64.b64encode(KEY.encode()).decode().rstrip("="),
        KEY[:8],
    )
    assert not [form for form in forms if form in text]


def judge_command(folder, count: int, api: FakeApi) -> list[str]:
    """judge.py on a file of stories against itself, asking a fake API"""
    stories = folder / "s.jsonl"
    stories.write_text("".join(json.dumps({"text": s}) + "\n" for s in make_stories(count)))
    command = [sys.executable, os.path.join(ROOT, "judge.py"), str(stories), str(stories)]
    settings = [f"--base_url={api.url}", f"--journal={folder / 'j.jsonl'}", "--workers=2"]
    return [*command, "--judge=fake", *settings]


@pytest.mark.parametrize("fault", ["", "401", "400", "500", "429", "cut json", "reset after"])
def test_the_key_goes_into_one_header_and_nowhere_else(tmp_path, fault):
    with FakeApi([fault] * 40, score=quality, patience=False) as api:
        command = [*judge_command(tmp_path, 4, api), "--judge_retries=1"]
        environment = os.environ | {"OPENAI_API_KEY": KEY, "SPO_DEBUG": "1"}  # the traceback, too
        result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert f"Authorization: Bearer {KEY}" in api.headers[0]
    assert (result.returncode == 0) == (fault == "")
    for text in (result.stdout, result.stderr, (tmp_path / "j.jsonl").read_text()):
        assert_no_key(text)


@pytest.mark.parametrize(
    "spelled",
    [
        json.dumps(KEY),
        json.dumps(KEY).replace("/", "\\/"),
        '"' + "".join(f"\\u{ord(c):04x}" for c in KEY) + '"',
    ],
)
def test_a_reply_that_echoes_the_key_is_kept_without_it_however_it_is_spelled(flags, spelled):
    with FakeApi() as api:
        chat = ApiJudge(flags(api)).chat
    body = '{"model": %s, "choices": [{"finish_reason": %s, "message": {"content": %s}}]}' % (
        spelled,
        spelled,
        spelled,
    )
    reply = chat.redacted(read_answer(200, body).reply)
    assert_no_key(json.dumps(reply))
    assert reply["text"] == "[key]"
    error = read_answer(400, '{"error": {"message": %s}}' % spelled)
    assert KEY in error.words and chat.redact(error.words) == "[key]"


# --- threads -------------------------------------------------------------------------------------


def test_the_key_is_cut_out_in_whole_in_part_and_in_other_spellings(flags, monkeypatch):
    """As it is, as in an address, as in a Basic header, and its first eight characters."""
    key = "sk-live+0123/456789=abcdef"
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with FakeApi(score=quality) as api:
        chat = ApiJudge(flags(api)).chat
    basic = base64.b64encode(key.encode()).decode()
    for spelled in (key, urllib.parse.quote(key, safe=""), basic, key[:8] + "..."):
        said = chat.redact(f"no such key: {spelled}, sorry")
        assert "[key]" in said and "sk-live" not in said and basic[:12] not in said
    chat.journal.file.close()
    monkeypatch.setenv("OPENAI_API_KEY", "none")  # what servers without keys are given
    with FakeApi(score=quality) as api:
        assert ApiJudge(flags(api)).chat.redact("none of these") == "none of these"


def test_as_done_gives_every_result_and_raises_the_first_error():
    stop = threading.Event()
    assert sorted(as_done(lambda x: x * x, range(50), 8, stop)) == [(i, i * i) for i in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(as_done(lambda x: 1 / x, [1, 2, 0, 3], 2, stop))
    assert stop.is_set() and list(as_done(abs, [], 8, stop)) == []


def test_a_stop_waits_for_the_replies_that_are_on_their_way(flags):
    """The key is refused, once; the others that were sent are answered, paid, and kept."""
    groups = make_groups(4)
    with FakeApi(["401"], score=lambda story: time.sleep(0.05) or quality(story)) as api:
        judge = ApiJudge(flags(api, workers=8, judge_timeout=5.0))
        with pytest.raises(Stopped, match="answered 401"):
            rank_in_both_orders(judge, groups, None)
        assert len(judge.chat.journal.replies) == sum(api.asked.values()) - 1
        assert judge.chat.journal.open_asks == {}


@pytest.mark.slow
def test_a_wrong_key_ends_a_run_while_others_are_slow(tmp_path):
    """What is on its way gets five seconds, and stays booked as possibly spent."""
    with FakeApi([*["stall"] * 3, "401"], score=quality, stall=120.0, patience=False) as api:
        words = [*judge_command(tmp_path, 4, api), "--workers=4"]
        prices = ["--usd_per_million_in=1", "--usd_per_million_out=1000"]
        started = time.monotonic()
        environment = os.environ | {"OPENAI_API_KEY": KEY}
        done = subprocess.run([*words, *prices], env=environment, capture_output=True, text=True)
        assert time.monotonic() - started < 60
    assert done.returncode == 2 and "answered 401: the key" in done.stderr
    journal = Journal(str(tmp_path / "j.jsonl"))
    assert len(journal.open_asks) == 3 and journal.spent > 3 * 2.0  # 2,048 tokens each, at most


def test_an_answer_without_end_is_given_up(flags, monkeypatch):
    monkeypatch.setattr("spo.chat.LARGEST_BODY", 100)
    with FakeApi() as api, pytest.raises(ConnectionError, match="half an answer: more than 100"):
        rank_in_both_orders(ApiJudge(flags(api, judge_retries=1)), make_groups(1), None)


def test_a_journal_on_a_full_disk_stays_a_journal(flags, monkeypatch):
    """Half a line is taken back, so that the file can be read again."""
    with FakeApi() as api:
        chat = ApiJudge(flags(api)).chat
        chat.journal.ask("first", 0.0)

        class Full:
            def __getattr__(self, name):
                return getattr(chat_file, name)

            def write(self, content):
                if len(content) < 30:
                    raise OSError(28, "No space left on device")
                return chat_file.write(content[:20])

        chat_file, chat.journal.file = chat.journal.file, Full()
        with pytest.raises(OSError, match="No space left on device: .* needed, .* free"):
            chat.journal.ask("second", 0.0)
        chat.journal.file = chat_file
        chat.journal.ask("third", 0.0)
        chat_file.close()
        lines = open(chat.journal.path).read().splitlines()
        assert [json.loads(line)["asked"] for line in lines] == ["first", "third"]


def test_ctrl_c_does_not_wait_for_a_slow_server(tmp_path):
    with FakeApi(["", "", *["stall"] * 100], score=quality, stall=120.0, patience=False) as api:
        command = judge_command(tmp_path, 8, api)
        # a shell's background job ignores Ctrl-C, and so would its children
        process = subprocess.Popen(
            command,
            env=os.environ | {"OPENAI_API_KEY": KEY},
            stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        while sum(api.asked.values()) < 4:
            time.sleep(0.01)
        started = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
        assert process.returncode == 130 and b"stopped by Ctrl-C" in errors
        assert time.monotonic() - started < 60  # the server keeps the others for two minutes
    assert len(Journal(str(tmp_path / "j.jsonl")).replies) == 2
