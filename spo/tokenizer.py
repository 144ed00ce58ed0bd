"""Text <-> token ids, by a sentencepiece model, a tiktoken file (Llama 3) or a tokenizer.json."""

import base64
import functools
import math
import os
import re
import struct

from sentencepiece import SentencePieceProcessor

from spo.bpe import JsonTokenizer
from spo.files import atomic_write, check_sha256
from spo.parallel import note0
from spo.templates import MARKED, ChatTemplate, NoTemplate, read_template

FEW = 8  # embeddings without a piece that training may have added, such as [PAD]
ROUNDED_TO = (64, 128)  # a larger number of them, if they fill the vocabulary up to a multiple


# What belongs to a tokenizer of any kind: how messages are written, and which tokens are special.
CHAT_TEMPLATE = "chat_template.jinja"
BESIDE_A_TOKENIZER = ("tokenizer_config.json", "special_tokens_map.json", CHAT_TEMPLATE)


class Llama3:
    """Llama 3's tiktoken file, lines of (base64 piece, rank), with sentencepiece's methods."""

    PATTERN = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    RESERVED = 256  # special tokens after the pieces
    # The file does not name them, Meta's code does; 8 and 10 only from Llama 3.1 on.
    NAMED = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id"}
    NAMED |= {8: "eom_id", 9: "eot_id", 10: "python_tag"}
    # tiktoken fails on long runs of one kind; Meta cuts them so, and its ids are these.
    LONGEST_TEXT, LONGEST_RUN = 400_000, 25_000

    def __init__(self, path: str):
        from tiktoken import Encoding

        with open(path, "rb") as f:
            ranks = {
                base64.b64decode(piece, validate=True): int(rank)
                for piece, rank in map(bytes.split, f)
            }
        self.first = len(ranks)
        names = [f"<|special_{i}|>" for i in range(self.RESERVED)]
        for i, name in self.NAMED.items():
            names[i] = f"<|{name}|>"
        special = {name: self.first + i for i, name in enumerate(names)}
        self.special = {names[i]: self.first + i for i in self.NAMED}
        self.encoding = Encoding(
            "llama3", pat_str=self.PATTERN, mergeable_ranks=ranks, special_tokens=special
        )

    def encode(self, text: str) -> list[int]:
        parts = [text]
        if len(text) > self.LONGEST_RUN:
            starts = range(0, len(text), self.LONGEST_TEXT)
            parts = [text[start : start + self.LONGEST_TEXT] for start in starts]
            parts = [run for part in parts for run in self._runs(part)]
        return [i for part in parts for i in self.encoding.encode(part, disallowed_special=())]

    def _runs(self, text: str) -> list[str]:
        """Cut a text inside every run of white space, or of other characters, that is too long."""
        cuts = [0]
        for run in re.finditer(r"\s+|\S+", text):
            cuts += range(run.start() + self.LONGEST_RUN, run.end(), self.LONGEST_RUN)
        return [text[start:end] for start, end in zip(cuts, [*cuts[1:], None], strict=True)]

    def decode(self, ids: list[int]) -> str:
        return self.encoding.decode([i for i in ids if i < self.first])

    def vocab_size(self) -> int:
        return self.first + self.RESERVED

    def bos_id(self) -> int:
        return self.first

    def eos_id(self) -> int:
        return self.first + 1


class Tokenizer:
    """A sentencepiece model, a tiktoken file or a tokenizer.json, with encode and decode.

    path      a `.model` or `.json` file; ValueError if it is not one
    kind      "sentencepiece", "tiktoken" or "json"
    adds_bos  every sequence begins with BOS, but where a model's own tokenizer puts none
    """

    def __init__(self, path: str):
        if not os.path.isfile(path):
            raise ValueError(
                f"{path}: no such tokenizer file; name the model's tokenizer.model with --tokenizer"
            )
        self.path = path
        check_sha256(path)
        self.kind, self.model = self._open(path)
        if self.kind == "json" and self.model.bytes_lacking:
            say_that_bytes_are_dropped(path, self.model.bytes_lacking)
        self.adds_bos: bool = self.kind != "json" or self.model.adds_bos
        self.vocab_size: int = self.model.vocab_size()
        self.bos_id: int = self.model.bos_id()
        self.eos_id: int = self.model.eos_id()
        if self.adds_bos and self.bos_id < 0:
            raise ValueError(f"{path}: has no BOS, with which every sequence begins here")

    def _open(self, path: str) -> tuple[str, object]:
        if path.endswith(".json"):
            return "json", JsonTokenizer(path)
        try:
            return "tiktoken", Llama3(path)
        except ValueError:  # not lines of base64
            pass
        try:
            return "sentencepiece", SentencePieceProcessor(model_file=path)
        except (RuntimeError, OSError):
            raise ValueError(f"{path}: {self._what_it_is(path)}") from None

    def _what_it_is(self, path: str) -> str:
        with open(path, "rb") as f:
            if f.read(40).startswith(b"version https://git-lfs"):
                return "is a Git LFS pointer, and not the file; fetch it with `git lfs pull`"
        return "not a sentencepiece model (or damaged)"

    @property
    def story_end_id(self) -> int:
        """The id that ends a story in text tokenized here: as in llama2.c, the next story's BOS.

        A tokenizer.json ends it by its EOS. ValueError if it names none.
        """
        if self.kind != "json":
            return self.bos_id
        if self.eos_id < 0:
            raise ValueError(f"{self.path}: tokenizer_config.json names no eos_token beside it")
        return self.eos_id

    @functools.cached_property
    def special(self) -> dict[str, int]:
        """{special token: id}: those that a chat template may write."""
        if self.kind != "sentencepiece":
            return self.model.special
        ids = filter(self.model.is_control, range(self.vocab_size))
        return {self.model.id_to_piece(i): i for i in ids}

    def chat_template(self) -> ChatTemplate | NoTemplate | None:
        """Return the chat template beside the tokenizer.

        None, which is Llama 2's format, for a sentencepiece model without one.
        """
        source, tokens = read_template(self.path)
        if source:
            return ChatTemplate(self.path, source, tokens, self.special)
        return None if self.kind == "sentencepiece" else NoTemplate(self.path)

    def encode(self, text: str, bos: bool = False, eos: bool = False) -> list[int]:
        """Return the ids of a text. A special token counts as one only where a template wrote it.

        A template that writes BOS brings its own.
        """
        first, *rest = MARKED.split(text)
        ids = self.model.encode(first)
        ids += self._encode_marked(rest)
        if bos and self.adds_bos and ids[:1] != [self.bos_id]:
            ids = [self.bos_id, *ids]
        return [*ids, self.eos_id] if eos else ids

    def _encode_marked(self, parts: list[str]) -> list[int]:
        """Encode special token, text, special token, text ..."""
        ids: list[int] = []
        for token, text in zip(parts[::2], parts[1::2], strict=True):
            if token not in self.special:
                raise ValueError(f"{self.path}: {token!r} is none of its special tokens")
            ids.append(self.special[token])
            ids += self._encode_inside(text)
        return ids

    def _encode_inside(self, text: str) -> list[int]:
        """Encode a text that does not begin: without sentencepiece's space before it."""
        if self.kind != "sentencepiece" or not text:
            return self.model.encode(text)
        newline = self.model.encode("\n")
        return self.model.encode("\n" + text)[len(newline) :]

    def encode_after(self, prompt: str, text: str) -> list[int]:
        """Return the ids of a text that continues a prompt, and not of one that begins.

        sentencepiece puts a space before a text that begins: "," would become " ,". Behind a
        newline, which is a byte of its own and joins nothing, it does not. Behind an empty prompt
        the text begins.
        """
        if not prompt:  # a whole conversation may bring the BOS that is there already
            ids = self.encode(text)
            return ids[1:] if self.adds_bos and ids[:1] == [self.bos_id] else ids
        first, *rest = MARKED.split(text)
        return self._encode_inside(first) + self._encode_marked(rest)

    def decode_after(self, prompt_ids: list[int], ids: list[int]) -> str:
        """The text that ids add to a prompt's, its leading space included."""
        return self.decode(prompt_ids + ids)[len(self.decode(prompt_ids)) :]

    def decode(self, ids: list[int]) -> str:
        """Ids to text; BOS, EOS and other control ids print as nothing."""
        return self.model.decode(ids)

    def to_llama2c(self) -> bytes:
        """Return llama2.c's tokenizer.bin: the longest length, then each (score, length, bytes)."""
        pieces = []
        for i in range(self.vocab_size):
            piece = self.model.id_to_piece(i).replace(
                "\u2581", " "
            )  # sentencepiece's mark for a space
            if i in (self.bos_id, self.eos_id):
                piece = f"\n{piece}\n"  # as llama2.c writes them, so that no text can spell one
            pieces.append((self.model.get_score(i), piece.encode("utf-8")))
        longest = struct.pack("<I", max(len(piece) for _, piece in pieces))
        return longest + b"".join(
            struct.pack("<fI", score, len(piece)) + piece for score, piece in pieces
        )


@functools.cache  # once
def say_that_bytes_are_dropped(path: str, count: int) -> None:
    lacks = f"{path}: its vocabulary lacks {count} of the 256 bytes"
    note0(f"{lacks}; they are left out of texts, as the tokenizers package does")


def files_of_tokenizer(
    tokenizer: Tokenizer, folder: str, beside: bool = True
) -> dict[str, bytes | None]:
    """Return what to write beside a model: {name: content}, None for what the tokenizer lacks.

    beside  the files that say how messages are written, too
    ValueError if a file of another tokenizer is there already.
    """
    name = "tokenizer.json" if tokenizer.kind == "json" else "tokenizer.model"
    sources = {name: tokenizer.path}
    for other in BESIDE_A_TOKENIZER if beside else ():
        sources[other] = os.path.join(os.path.dirname(tokenizer.path), other)
    contents = {out: read_bytes(source) for out, source in sources.items()}
    for out, content in contents.items():
        path = os.path.join(folder, out)
        there = read_bytes(path)
        if content is None and b"chat_template" not in (there or b"") and out != CHAT_TEMPLATE:
            continue  # it changes nothing of how messages are read
        if there not in (None, content):
            other = "is of another tokenizer" if content else "would be read as this model's"
            raise ValueError(f"{path} {other}; choose another folder, or remove it")
    return contents


def copy_tokenizer(tokenizer: Tokenizer, folder: str, beside: bool = True) -> None:
    """Write tokenizer.model and, for run.c, tokenizer.bin into a folder; or tokenizer.json.

    With it go its SHA-256 and the files that say how messages are written. The arguments and
    errors are those of files_of_tokenizer.
    """
    contents = files_of_tokenizer(tokenizer, folder, beside)
    if tokenizer.kind == "sentencepiece":  # run.c reads no other
        contents["tokenizer.bin"] = tokenizer.to_llama2c()
    for out, content in contents.items():
        if content is not None:  # the tokenizer itself has its SHA-256 beside it
            is_checked = out in ("tokenizer.model", "tokenizer.json")
            with atomic_write(os.path.join(folder, out), len(content), is_checked) as f:
                f.write(content)


def read_bytes(path: str) -> bytes | None:
    """Return what a file holds; None if there is no file."""
    if not os.path.isfile(path):
        return None
    with open(path, "rb") as f:
        return f.read()


def find_tokenizer(checkpoint_path: str) -> str | None:
    """Return where a checkpoint's tokenizer is, None if it is nowhere.

    Of a file: beside it. Of a folder: in it, or in its folder "original", as in Llama 3's
    repositories. Meta's folders of weights have theirs one level up. A tokenizer.model comes before
    a tokenizer.json.
    """
    path = checkpoint_path.rstrip("/")
    places = [path, os.path.join(path, "original")]
    if not os.path.isdir(path):
        places = [os.path.dirname(path)]
    elif os.path.isfile(os.path.join(path, "params.json")):
        places.append(os.path.dirname(path))
    for place in places:
        for name in ("tokenizer.model", "tokenizer.json"):
            if os.path.isfile(os.path.join(place, name)):
                return os.path.join(place, name)
    return None


def tokenizer_path(checkpoint_path: str) -> str:
    """Return what find_tokenizer finds. ValueError, naming the place, if that is nothing."""
    found = find_tokenizer(checkpoint_path)
    if found is not None:
        return found
    if not os.path.isdir(checkpoint_path):
        beside = os.path.join(os.path.dirname(checkpoint_path), "tokenizer.model")
        raise ValueError(f"{beside}: no such tokenizer file; name it with --tokenizer")
    none = "has no tokenizer.model or tokenizer.json; give one with --tokenizer"
    raise ValueError(f"{checkpoint_path}: {none}")


def load_tokenizer(path: str, checkpoint_path: str, model) -> Tokenizer:
    """Return the tokenizer of a checkpoint: `path`, or tokenizer.model beside the checkpoint.

    A model may have a few more embeddings than there are pieces: one for padding, or as many as
    make a round number. It is told how many it may draw.

    model  has args, and is given `pieces`
    ValueError if there is no tokenizer, or if it is of another model.
    """
    tokenizer = Tokenizer(path or tokenizer_path(checkpoint_path))
    if not path and os.path.isdir(checkpoint_path):  # there may be several
        note0(f"tokenizer: {tokenizer.path}")
    vocab_size = model.args.vocab_size
    extra = vocab_size - tokenizer.vocab_size
    rounded = {math.ceil(tokenizer.vocab_size / size) * size for size in ROUNDED_TO}
    if extra > 0 and (extra <= FEW or vocab_size in rounded):
        more = f"{checkpoint_path} has {extra} more embeddings than {tokenizer.path} has pieces"
        note0(f"{more}; they are never drawn")
        model.pieces = tokenizer.vocab_size
    elif extra:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocab_size} pieces, "
            f"{checkpoint_path} was trained on {vocab_size}; "
            "give the tokenizer that belongs to it with --tokenizer"
        )
    return tokenizer
