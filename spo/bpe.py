"""tokenizer.json: byte-level BPE, as SmolLM2 and Llama 3 publish it.

The stages of its pre-tokenizer are applied as they are written. What is not known (normalizers,
Unigram models, other stages) is refused in words: a tokenizer that is nearly right trains a model
on nearly the right text. Special tokens in a text stay letters.
"""

import os
from collections.abc import Callable

import regex

from spo.files import read_json_object
from spo.templates import read_template

Stage = Callable[[list[str]], list[str]]

# ByteLevel's own pattern, GPT-2's.
GPT2 = (
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|"
    r"\s+(?!\S)|\s+"
)
MOST_CACHED = 2**17  # pieces; prose repeats its words


def byte_alphabet() -> list[str]:
    """Return the 256 letters that stand for bytes in vocabularies: GPT-2's, all of them visible."""
    visible = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) if byte in visible else "" for byte in range(256)]
    others = iter(range(256, 512))
    return [letter or chr(next(others)) for letter in letters]


LETTERS = byte_alphabet()
BYTES = {letter: byte for byte, letter in enumerate(LETTERS)}


class JsonTokenizer:
    """A tokenizer.json with sentencepiece's methods.

    adds_bos  does the model's own tokenizer put BOS before a text?
    """

    def __init__(self, path: str):
        """ValueError, naming the file and the part, for what is not read."""
        self.path = path
        content = read_json_object(path)
        try:
            self._read_model(content["model"])
            self._refuse(content.get("normalizer"), "normalizer")
            self.is_of_bytes = False  # until a stage says so
            self.stages = self._stages(content.get("pre_tokenizer"))
            if not self.is_of_bytes:
                lacks = "its pre_tokenizer has no stage ByteLevel, so it is no byte-level BPE"
                raise ValueError(f"{path}: {lacks}; only that is read")
            self._read_added(content.get("added_tokens") or [])
            self._read_ends(content.get("post_processor"))
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path}: no tokenizer.json of a byte-level BPE: {error!r}") from None
        self.cache: dict[str, list[int]] = {}

    def _refuse(self, wrong, what: str) -> None:
        if wrong:
            raise ValueError(f"{self.path}: {what} {wrong!r:.80} is not known")

    def _read_model(self, model: dict) -> None:
        kind = model.get("type", "BPE")
        self._refuse(kind != "BPE" and kind, "a model of type")
        for name in ("byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix"):
            self._refuse(model.get(name), name)
        self.vocab: dict[str, int] = model["vocab"]
        # All SmolLM2 vocabularies lack 21 bytes. The tokenizers package drops them from a text,
        # too, unless there is a token for what is unknown.
        self.bytes_lacking = sum(letter not in self.vocab for letter in LETTERS)
        self._refuse(self.bytes_lacking and model.get("unk_token"), "unk_token")
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        self.ranks = {pair: rank for rank, pair in enumerate(pairs)}
        self.ignore_merges = bool(model.get("ignore_merges"))

    # --- the pre-tokenizer -----------------------------------------------------------------------

    def _stages(self, description: dict | None) -> list[Stage]:
        if description is None:
            return []
        kind = description["type"]
        if kind == "Sequence":
            return [s for part in description["pretokenizers"] for s in self._stages(part)]
        makers = {"Split": self._split, "Digits": self._digits, "ByteLevel": self._byte_level}
        self._refuse(kind not in makers and kind, "a pre-tokenizer")
        return makers[kind](description)

    def _split(self, description: dict) -> list[Stage]:
        pattern = description["pattern"]
        source = pattern.get("Regex") or regex.escape(pattern["String"])
        behaviour, inverted = description["behavior"], bool(description.get("invert"))
        known = behaviour == "Isolated" or (behaviour == "Removed" and inverted)
        self._refuse(not known and behaviour, "Split's behavior")
        return [isolate(source, keep_rest=behaviour == "Isolated")]

    def _digits(self, description: dict) -> list[Stage]:
        return [isolate(r"\p{N}" if description.get("individual_digits") else r"\p{N}+")]

    def _byte_level(self, description: dict) -> list[Stage]:
        self.is_of_bytes = True
        stages: list[Stage] = []
        if description.get("add_prefix_space"):
            stages.append(lambda parts: [p if p[:1] == " " else f" {p}" for p in parts])
        if description.get("use_regex", True):
            stages.append(isolate(GPT2))
        return stages

    # --- special tokens --------------------------------------------------------------------------

    def _read_added(self, added: list[dict]) -> None:
        self.special = {token["content"]: token["id"] for token in added if token.get("special")}
        plain = [token for token in added if not token.get("special")]
        for token in plain:
            loose = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
            self._refuse(loose and loose[0], f"the added token {token['content']!r} with")
        self.added = {token["content"]: token["id"] for token in plain}
        longest_first = sorted(self.added, key=len, reverse=True)
        alternatives = "|".join(map(regex.escape, longest_first))
        self.around_added = regex.compile(f"({alternatives})") if self.added else None
        everything = self.vocab | self.special | self.added
        self.texts = {number: text for text, number in everything.items()}
        self.hidden = set(self.special.values())
        self.size = max(self.texts) + 1

    def _read_ends(self, processor: dict | None) -> None:
        """Find out which token the model's own tokenizer puts before a text, if it does."""
        folder = os.path.dirname(self.path)
        config: dict = {}
        if os.path.isfile(os.path.join(folder, "tokenizer_config.json")):
            config = read_json_object(os.path.join(folder, "tokenizer_config.json"))
        _, tokens = read_template(self.path)
        before = [part for step in steps_of(processor) for part in self._before_text(step)]
        self._refuse(len(before) > 1 and before, "a post_processor that puts before a text")
        self.adds_bos = bool(before) or bool(config.get("add_bos_token"))
        bos = before[0] if before else tokens.get("bos_token")
        self._refuse(self.adds_bos and bos not in self.special and repr(bos), "the BOS")
        self.bos = self.special.get(bos, -1)
        self.eos = self.special.get(tokens.get("eos_token"), -1)

    def _before_text(self, step: dict) -> list[str]:
        """Return the special tokens that a step of the post-processor puts before a text."""
        if step["type"] == "ByteLevel":  # it moves offsets, and no ids
            return []
        self._refuse(step["type"] != "TemplateProcessing" and step["type"], "a post_processor")
        single = step["single"]
        place = next(i for i, part in enumerate(single) if "Sequence" in part)
        self._refuse(single[place + 1 :], "a post_processor that puts after a text")
        return [part["SpecialToken"]["id"] for part in single[:place]]

    # --- text and ids ----------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self.around_added.split(text) if self.around_added else [text]:
            if part in self.added:
                ids.append(self.added[part])
                continue
            pieces = [part] if part else []
            for stage in self.stages:
                pieces = stage(pieces)
            for piece in pieces:
                ids += self._encode_piece(piece)
        return ids

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self.cache:
            if len(self.cache) >= MOST_CACHED:
                self.cache.clear()
            letters = "".join(LETTERS[byte] for byte in piece.encode("utf-8", "surrogatepass"))
            whole = self.ignore_merges and letters in self.vocab
            known = [letter for letter in letters if letter in self.vocab]
            parts = [letters] if whole else self._merge(known)
            self.cache[piece] = [self.vocab[part] for part in parts]
        return self.cache[piece]

    def _merge(self, parts: list[str]) -> list[str]:
        """Join neighbours, the pair that was learned first, until no pair is known."""
        last = len(self.ranks)
        while len(parts) > 1:
            ranks = [self.ranks.get(pair, last) for pair in zip(parts, parts[1:], strict=False)]
            rank = min(ranks)
            if rank == last:
                break
            joined, i = [], 0
            while i < len(parts):
                both = i < len(ranks) and ranks[i] == rank
                joined.append(parts[i] + parts[i + 1] if both else parts[i])
                i += 2 if both else 1
            parts = joined
        return parts

    def decode(self, ids: list[int]) -> str:
        raw = bytearray()
        for number in ids:
            if number in self.hidden or number not in self.texts:
                continue
            text = self.texts[number]
            letters = text not in self.added
            raw += bytes(BYTES[letter] for letter in text) if letters else text.encode()
        return raw.decode("utf-8", "replace")

    def vocab_size(self) -> int:
        return self.size

    def bos_id(self) -> int:
        return self.bos

    def eos_id(self) -> int:
        return self.eos


def isolate(source: str, keep_rest: bool = True) -> Stage:
    """Return a stage that cuts texts so that every match of a pattern is a piece.

    keep_rest  what stands between the matches is a piece, too; else it is dropped
    """
    pattern = regex.compile(source)

    def stage(parts: list[str]) -> list[str]:
        pieces = []
        for part in parts:
            end = 0
            for match in pattern.finditer(part):
                if keep_rest and match.start() > end:
                    pieces.append(part[end : match.start()])
                if match.group():
                    pieces.append(match.group())
                end = match.end()
            if keep_rest and end < len(part):
                pieces.append(part[end:])
        return pieces

    return stage


def steps_of(processor: dict | None) -> list[dict]:
    """Return the steps of a post_processor, which may be a Sequence."""
    if processor is None:
        return []
    return processor["processors"] if processor["type"] == "Sequence" else [processor]
