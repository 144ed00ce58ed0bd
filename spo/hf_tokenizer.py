"""A sentencepiece model as the tokenizer.json that transformers reads, without protobuf."""

from spo.tokenizer import Tokenizer

SPACE = "\u2581"  # sentencepiece's mark for a space
PROBES = ("\ufb01", "\u212b", "\uff21", "\u00bd")  # what NFKC, another normalization, would change


def tokenizer_json(tokenizer: Tokenizer) -> dict | None:
    """Return the content of a tokenizer.json with the same ids for every text; None if the model
    normalizes its text in a way that is not known here.

    tokenizer  of the kind "sentencepiece", a BPE with byte pieces
    """
    model = tokenizer.model
    if any(model.decode(model.encode(text)) != text for text in PROBES):
        return None
    pieces = [model.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    special = [i for i in range(len(pieces)) if model.is_control(i) or model.is_unknown(i)]
    added = [{"id": i, "content": pieces[i], "special": True} | PLAIN for i in special]
    bos = pieces[tokenizer.bos_id]
    begin = [{"SpecialToken": {"id": bos, "type_id": 0}}]
    text = [{"Sequence": {"id": "A", "type_id": 0}}]
    other = [{"Sequence": {"id": "B", "type_id": 1}}]
    unknown = next((pieces[i] for i in special if model.is_unknown(i)), None)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "Sequence", "normalizers": normalizers_of(model)},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": begin + text,
            "pair": begin + text + other,
            "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges_of(model, pieces),
        },
    }


PLAIN = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)


def normalizers_of(model) -> list[dict]:
    """Return what the model does to a text before its pieces, found out by asking it."""
    steps: list[dict] = []
    if model.decode(model.encode("a  b")) == "a b":  # remove_extra_whitespaces
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if model.id_to_piece(model.encode("a")[0]).startswith(SPACE):  # add_dummy_prefix
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return steps


def merges_of(model, pieces: list[str]) -> list[list[str]]:
    """Return the pairs that BPE may join, best first: sentencepiece keeps only what they become.

    A piece with a higher score is joined earlier.
    """
    known = {piece: i for i, piece in enumerate(pieces) if not model.is_byte(i)}
    merges = []
    for i, piece in enumerate(pieces):
        if len(piece) < 2 or model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in known and right in known:
                merges.append((-model.get_score(i), known[left], known[right], left, right))
    return [[left, right] for *_, left, right in sorted(merges)]
