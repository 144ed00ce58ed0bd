"""The offline judge: what it prefers, and what does not fool it."""

import json
import random

import pytest

from judge import OfflineJudge
from spo import demo_stories
from spo import offline_judge as judge

PLAIN = (
    "Once upon a time, there was a girl named Mia. Mia had a red ball. One day, the ball fell into the water. "
    "Mia was sad. Then she saw a big dog. The dog jumped in and got the ball. Mia was happy. They went home."
)
RICH = (
    "Long ago, near a quiet harbor, there lived a thoughtful boy named Leo who dreamed of distant islands. One stormy "
    "afternoon, a sudden wind swept his precious lantern beyond the narrow bridge. Although he trembled with worry, Leo "
    "refused to abandon hope. Before sunset he discovered the lantern beneath a willow, and an old sailor praised his "
    "patience. From that moment he understood that courage often begins with a single question."
)
TOLD = (
    'Mia felt sad because her ball was lost. "Why are you sad?" asked Leo. "I want to find my '
    'ball," she said. So Leo helped her. They looked all day long, under the beds and behind '
    'every chair in the house. At last he found it! "Thank you," Mia smiled. "You are my best '
    'friend." The next morning they shared it and laughed until night came.'
)
WORN = (
    "Mia and Tom went to the quiet harbor and looked for the lost lantern, and they went to the "
    "quiet harbor again. Long ago the old sailor had told them that the golden lantern was there, "
    'and that nobody would find the golden lantern. the sailor smiled. "Why do you search?" he '
    "asked. Mia and Tom went to the village with the map of a wide island. At last they saw it "
    "beneath a willow, a bridge, a ladder, a river, and so The village was happy"
)
STORIES = [demo_stories.story(random.Random(seed)) for seed in range(40)]
RICH_LIST = sorted(judge.RICH_WORDS)


def win_rate(policy: list[str], baseline: list[str]) -> float:
    return OfflineJudge().compare(policy, baseline).rate


def run_on(text: str) -> str:
    return text.replace(". ", " and then ").replace(",", "")


def salad(text: str) -> str:
    words = text.split()
    random.Random(0).shuffle(words)
    return " ".join(words)


FAKES = {
    "a run-on sentence": run_on(RICH),
    "no full stops": RICH.replace(".", ""),
    "word salad": salad(RICH),
    "a list of rich words": ". ".join(
        " ".join(RICH_LIST[i : i + 14]).capitalize() for i in range(0, 84, 14)
    )
    + ".",
    "a list with commas": ". ".join(
        ", ".join(RICH_LIST[i : i + 14]).capitalize() for i in range(0, 84, 14)
    )
    + ".",
    "one sentence again and again": "Long ago there lived a thoughtful boy who dreamed of a distant island. "
    * 12,
    "one phrase again and again": "The curious and precious treasure of the ancient valley shimmered in twilight. "
    + "Mia discovered the ancient valley of the precious treasure in twilight. " * 8,
    "one word": "treasure " * 80,
    "rich words as a suffix": PLAIN[:60] + " " + " ".join(RICH_LIST[:60]) + ".",
    "made-up long words": " ".join(
        "Extravagantiously memorified bewilderments undulated." for _ in range(15)
    ),
    "glued words": RICH.replace(" ", ""),
    "letters": "a b c d e f g h i j k l m n o p q r s t u v w x y z. " * 5,
    "nothing": "",
    "punctuation": "... !!! ??? " * 30,
}


@pytest.mark.parametrize("name", list(FAKES))
def test_plain_prose_beats(name):
    assert win_rate([PLAIN], [FAKES[name]]) == 1.0
    assert judge.rank([FAKES[name], PLAIN, RICH]) == [2, 1, 0]


@pytest.mark.parametrize("spoil", [run_on, salad])
def test_spoiling_any_story_makes_it_lose_to_itself(spoil):
    spoiled = [spoil(story) for story in STORIES]
    assert win_rate(STORIES, spoiled) > 0.95


# (readability, vocabulary, variety), the factors that are not 1, and the score: all labels, all
# win-rates and experiments/study.jsonl rest on these numbers.
SCORED = [
    (PLAIN, (0.34058, 0.0, 0.719876), {"length": 0.766667, "no salad": 0.596708}, 1.297298),
    (
        RICH,
        (0.953052, 1.0, 1.0),
        {"no lists": 0.901695, "function words": 0.454225},
        4.043427,
    ),
    (TOLD, (0.481481, 0.063973, 1.0), {"sentences": 0.944444}, 4.001939),
    (
        WORN,
        (0.812261, 0.888123, 0.768367),
        {"no repetition": 0.955882, "spelling": 0.233716, "sentences": 0.738095, "ending": 0.8},
        1.109451,
    ),
]


@pytest.mark.parametrize("text,qualities,factors,score", SCORED)
def test_the_scores_of_four_texts_are_what_they_were(text, qualities, factors, score):
    found = judge.features(text)
    named = ("readability", "vocabulary", "variety")
    assert [found.pop(name) for name in named] == pytest.approx(qualities, abs=1e-6)
    assert found == pytest.approx(dict.fromkeys(found, 1.0) | factors, abs=1e-6)
    assert judge.score(text) == pytest.approx(score, abs=1e-6)


def test_the_score_is_its_weighted_qualities_times_its_factors():
    """Of TOLD: 0.3 * 0.481481 + 0.45 * 0.063973 + 0.25, times 0.944444; and the mean of all."""
    quality = 0.3 * 0.481481 + 0.45 * 0.063973 + 0.25
    mean = (0.481481 + 0.063973 + 0.944444 + 9) / 12
    assert judge.score(TOLD) == pytest.approx(
        10 * (0.999 * 0.944444 * quality + 0.001 * mean), abs=1e-5
    )


def test_length_alone_does_not_win():
    for a, b in zip(STORIES[::2], STORIES[1::2], strict=False):
        assert judge.score(f"{a} {b}") < max(judge.score(a), judge.score(b)) + 0.5
    assert judge.score(RICH + " " + RICH) < judge.score(RICH)


def test_every_feature_is_bounded():
    for text in [
        PLAIN,
        RICH,
        *FAKES.values(),
        "Extraordinarily " * 500 + ".",
        "A" * 5000,
        "\u4f60\u597d " * 50,
    ]:
        assert all(0 <= value <= 1 for value in judge.features(text).values())
        assert 0 <= judge.score(text) <= 10


def test_the_ranking_does_not_depend_on_the_order_of_the_stories():
    stories = [*STORIES[:6], RICH, PLAIN]
    best_first = [stories[i] for i in judge.rank(stories)]
    for seed in range(5):
        shuffled = random.Random(seed).sample(stories, len(stories))
        assert [shuffled[i] for i in judge.rank(shuffled)] == best_first


def test_compare_gives_a_tie_only_to_equals():
    assert (
        win_rate([RICH], [PLAIN]) == 1.0
        and win_rate([PLAIN], [RICH]) == 0.0
        and win_rate([RICH], [RICH]) == 0.5
    )


def test_stem_finds_the_entry_a_word_is_a_form_of():
    forms = {
        "whispered": "whisper",
        "hurried": "hurry",
        "glimmering": "glimmer",
        "village's": "village",
        "wisely": "wise",
    }
    assert {word: judge.stem(word) for word in forms} == forms and judge.stem("ball") is None


def real_stories(folder: str, name: str = "valid") -> list[str]:
    with open(f"{folder}/tinystories_{name}.jsonl", encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f]


def test_the_longer_of_two_real_stories_wins_about_as_often_as_it_loses(spo_data):
    stories = real_stories(spo_data, "train")
    pairs = [sorted(pair, key=len) for pair in zip(stories[::2], stories[1::2], strict=False)]
    assert 0.4 < win_rate([long for _, long in pairs], [short for short, _ in pairs]) < 0.6


def test_real_stories_beat_their_shuffled_and_unpunctuated_selves(spo_data):
    stories = real_stories(spo_data)[:100]
    assert win_rate(stories, [salad(story) for story in stories]) > 0.98
    assert win_rate(stories, [run_on(story) for story in stories]) > 0.95


def test_a_score_is_computed_once():
    """Every story is judged twice."""
    assert judge.score.cache_info().maxsize >= 4096
