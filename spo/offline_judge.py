"""The offline judge: a fixed formula for how well a story suits older readers.

So that the whole recipe runs without a network and gives the same answer everywhere. It stands in
for a language model's verdict; it is not one. See `score`.
"""

import functools
import itertools
import math
import os
import re
from collections import Counter


def read_words(section: str) -> frozenset[str]:
    """Return the words of a section of words.txt: [rich] or [common]."""
    path = os.path.join(os.path.dirname(__file__), "words.txt")
    with open(path, encoding="utf-8") as f:
        lines = [line for line in f.read().splitlines() if not line.startswith("#")]
    sections = "\n".join(lines).split("[")
    words = next(s for s in sections if s.startswith(f"{section}]")).split("]")[1].split()
    return frozenset(words)


RICH_WORDS = read_words("rich")
COMMON_WORDS = read_words("common")

DETERMINERS = set("the a an my your our their its every".split())
PREPOSITIONS = set(
    "of to in on at with from for into onto about by under behind near through across "
    "toward".split()
)
SUBJECTS = set("i he she they we".split())
OBJECTS = set("him them me us himself herself themselves".split())
BE_HAVE = set("was were is are am had has".split())
MODALS = set("could would should must can't couldn't didn't don't wouldn't".split())
JOINERS = set("and but or".split())
OTHER_FUNCTION = set(
    """
it you his her this that these those there here what who which when where while because if as so
than then not no very too be been being have do does did will can all some any one up down out off
over again just also how why it's he's she's that's i'm i'll let's
""".split()
)
FUNCTION = (
    DETERMINERS | PREPOSITIONS | SUBJECTS | OBJECTS | BE_HAVE | MODALS | JOINERS | OTHER_FUNCTION
)
MAY_REPEAT = set(
    "very so no bye ha many really that had far knock tick hop up round on more".split()
)

# Word pairs that grammatical English (all but) never has. Shuffled prose has them in one pair of
# seven.
NEVER_FOLLOWS = [
    (
        DETERMINERS,
        DETERMINERS
        | PREPOSITIONS
        | SUBJECTS
        | OBJECTS
        | BE_HAVE
        | MODALS
        | JOINERS
        | {"it", "his", "not"},
    ),
    (PREPOSITIONS, SUBJECTS | JOINERS | BE_HAVE | MODALS),
    (
        SUBJECTS,
        DETERMINERS
        | SUBJECTS
        | OBJECTS
        | (PREPOSITIONS - {"in", "on", "for"})
        | {"it", "his", "her", "this"},
    ),
    (BE_HAVE, BE_HAVE - {"had"} | MODALS | {"did", "do", "does"}),
    (MODALS, DETERMINERS | BE_HAVE | JOINERS | MODALS | OBJECTS | (PREPOSITIONS - {"to"})),
    (OBJECTS, BE_HAVE | SUBJECTS | MODALS),
    (JOINERS, JOINERS),
]
NEVER_LAST = (
    DETERMINERS
    | JOINERS
    | {"of", "from", "into", "was", "were", "because", "very", "i", "he", "they", "we"}
)


# Signs of broken text: doubled or glued punctuation, capitals or digits inside words, symbols,
# lower case after a full stop; and a capitalised word after an unfinished clause, a fault if it is
# a function word ("begged From").
MALFORMED = re.compile(
    r"[,;:][,;:.!?]|[.!?,;:][A-Za-z]|[a-z][A-Z]|[0-9][A-Za-z]|[A-Za-z][0-9]|[.!?] [a-z]|"
    r"[&#@%^*_+=<>|\\~{}\[\]/`]|[^\x00-\x7f\u2018-\u201d\u2013\u2014\u2026\u00c0-\u00ff]"
)
STRAY_CAPITAL = re.compile(r"(?<=[A-Za-z,;] )(?!I\b)[A-Z][a-z]*")

# A word's ending and what it stood in for: hurried -> hurry is ("ied", "y").
SUFFIXES = [
    ("", ""),
    ("'s", ""),
    ("s", ""),
    ("es", ""),
    ("ed", ""),
    ("d", ""),
    ("ing", ""),
    ("ing", "e"),
    ("ly", ""),
    ("ly", "le"),
    ("ies", "y"),
    ("ied", "y"),
    ("ily", "y"),
    ("iness", "y"),
    ("y", ""),
    ("y", "e"),
    ("er", ""),
    ("r", ""),
    ("ier", "y"),
    ("iest", "y"),
    ("est", ""),
    ("st", ""),
    ("ful", ""),
    ("ness", ""),
    ("less", ""),
    ("ment", ""),
    ("ation", "e"),
    ("ally", "al"),
    ("ous", ""),
    ("en", ""),
    ("n", ""),
    ("'ll", ""),
    ("'re", ""),
]


def ramp(x: float, zero: float, one: float) -> float:
    """0 at `zero`, 1 at `one`, linear in between and constant outside; `zero` may be the larger."""
    return min(1.0, max(0.0, (x - zero) / (one - zero)))


# Stories have few words, so what is found of one is kept.
@functools.lru_cache(maxsize=2**16)
def stem(word: str, words: frozenset[str] = RICH_WORDS) -> str | None:
    """The entry of `words` that this word is a form of, or None: whispered -> whisper, hurried ->
    hurry.
    """
    for suffix, ending in SUFFIXES:
        base = word.removesuffix(suffix)
        if word.endswith(suffix) and base + ending in words:
            return base + ending
        if (
            suffix in ("ed", "ing", "er") and base[-1:] == base[-2:-1] and base[:-1] in words
        ):  # stopped -> stop
            return base[:-1]
    return None


def sentences_of(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])[\"')]*\s+", text.strip()) if re.search("[A-Za-z]", s)]


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)*", text.lower().replace("\u2019", "'"))


def repeated_share(items: list) -> float:
    """The share of items that stand earlier in the list, too."""
    return 1 - len(set(items)) / len(items) if items else 0.0


@functools.lru_cache(maxsize=2**18)
def is_misplaced(a: str, b: str) -> bool:
    """Tell whether one word behind another breaks NEVER_FOLLOWS, or repeats it."""
    repeats = a == b and a not in MAY_REPEAT
    return repeats or any(a in left and b in right for left, right in NEVER_FOLLOWS)


@functools.lru_cache(maxsize=2**16)
def is_misspelt(word: str) -> bool:
    """Tell whether a word is too long, or has letters in a row that no English word has."""
    odd = re.search(r"(.)\1\1|[^aeiouy']{6}", word)
    return len(word) > 15 or not re.search("[aeiouy]", word) or bool(odd)


def misplaced_share(clauses: list[list[str]], sentences: list[list[str]]) -> float:
    """Word pairs that break NEVER_FOLLOWS, immediate repetitions, and sentences ending in
    NEVER_LAST, per pair.
    """
    pairs = [pair for clause in clauses for pair in itertools.pairwise(clause)]
    faults = sum(is_misplaced(a, b) for a, b in pairs)
    faults += 2 * sum(s[-1] in NEVER_LAST for s in sentences)
    return faults / max(1, len(pairs))


def listed_share(sentences: list[list[str]]) -> float:
    """The share of words that stand in a row of five or more without one function word: lists, not
    prose.
    """
    listed = 0
    for words in sentences:
        row = 0
        for word in words + ["the"]:
            if word in FUNCTION:
                listed += row if row >= 5 else 0
                row = 0
            else:
                row += 1
    return listed / max(1, sum(map(len, sentences)))


def features(text: str) -> dict[str, float]:
    """Every part of the score, each in [0, 1]: three qualities, then the factors that make a text
    sound.
    """
    sentences = [words_of(s) for s in sentences_of(text)]
    words = [w for s in sentences for w in s]
    if not words:
        return {name: 0.0 for name in ("readability", "vocabulary", "variety", "length")}
    clauses = [words_of(c) for c in re.split(r"[.,;:!?\"()\n]|--", text)]
    n = len(words)
    lengths = [len(s) for s in sentences]
    in_run_ons = (
        sum(
            k
            for s, k in zip(sentences, lengths, strict=True)
            if k > 30 or sum(w in JOINERS for w in s) > 3
        )
        / n
    )
    windows = [words[i : i + 50] for i in range(0, max(1, n - 49), 10)]
    distinct = sum(len(set(w)) / len(w) for w in windows) / len(windows)
    openings = 1 - repeated_share([tuple(s[:2]) for s in sentences])
    rich = {stem(w) for w in set(words)} - {None}
    function_share = sum(w in FUNCTION for w in words) / n
    joints = (
        sum(a in FUNCTION and b in FUNCTION for a, b in itertools.pairwise(words)) / n
    )  # "in the", "she was"
    commonest = max(Counter(words).values()) / n
    faults = (
        len(MALFORMED.findall(text))
        + sum(w.lower() in FUNCTION for w in STRAY_CAPITAL.findall(text))
        + sum(map(is_misspelt, words))
    )
    lower = re.findall(r"(?<![A-Za-z'])[a-z]+(?:'[a-z]+)*", text)  # capitalised words may be names
    unknown = sum(
        w not in FUNCTION and not stem(w) and not stem(w, COMMON_WORDS) for w in lower
    ) / max(1, len(lower))
    capital = sum(bool(re.match(r"[\"'(]*[A-Z]", s)) for s in sentences_of(text)) / len(sentences)
    return {
        # a sentence counts by its words: from 4 (a primer) up to 13, and back to nothing at 32 (a
        # run-on)
        "readability": sum(k * min(ramp(k, 4, 13), ramp(k, 32, 20)) for k in lengths) / n,
        "vocabulary": 0.8 * ramp(len(rich) / len(set(words)), 0, 0.20)
        + 0.2
        * min(ramp(sum(map(len, words)) / n, 3.5, 4.4), ramp(sum(map(len, words)) / n, 7, 5.5)),
        "variety": 0.6 * ramp(distinct, 0.5, 0.8) + 0.4 * ramp(openings, 0.3, 1.0),
        "length": ramp(n, 0, 60),  # enough to be a story; more wins nothing
        "no run-ons": ramp(in_run_ons, 0.5, 0.1),
        "no repetition": ramp(
            repeated_share(list(zip(words, words[1:], words[2:], strict=False))), 0.40, 0.08
        )
        * ramp(repeated_share([tuple(s) for s in sentences]), 0.4, 0.0),
        "no salad": ramp(misplaced_share(clauses, sentences), 0.06, 0.006),
        "no lists": ramp(listed_share(sentences), 0.25, 0.06)
        * ramp(function_share, 0.2, 0.35)
        * ramp(len(rich) / len(set(words)), 0.7, 0.45),
        "function words": ramp(function_share, 0.75, 0.65)
        * ramp(joints, 0.02, 0.10)
        * ramp(commonest, 0.3, 0.17),
        "spelling": ramp(faults / n, 0.03, 0.0) * ramp(unknown, 0.25, 0.12),
        "sentences": 0.5 + 0.5 * ramp(capital, 0.5, 0.95),
        "ending": 1.0 if re.search(r"[.!?][\"')]*\s*$", text) else 0.8,
    }


def is_english(text: str) -> bool:
    """Tell whether a text may be English: its letters are ASCII, and one word in seven is common.

    In English stories every other word is; very short texts pass.
    """
    letters = [c for c in text if c.isalpha()]
    if sum(c.isascii() for c in letters) * 2 < len(letters):
        return False
    words = re.findall(r"[a-z']+", text.lower())
    return len(words) < 8 or sum(word in FUNCTION for word in words) * 7 >= len(words)


def remark(texts: list[str]) -> str:
    """Say how many of the texts are not English, which alone is judged here; "" if hardly any."""
    others = sum(not is_english(text) for text in texts)
    if others * 20 < len(texts):
        return ""
    nothing = "the offline judge reads nothing else, and its scores say nothing of them"
    return f"{others} of {len(texts)} texts are not English: {nothing}"


@functools.lru_cache(maxsize=2**14)  # a pool is scored at every evaluation
def score(text: str) -> float:
    """How well a story suits older readers, 0 to 10, by a fixed formula; nothing in it is
    unbounded.

        10 * (0.30 readability + 0.45 vocabulary + 0.25 variety) * soundness

    and one part in 1,000 of it the mean of all parts, so that of two broken texts the one with
    fewer faults is better

    readability  sentences of 13 to 20 words, as a reading grade would have it, falling to nothing
                 for run-ons
    vocabulary   distinct words out of a list of 500 that older readers know, up to a fifth of all;
                 word length
    variety      distinct words in windows of 50, sentences that open differently
    soundness    a product of factors that plain prose has near 1: no run-on sentences, repeated
                 phrases, word salad (pairs like "the of"), word lists, misspelling; length only up
                 to 60 words
    """
    parts = features(text)
    soundness = math.prod(
        v for k, v in parts.items() if k not in ("readability", "vocabulary", "variety")
    )
    quality = 0.30 * parts["readability"] + 0.45 * parts["vocabulary"] + 0.25 * parts["variety"]
    return 10 * (0.999 * soundness * quality + 0.001 * sum(parts.values()) / len(parts))


def rank(stories: list[str]) -> list[int]:
    """Indices of the stories, best first; between equals it has no view, and takes the one shown
    first.

    So a ranking that rests on a tie turns round with the order of the stories, and asking in both
    orders shows it.
    """
    return sorted(range(len(stories)), key=lambda i: -score(stories[i]))
