"""A small grammar of stories: the text that the offline demo trains its reference model on.

A story is eight beats. Most beats have plain and rich wordings; a story leans to one or the other,
so that a model of these stories can be moved between them, and has or lacks a twist.
"""

import random

NAMES = "Lily Tom Mia Ben Anna Max Zoe Sam Nora Finn Ella Leo Ruby Jack Ivy Oscar Clara Hugo Rosa Theo".split()
FRIENDS = [
    "an old owl",
    "a small rabbit",
    "a gray cat",
    "a kind baker",
    "a tall farmer",
    "a red fox",
    "a shy deer",
    "a brown dog",
    "a wise turtle",
    "a little mouse",
    "a young sailor",
    "a green frog",
]
PLACES = [
    "forest",
    "village",
    "garden",
    "river",
    "mountain",
    "castle",
    "beach",
    "meadow",
    "market",
    "island",
]
THINGS = [
    "kite",
    "ball",
    "lantern",
    "key",
    "book",
    "boat",
    "drum",
    "hat",
    "map",
    "bell",
    "ring",
    "cup",
    "basket",
    "shell",
]
PLAIN = ["big", "red", "small", "blue", "old", "nice", "shiny", "soft"]
RICH = [
    "ancient",
    "delicate",
    "precious",
    "mysterious",
    "golden",
    "splendid",
    "peculiar",
    "magnificent",
]

# Each beat: (plain wordings, rich wordings). {they} is "he" or "she".
BEATS = [
    (
        [
            "Once upon a time, there was a {child} named {name}.",
            "One day, {name} was at the {place}.",
            "There was a {child}. {Their} name was {name}.",
            "{name} was a {child} who had a {adj} {thing}.",
        ],
        [
            "Long ago, near a quiet {place}, there lived a curious {child} named {name}.",
            "In a distant village beside the {place}, a thoughtful {child} named {name} dreamed of adventure.",
            "At the edge of an enormous {place}, a patient {child} called {name} lived with {their} family.",
        ],
    ),
    (
        [
            "{They} had a {adj} {thing}.",
            "{They} liked to play with a {adj} {thing}.",
            "{They} loved {their} {thing}. It was {adj}.",
            "{Their} {thing} was {adj}. {They} was happy.",
        ],
        [
            "Of all the things {they} owned, the {rich} {thing} was the treasure {they} admired most.",
            "{They} carried a {rich} {thing} everywhere, because it reminded {name} of a forgotten legend.",
            "Every evening {they} polished {their} {rich} {thing} and imagined a voyage across the silent ocean.",
        ],
    ),
    (
        [
            "One day, the {thing} was lost.",
            "One day, the {thing} fell into the water.",
            "Then the {thing} broke.",
            "But a bird took the {thing}.",
            "One day, it was not there. {name} was sad.",
        ],
        [
            "One stormy afternoon, a sudden wind swept the {thing} beyond the narrow bridge.",
            "One morning, however, {name} discovered that the {thing} had vanished without a trace.",
            "At dusk the {thing} slipped from {their} fingers and tumbled into a hidden cavern.",
        ],
    ),
    (
        [
            "{name} was sad.",
            "{name} began to cry.",
            '"Oh no!" said {name}.',
            "{name} looked and looked.",
            "{They} did not know what to do.",
        ],
        [
            "{name} felt a terrible sorrow, yet {they} refused to abandon hope.",
            "Although {they} trembled with worry, {name} decided to search the whole {place} before sunset.",
            '"I must be brave," {they} whispered, and {their} voice was barely louder than a sigh.',
        ],
    ),
    (
        [
            "Then {they} saw {friend}.",
            "{name} met {friend}.",
            "{Friend} came to help.",
            "{They} saw {friend} and ran.",
        ],
        [
            "While {they} wandered along the winding path, {friend} appeared and listened with patience.",
            "Before long, {friend} noticed {their} misery and offered a generous promise of help.",
            "From behind a willow, {friend} had observed everything and approached with gentle courage.",
        ],
    ),
    (
        [
            '"I can help you," said the friend.',
            '"Do not cry," said the friend.',
            "They looked for the {thing}.",
            "They went to the {place} and looked for it.",
        ],
        [
            '"The answer is simple," the stranger explained, "but only a patient heart will recognize it."',
            "Together they explored the valley, solved an ancient riddle, and followed a faint glimmer of light.",
            '"We will succeed," the companion declared, "because honest friends never surrender to fear."',
        ],
    ),
    (
        [
            "They saw the {thing}. {name} was happy.",
            "{name} got the {thing} back.",
            "At last the {thing} was there.",
            "They had the {thing} again. They were glad.",
        ],
        [
            "At last, beneath a blanket of silver leaves, they discovered the {thing} and rejoiced in their triumph.",
            "Finally, as the horizon glowed, {name} recovered the {thing} and embraced {their} loyal friend.",
            "In the end their struggle was rewarded, and the {thing} gleamed once more in the golden twilight.",
        ],
    ),
    (
        [
            "They went home.",
            "They were happy. The end.",
            "It was a good day.",
            "{name} went home and had a nap.",
            "They were best friends.",
        ],
        [
            "From that moment, {name} understood that friendship is more valuable than any treasure.",
            "Years later, {they} still remembered the lesson: courage often begins with a single question.",
            "And so the village celebrated, while the stars above shimmered with quiet delight.",
        ],
    ),
]
TWISTS = [
    "But it was not the same {thing}! It was a different one.",
    "To their surprise, the friend had hidden the {thing} all along and begged them to forgive the mischief.",
    "Then something unexpected happened: the {thing} began to sing a strange and wonderful melody.",
    "But the {thing} was gone again.",
]


def story(rng: random.Random) -> str:
    """One story; the same generator state gives the same story."""
    girl = rng.random() < 0.5
    name = rng.choice(NAMES)
    friend = rng.choice(FRIENDS)
    words = {
        "name": name,
        "friend": friend,
        "Friend": friend.capitalize(),
        "place": rng.choice(PLACES),
        "thing": rng.choice(THINGS),
        "adj": rng.choice(PLAIN),
        "rich": rng.choice(RICH),
        "child": "girl" if girl else "boy",
        "they": "she" if girl else "he",
        "They": "She" if girl else "He",
        "their": "her" if girl else "his",
        "Their": "Her" if girl else "His",
    }
    richness = rng.choice([0.05, 0.2, 0.35, 0.6])
    sentences = [rng.choice(rich if rng.random() < richness else plain) for plain, rich in BEATS]
    if rng.random() < 0.3:
        sentences.insert(7, rng.choice(TWISTS))
    return " ".join(s.format(**words) for s in sentences)
