"""The offline judge: a fixed formula for how well a story suits older readers.

So that the whole recipe runs without a network and gives the same answer everywhere. It stands in for a language
model's verdict; it is not one. See `score`.
"""

import functools
import math
import re

# Words that a story for older readers has and one for small children mostly lacks; inflections are found by `stem`.
RICH_WORDS = set(
    """
abandon ability absolute accident accompany ache achieve admire admit adventure advice afternoon
agree although amaze amuse ancient anger announce anxious apology appear appreciate approach argue
arrange arrive ashamed astonish attempt attention autumn avoid awake awful balance barely battle
beautiful behave belief belong beneath betray bewilder beyond bitter blanket blossom boast bold
borrow bother bottom brave breath breathe breeze brief bright brilliant brook bundle burden calm
candle captain capture careful carve castle caution cavern celebrate challenge chamber character
charm cheer chore clever cliff climb clumsy coast collapse collect comfort command complain complete
concern confess confident confuse consider content continue cottage courage cradle craft crawl creak
creature crimson crowd crumble cunning curious curtain custom damp danger daring dawn decide declare
deep defeat delicate delicious delight depart describe deserve desire despair desperate destroy
determine different difficult direction disappear disappoint discover discuss disguise distance
distant disturb doubt dreadful drift drown dusk eager earn echo edge effort elder elegant embrace
emerald emerge emotion empty enchant encourage endless enemy enormous entire envy escape eventual
evil examine exclaim exhaust exist expect experience explain explore expression extraordinary faint
faithful familiar famous fascinate fear feast fierce final flicker float flutter foolish forbid
foreign forest forgive fortune fragile freedom frequent fright frost frown frustrate fury gather
gaze generous gentle genuine ghost giggle glance gleam glimmer glisten gloomy glow golden gossip
graceful gradual grateful greed grief grim guard guide guilt harbor harsh harvest haste haunt heal
heart heavy hesitate hidden hollow honest honor hope horizon howl huge humble hunger hurry ignore
imagine immediate important impossible impress incredible inspect instead intend invent invisible
invite island jealous journey justice keen kingdom knowledge ladder lantern lean legend lesson
lighthouse linger listen lonely loyal lullaby magic magnificent majestic marvel meadow melancholy
melody memory merchant mercy messenger midnight mischief misery mist mistake moan modest moment
moonlight moonlit mountain mourn murmur mysterious mystery narrow neglect nervous noble notice obey
observe ocean odd offer orchard ordinary ought overcome palace panic patience patient pause peaceful
peculiar perfect perhaps persuade plead pleasant pleasure plenty polite ponder poor portrait possess
powerful praise precious predict prefer prepare pretend prince princess prison problem promise
protect proud prove puzzle quarrel quest quiet quilt quiver rare reach realize reason recall receive
recognize recover reflect refuse regret relief reluctant remain remarkable remember remind repair
replace reply rescue respect responsible restless return reveal reward riddle ripple roam rough ruin
rumor rustle sacred sacrifice sail sailor satisfy scatter scholar scold search secret sense serious
several shadow shatter shelter shimmer shiver shore sigh silence silent silver simple single slender
slight slope slumber smooth sob solemn solution solve sorrow soul sparkle special spirit splendid
stare startle steady stern storm strange stranger stream strength stretch struggle stubborn stumble
succeed sudden suffer suggest sunlight sunset surface surprise surround survive suspect swamp sway
swift sympathy tale talent tangle tease temper temple tempt tender terrible terrify thief thought
thoughtful thread threat thrill thunder tide timid tower trace tradition trail traveler treasure
tremble triumph trouble trust truth twilight twist unexpected unfortunate unknown unusual urge
useful valley valuable vanish vast velvet victory village voyage wander warn weary weather weave
weep whisper wicked wild wilderness willow wisdom wise wither within witness wonder wonderful worry
wound wreck yearn yield
""".split()
)

# Words that any reader knows. Together with the lists above and below they tell words from broken ones.
COMMON_WORDS = set(
    """
able above accidentally add afraid after ago air alive almost alone along already always angry
animal another answer anybody anymore anyone anything anyway apart apple arm around art ask asleep
ate aunt awake away baby back backyard bad bag bake baker ball balloon banana band bank bark barn
basket bath bathroom beach bean bear beat became become bed bedroom bee before beg began begin
beginning believe bell bench bent best better big biggest bike bird birthday bit bite black bled
blew block blow blue board boat body bone book boot bored boring born both bottle bought bounce bow
bowl box boy branch bread break breakfast bred brick bridge bring broke broken brother brought brown
brush bubble bucket bug build built bunny burn burnt bus bush busy butter butterfly button buy bye
cage cake call came camera camp candy cannot cap car card care carpet carry cart cat catch caught
cause cave chair chase check cheek cheese chest chew chicken child children chin chocolate choose
chosen church circle city clap class clean clear clock close cloth clothes cloud clown coat coin
cold color comb come comfortable comfy companion cook cookie cool copy corn corner cost couch count
country course cousin cover cow cozy crash crayon cream creative cried cross crown cry cup cupboard
cushion cut cute dad daddy dance dark date daughter day dead deal dear deer desk diamond dice dig
dine dinner dirt dirty dish dive doctor dog doing doll done donkey door dragon draw drawer drawn
dream dreamt dress drew drink drive drop drove drum dry duck dug dust each ear early earth ease east
easy eat eaten egg eight elephant eleven else end enjoy enough enter especially even evening ever
everybody everyone everything everywhere excited exciting extra eye face fact fair fairy fall fallen
family fancy far farm farmer fast fat father favorite feather fed feed feel feet fell felt fence few
field fight figure fill find fine finger finish fire first fish fit five fix flag flash flashlight
flat fled flew floor flour flower flown fluffy fly fold follow food foot forever forget forgot
forgotten fork forward found four fox free fresh fridge friend friendly frog front frozen fruit full
fun funny fur furniture furry game garage garden gate gave get giant gift giraffe girl give given
glad glass glove glue go goal goat god gold gone good goodbye got gotten grab grade grandfather
grandma grandmother grandpa grape grass gray great green grew grey ground group grow grown guess
guest guy hair half hall hammer hand handle hang happen happy hard hat hate having head health hear
heard heat held hello helmet help hen hero hey hi hid hide high hill hit hold hole home hop horse
hose hospital hot hour house hug hundred hung hungry hunt hurt husband ice idea inch inside
interesting iron itself jacket jam jar jelly job join joke joy juice jump jungle keep kept key kick
kid kill kind king kiss kitchen kite kitten kitty knee knelt knew knife knock know lady laid lake
lamb lamp land lap large last late later laugh laundry law lay lazy lead leaf leapt learn leave led
left leg lemon lent less let letter lick lid lie life lift light like line lion lip list little live
lived load lock log long look lose lost lot loud love low loyal luck lucky lunch machine mad made
magical mail main make mama man many mark market mask mat match math matter maybe meal mean meant
meat medicine meet melt men mess met metal mice middle might milk mind mine minute mirror miss mix
mom mommy money monkey monster month mood moon moral more morning most mother mouse mouth move movie
much mud mum mummy muscle museum mushroom music nail name nap naughty nearby nearly neat neck need
neighbor nest net never new news next nice night nine nobody nod noise none noon nor north nose note
nothing now number nurse nut o'clock oak often oh oil okay old once ones onion only open orange
order other others outside oven owl own owned owner pack page paid pain paint pair pan pants papa
paper parade parent park part party pass past path pay pea peace peel pen pencil penny people pepper
person pet phone photo piano pick picnic picture pie piece pig pile pillow pilot pink pipe pirate
pit pizza place plan plane planet plant plate play playground please pocket point pole police polish
polished pond pony pool pop pot potato pour power practice present press pretty prize pull pumpkin
puppet puppy purple purse push put queen question quick quit quite rabbit race rain rainbow ran rang
rat rather read ready real really red rejoice rejoiced relax relieved rest rich ride right ring rise
river road roar rob robot rock rocket rode roll roof room root rope rose round row rub rude rug rule
run rushed sad safe said salad salt same sand sandwich sang sat save saw say scare scary school
science scream sea seat second see seed seek seem seen selfish sell send sent set seven shake shape
share sharp shed sheep sheet shelf shell shine shiny ship shirt shoe shook shoot shop short shot
shoulder shout shovel show shower shown shut shy sick side sight sign silly since sing sink sir
sister sit six size skin skip skirt sky sled sleep sleepy slept slid slide slip slipped slow small
smart smell smile smoke snack snail snake sniff snow soap soccer sock soda sofa soft sold soldier
somebody someone something sometimes somewhere son song soon sore sorry sort sound soup sour space
spare speak speed spell spend spent spicy spider spill spin spoke spoon sport spot spread spring
spun square squash squeeze squirrel stage stair stamp stand star start station stay steal step stick
sticky still stole stolen stone stood stop store story stove straight street string strong stuck
student study stuff such sugar suit summer sun sung sunny sunshine super supper sure surf surrender
swam sweep sweet swept swim swing swung table tail take taken talk tall tap task taste taught tea
teach teacher team tear teddy teeth tell ten tent test thank thick thin thing think third thirsty
thirteen though three threw throat throw thrown thumb ticket tidy tie tiger tight time tiny tip tire
toast today toe together told tomato tomorrow tongue tonight took tool tooth top torn toss touch
towards towel town toy track traffic train trap trash travel treat tree trick tried trip truck true
try tub tube tumbled tummy turkey turn turtle tv twelve twenty twice twin two ugly umbrella uncle
understand understood until upon upset upstairs use usual van vase vegetable video view visit voice
volcano wagon wait wake walk wall want warm wash wasn't watch water wave way weak wear week welcome
well went west wet whale wheel whenever white whole whose wide wife win window wing winter wipe wish
without woke woken wolf woman won won't wood wooden wool word wore work world worm worn worse wrap
write written wrong wrote yard yeah year yell yellow yes yesterday yet you're young yourself yummy
zebra zoo
""".split()
)

DETERMINERS = set("the a an my your our their its every".split())
PREPOSITIONS = set(
    "of to in on at with from for into onto about by under behind near through across toward".split()
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

# Word pairs that grammatical English (all but) never has. Shuffled prose has them in one pair of seven.
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


# Signs of broken text: doubled or glued punctuation, capitals or digits inside words, symbols, lower case after a
# full stop; and a capitalised word after an unfinished clause, a fault if it is a function word ("begged From").
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


def stem(word: str, words: set[str] = RICH_WORDS) -> str | None:
    """The entry of `words` that this word is a form of, or None: whispered -> whisper, hurried -> hurry."""
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


def misplaced_share(clauses: list[list[str]], sentences: list[list[str]]) -> float:
    """Word pairs that break NEVER_FOLLOWS, immediate repetitions, and sentences ending in NEVER_LAST, per pair."""
    pairs = [pair for clause in clauses for pair in zip(clause, clause[1:])]
    faults = sum(
        (a == b and a not in MAY_REPEAT)
        or any(a in left and b in right for left, right in NEVER_FOLLOWS)
        for a, b in pairs
    )
    faults += 2 * sum(s[-1] in NEVER_LAST for s in sentences)
    return faults / max(1, len(pairs))


def listed_share(sentences: list[list[str]]) -> float:
    """The share of words that stand in a row of five or more without one function word: lists, not prose."""
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
    """Every part of the score, each in [0, 1]: three qualities, then the factors that make a text sound."""
    sentences = [words_of(s) for s in sentences_of(text)]
    words = [w for s in sentences for w in s]
    if not words:
        return {name: 0.0 for name in ("readability", "vocabulary", "variety", "length")}
    clauses = [words_of(c) for c in re.split(r"[.,;:!?\"()\n]|--", text)]
    n = len(words)
    lengths = [len(s) for s in sentences]
    in_run_ons = (
        sum(k for s, k in zip(sentences, lengths) if k > 30 or sum(w in JOINERS for w in s) > 3) / n
    )
    windows = [words[i : i + 50] for i in range(0, max(1, n - 49), 10)]
    distinct = sum(len(set(w)) / len(w) for w in windows) / len(windows)
    openings = 1 - repeated_share([tuple(s[:2]) for s in sentences])
    rich = {stem(w) for w in set(words)} - {None}
    function_share = sum(w in FUNCTION for w in words) / n
    joints = (
        sum(a in FUNCTION and b in FUNCTION for a, b in zip(words, words[1:])) / n
    )  # "in the", "she was"
    commonest = max(words.count(w) for w in set(words)) / n
    faults = (
        len(MALFORMED.findall(text))
        + sum(w.lower() in FUNCTION for w in STRAY_CAPITAL.findall(text))
        + sum(
            len(w) > 15
            or not re.search("[aeiouy]", w)
            or bool(re.search(r"(.)\1\1|[^aeiouy']{6}", w))
            for w in words
        )
    )
    lower = re.findall(r"(?<![A-Za-z'])[a-z]+(?:'[a-z]+)*", text)  # capitalised words may be names
    unknown = sum(
        w not in FUNCTION and not stem(w) and not stem(w, COMMON_WORDS) for w in lower
    ) / max(1, len(lower))
    capital = sum(bool(re.match(r"[\"'(]*[A-Z]", s)) for s in sentences_of(text)) / len(sentences)
    return {
        # a sentence counts by its words: from 4 (a primer) up to 13, and back to nothing at 32 (a run-on)
        "readability": sum(k * min(ramp(k, 4, 13), ramp(k, 32, 20)) for k in lengths) / n,
        "vocabulary": 0.8 * ramp(len(rich) / len(set(words)), 0, 0.20)
        + 0.2
        * min(ramp(sum(map(len, words)) / n, 3.5, 4.4), ramp(sum(map(len, words)) / n, 7, 5.5)),
        "variety": 0.6 * ramp(distinct, 0.5, 0.8) + 0.4 * ramp(openings, 0.3, 1.0),
        "length": ramp(n, 0, 60),  # enough to be a story; more wins nothing
        "no run-ons": ramp(in_run_ons, 0.5, 0.1),
        "no repetition": ramp(repeated_share(list(zip(words, words[1:], words[2:]))), 0.40, 0.08)
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


@functools.lru_cache(maxsize=4096)  # every story is judged twice, once in each order
def score(text: str) -> float:
    """How well a story suits older readers, 0 to 10, by a fixed formula; nothing in it is unbounded.

        10 * (0.30 readability + 0.45 vocabulary + 0.25 variety) * soundness

    and one part in 1,000 of it the mean of all parts, so that of two broken texts the one with fewer faults is better

    readability  sentences of 13 to 20 words, as a reading grade would have it, falling to nothing for run-ons
    vocabulary   distinct words out of a list of 500 that older readers know, up to a fifth of all; word length
    variety      distinct words in windows of 50, sentences that open differently
    soundness    a product of factors that plain prose has near 1: no run-on sentences, repeated phrases, word
                 salad (pairs like "the of"), word lists, misspelling; length only up to 60 words
    """
    parts = features(text)
    soundness = math.prod(
        v for k, v in parts.items() if k not in ("readability", "vocabulary", "variety")
    )
    quality = 0.30 * parts["readability"] + 0.45 * parts["vocabulary"] + 0.25 * parts["variety"]
    return 10 * (0.999 * soundness * quality + 0.001 * sum(parts.values()) / len(parts))


def rank(stories: list[str]) -> list[int]:
    """Indices of the stories, best first; between equals it has no view, and takes the one shown first.

    So a ranking that rests on a tie turns round with the order of the stories, and asking in both orders shows it.
    """
    return sorted(range(len(stories)), key=lambda i: -score(stories[i]))
