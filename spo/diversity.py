"""How different a set of stories is, and how good its best ones are.

A policy can raise its win-rate by telling one good story again and again. These numbers show it.
They depend on how many stories there are: compare sets of the same size only.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

GRAM = 4  # words
BEST_OF = (1, 4, 16, 64)
GOOD = 6.0  # of 10, by the offline judge's formula; a mean real TinyStory has 5.4


@dataclass
class Diversity:
    """distinct  the share of 4-grams of words, over the whole set, that are different ones
    best_of   {k: the expected best score of k stories}, for every k that the set has stories for
    good      how many different stories have a score above GOOD
    """

    distinct: float
    best_of: dict[int, float]
    good: int

    @classmethod
    def of(cls, texts: Sequence[str], scores: Sequence[float]) -> "Diversity":
        good = {text for text, score in zip(texts, scores, strict=True) if score > GOOD}
        best_of = {k: best_of_k(scores, k) for k in BEST_OF if k <= len(scores)}
        return cls(distinct_share(texts), best_of, len(good))

    def logged(self) -> dict[str, float]:
        """Return the numbers by their names in a log."""
        best = {f"best_of_{k}": value for k, value in self.best_of.items()}
        return {"distinct_4grams": self.distinct, **best, "good_stories": self.good}

    def __str__(self) -> str:
        names = ", ".join(map(str, self.best_of))
        values = ", ".join(f"{value:.2f}" for value in self.best_of.values())
        distinct = f"distinct 4-grams {self.distinct:.1%}"
        return f"{distinct}, best of {names}: {values}, {self.good} above {GOOD:g}"


def distinct_share(texts: Sequence[str]) -> float:
    """Return different 4-grams over all 4-grams, distinct-4 (Li et al. 2016); of none, 1.

    texts=["a b c d e", "a b c d x"] -> 3/4: abcd is there twice
    """
    grams = []
    for text in texts:
        words = text.lower().split()
        grams += [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0


def best_of_k(scores: Sequence[float], k: int) -> float:
    """Return the mean, over all sets of k of the n scores, of the best: unbiased for k new stories.

    The i-th smallest is the best of C(i - 1, k - 1) of the C(n, k) sets.

    scores=[1, 2, 4], k=2 -> (2 + 4 + 4) / 3
    ValueError if there are fewer than k.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"best of {k}: there are {n} scores")
    total = math.comb(n, k)
    ordered = enumerate(sorted(scores), start=1)
    return sum(score * (math.comb(i - 1, k - 1) / total) for i, score in ordered)
