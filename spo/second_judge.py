"""A second opinion: another formula, which no label and no loss has seen.

A policy that is trained on one judge's labels learns what that judge likes, its blind spots
included. If the first judge's win-rate rises and this one's does not, the policy has learned the
judge and not the task. spo/offline_judge.py rewards words for older readers, long sentences and
variety. This one rewards what people in the story say, feel and decide, sentences that hang
together, and rhythm. No word of MIND_AND_TIME is one that the first rewards.
"""

import functools
import itertools
import math
import re
import statistics
import zlib

from spo.offline_judge import ramp

MIND_AND_TIME = set(
    """
said say asked ask told tell called call answered shouted laughed cried smiled hugged kissed
thanked waved knew know think felt feel wanted want wished wish loved love liked
like needed need forgot learned learn tried try helped help shared share saved safe found find
happy sad mad scared glad sorry tired hungry excited better friend friends
today tomorrow morning night day later soon next first last always never ever
yes please thank okay maybe why because until since
""".split()
)
PRONOUNS = set("he she they it him her them his their its we us".split())


def sentences_of(text: str) -> list[list[str]]:
    """Return the words of each sentence. 'He ran. "Hi!" she said.' has three."""
    parts = re.split(r"[.!?]+[\"')\u201d]*\s+|\n+", text.strip())
    words = [re.findall(r"[a-z]+(?:['\u2019][a-z]+)*", part.lower()) for part in parts]
    return [sentence for sentence in words if sentence]


def cohesion(sentences: list[list[str]]) -> float:
    """Return the share of sentences that take up the one before: a longer word of it, a pronoun."""
    joined = 0
    for before, after in itertools.pairwise(sentences):
        topics = {word for word in before if len(word) >= 4}
        joined += bool(topics & set(after)) or bool(PRONOUNS & set(after))
    return joined / max(1, len(sentences) - 1)


def rhythm(sentences: list[list[str]]) -> float:
    """Return the spread of the sentences' lengths over their mean; 0 for fewer than two."""
    lengths = [len(sentence) for sentence in sentences]
    return statistics.pstdev(lengths) / statistics.mean(lengths) if len(lengths) > 1 else 0.0


def features(text: str) -> dict[str, float]:
    """Return every part of the score, each in [0, 1]: four qualities, then three factors."""
    sentences = sentences_of(text)
    words = list(itertools.chain.from_iterable(sentences))
    if not words:
        return dict.fromkeys(("mind", "cohesion", "rhythm", "speech", "length"), 0.0)
    raw = text.encode("utf-8", "replace")
    marks = text.count('"') + text.count("\u201c") + text.count("\u201d")
    spread = rhythm(sentences)
    # Plain prose of a few hundred bytes packs to between 0.45 and 0.7 of them.
    packed = len(zlib.compress(raw, 9)) / len(raw)
    letters = sum(c.isalpha() or c.isspace() for c in text) / len(text)
    return {
        "mind": ramp(len(MIND_AND_TIME & set(words)) / math.sqrt(len(words)), 0.0, 1.2),
        "cohesion": ramp(cohesion(sentences), 0.3, 0.9),
        "rhythm": min(ramp(spread, 0.1, 0.45), ramp(spread, 1.4, 0.8)),
        "speech": ramp(marks / len(sentences), 0.0, 0.3) * ramp(marks / len(sentences), 3.0, 1.5),
        "length": ramp(len(words), 0, 80),
        "no repetition": ramp(packed, 0.2, 0.42),
        "prose": ramp(letters, 0.85, 0.93),
    }


@functools.lru_cache(maxsize=2**14)  # a pool is scored at every evaluation
def score(text: str) -> float:
    """Return 0 to 10: 10 * (0.35 mind + 0.25 cohesion + 0.2 rhythm + 0.2 speech) * three factors.

    mind      distinct words of saying, feeling, wanting and of time, over the root of all words
    cohesion  sentences that take up a word of the sentence before, or continue with a pronoun
    rhythm    sentences of different lengths
    speech    quotation marks: somebody speaks, and not all the time
    factors   enough words; text that does not repeat itself (by what zlib makes of it); letters
    """
    parts = features(text)
    quality = 0.35 * parts["mind"] + 0.25 * parts["cohesion"]
    quality += 0.2 * parts["rhythm"] + 0.2 * parts["speech"]
    return 10 * quality * math.prod(list(parts.values())[4:])
