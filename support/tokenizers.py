"""Other people's tokenizers: byte-level byte-pair encoding, computed as by `tokenizers`.

A tokenizer is what its tokenizer.json says: tokens that were added later are found in the text
first; what lies between them is normalized, cut into words, and each word, its bytes written as
symbols, is merged pair by pair (Sennrich et al., 2016; Radford et al., 2019). An older checkpoint
has vocab.json and merges.txt, which are read as the tokenizer.json that they stand for. A step that
is not computed here exactly is refused by its name. By intention unread: a tokenizer.json's
truncation and padding, which transformers replaces at every call, and what its post_processor puts
after a text, which each task here decides. A tokenizer.json's own pre_tokenizer counts, as in
`tokenizers`; for GPT2Tokenizer and Qwen2Tokenizer transformers 5 puts another in its place.
Characters newer than Unicode 16 may be letters here and unknown to `tokenizers`.
"""

import heapq
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path

import regex

from support.checkpoints import checkpoint_folder
from support.files import InputError, read_json, read_text

# ------------------------------------------------------------------------------- words of a text

# Contractions, words, numbers, signs, spaces (Radford et al., 2019).
GPT2_WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# What means the same to `regex` and to Oniguruma, the engine of `tokenizers`: characters, classes
# that hold no other class, groups, repetition, the end of a line. (\w does not.)
ESCAPE = r"\\(?:[sSdDrnt]|[pP]\{\^?\w+\}|u[0-9A-Fa-f]{4}|[^\w\s])"
SHARED_SYNTAX = regex.compile(
    rf"(?:{ESCAPE}|\[\^?(?:{ESCAPE}|[^][\\&]|&(?!&))+\]|\((?!\?)|\(\?(?:i?:|[=!>]|<[=!])|\)"
    r"|[*+?][+?]?|\{\d+(?:,\d*)?\}(?![+?])|[|.$]|[^][\\(){}*+?|.^$])*+"
)


def compile_shared(pattern: str) -> regex.Pattern:
    """The compiled pattern. Raises InputError if it has what the two engines may read otherwise."""
    if odd := pattern[SHARED_SYNTAX.match(pattern).end() :]:
        raise InputError(f"pre_tokenizer Split: its pattern is not supported from {odd[:40]!r} on")
    return regex.compile(pattern, regex.MULTILINE)


def cut(pattern: regex.Pattern, text: str) -> list[tuple[str, bool]]:
    """All of the text in pieces, each with whether the pattern matches it. Of an empty match right
    after another Oniguruma takes none, and looks on from the next character."""
    pieces, end, search = [], 0, 0
    while search <= len(text) and (match := pattern.search(text, search)):
        start, stop = match.span()
        if start == stop == end and pieces and pieces[-1][1]:
            search += 1
            continue
        if end < start:
            pieces.append((text[end:start], False))
        pieces.append((match.group(), True))
        search = end = stop
    if end < len(text):
        pieces.append((text[end:], False))
    return pieces


def attach(pieces: list[tuple[str, bool]], onwards: bool = False) -> list[str]:
    """Each match becomes part of the piece before it, or `onwards` of the piece after it, unless
    that has just taken one."""
    words, matched = [], False
    for piece, matches in reversed(pieces) if onwards else pieces:
        if matches and not matched and words:
            words[-1] = piece + words[-1] if onwards else words[-1] + piece
        else:
            words.append(piece)
        matched = matches
    return words[::-1] if onwards else words


def join_alike(pieces: list[tuple[str, bool]]) -> list[str]:
    """Neighbouring matches become one piece."""
    runs = groupby(pieces, key=lambda piece: piece[1])
    return ["".join(piece for piece, _ in run) for _, run in runs]


BEHAVIORS = {
    "Isolated": lambda pieces: [piece for piece, _ in pieces],
    "Removed": lambda pieces: [piece for piece, matches in pieces if not matches],
    "MergedWithPrevious": attach,
    "MergedWithNext": partial(attach, onwards=True),
    "Contiguous": join_alike,
}


def split_words(pattern: regex.Pattern, behavior: str, invert: bool, text: str) -> list[str]:
    """The pieces of a text as a Split makes them; those that `invert` turns are the others."""
    pieces = [(piece, matches != invert) for piece, matches in cut(pattern, text)]
    return [word for word in BEHAVIORS[behavior](pieces) if word]


def prefix_space(text: str) -> list[str]:
    return [text if text.startswith(" ") else " " + text]


def flatten(spec: dict | None, name: str) -> list[dict]:
    """The steps of a part of tokenizer.json, which may be a Sequence of them, or of Sequences."""
    if not spec:
        return []
    if spec["type"] != "Sequence":
        return [spec]
    return [step for part in spec[name] for step in flatten(part, name)]


def word_steps(spec: dict | None) -> list[Callable[[str], list[str]]]:
    """What a pre_tokenizer does, step by step: a text, or a piece of it, becomes pieces. Its last
    step must be ByteLevel. Raises InputError if it is not, or for one that is not known here."""
    steps = flatten(spec, "pretokenizers")
    kinds = [step["type"] for step in steps]
    if kinds[-1:] != ["ByteLevel"] or not {*kinds[:-1]} <= {"Split", "Digits"}:
        names = " + ".join(map(str, kinds)) or None
        raise InputError(f"pre_tokenizer {names} is no byte-level BPE known here")
    out = []
    for step in steps[:-1]:
        if step["type"] == "Digits":
            behavior = "Isolated" if step["individual_digits"] else "Contiguous"
            out.append(partial(split_words, regex.compile(r"\p{N}"), behavior, False))
            continue
        ((kind, pattern),) = step["pattern"].items()
        plain = regex.compile(regex.escape(pattern))
        compiled = compile_shared(pattern) if kind == "Regex" else plain
        if step["behavior"] not in BEHAVIORS:
            raise InputError(f"pre_tokenizer Split: behavior {step['behavior']!r} is not supported")
        out.append(partial(split_words, compiled, step["behavior"], bool(step.get("invert"))))
    if steps[-1].get("add_prefix_space"):
        out.append(prefix_space)
    if steps[-1].get("use_regex", True):
        out.append(partial(split_words, regex.compile(GPT2_WORDS), "Isolated", False))
    return out


# --------------------------------------------------------------------------------- added tokens


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in the text as it is written, before any merge. A special one is not:
    text is data. lstrip, rstrip: it takes the white space before it, or after it; single_word: only
    between characters that are no part of a word; normalized: found in the normalized text."""

    content: str
    id: int
    special: bool = False
    normalized: bool = True
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False


class TokenFinder:
    """Finds added tokens in a text; of two that begin at one place the longer."""

    def __init__(self, tokens: dict[str, AddedToken]) -> None:
        self.tokens = tokens
        longest = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest))) if tokens else None

    def split(self, text: str) -> Iterator[tuple[str, int | None]]:
        """The text in pieces, each with the id of the token that it is, or None."""
        end = 0
        for match in self.pattern.finditer(text) if self.pattern else ():
            token = self.tokens[match.group()]
            start, stop = match.span()
            if token.special:
                continue
            if token.single_word and (WORD_BEFORE.match(text, start) or WORD.match(text, stop)):
                continue
            if token.lstrip:
                start = max(end, SPACES_BEFORE.search(text[:start]).start())
            if token.rstrip:
                stop = SPACES.match(text, stop).end()
            if end < start:
                yield text[end:start], None
            yield text[start:stop], token.id
            end = stop
        if end < len(text):
            yield text[end:], None


WORD, WORD_BEFORE = regex.compile(r"\w"), regex.compile(r"(?<=\w)")
SPACES, SPACES_BEFORE = regex.compile(r"\s*"), regex.compile(r"(?<!\s)\s*\Z")


# ------------------------------------------------------------------------------------------- BPE


def byte_symbols() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte: itself if it prints, else from U+0100 on."""
    prints = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in prints]
    symbols = {chr(b): b for b in prints}
    symbols |= {chr(256 + i): b for i, b in enumerate(hidden)}
    return symbols


BYTE_OF = byte_symbols()
SYMBOL_OF = {b: symbol for symbol, b in BYTE_OF.items()}


def token_bytes(token: str) -> bytes:
    """What a token stands for: its symbols' bytes or, if not all are symbols, its own text."""
    if all(symbol in BYTE_OF for symbol in token):
        return bytes(BYTE_OF[symbol] for symbol in token)
    return token.encode()


class BytePairs:
    """Text to ids and back. Tokens that are special are never produced from text.

    spec: what tokenizer.json holds; size: how many ids the model has; special: further ids that
    are special if an added token has one, such as the model's end of text. Raises InputError for
    what is not supported, and whatever a file makes fail that is no byte-level BPE's.
    """

    def __init__(self, spec: dict, size: int, special: set[int | None] = frozenset()) -> None:
        # 1) The vocabulary and the order of merges.
        model = spec["model"]
        check_model(model)
        pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
        self.vocab = model["vocab"]
        self.rank = {(a, b): rank for rank, (a, b) in enumerate(pairs)}
        made = {symbol for a, b in self.rank for symbol in (a, b, a + b)}
        if unknown := made - (self.vocab.keys() - {""}):
            raise ValueError(f"its vocabulary lacks {min(unknown)!r}, which a merge makes")
        self.unknown, self.fuse_unknown = model.get("unk_token") or None, model.get("fuse_unk")
        if self.unknown and self.unknown not in self.vocab:
            raise ValueError(f"its vocabulary lacks {self.unknown!r}, its unk_token")
        # 2) Added tokens, found before the normalizer or after it.
        added = [t for t in spec.get("added_tokens") or [] if t["content"]]
        names = {field.name for field in fields(AddedToken)}
        added = [AddedToken(**{n: v for n, v in t.items() if n in names}) for t in added]
        ids = [*self.vocab.values()]
        check_ids(added, self.vocab)
        self.composes = composes(spec.get("normalizer"))
        as_written, normalized = {}, {}
        token_of = {i: symbol for symbol, i in self.vocab.items()}
        hidden = set()
        for token in sorted(added, key=lambda token: not token.special):
            i = self.vocab.get(token.content, token.id)
            is_special = token.special or i in special
            token = AddedToken(**vars(token) | dict(id=i, special=is_special))
            form = self.normalize(token.content) if token.normalized else token.content
            token_of[i] = form
            if is_special:
                hidden.add(i)
            else:
                ids.append(i)
            (normalized if token.normalized else as_written).setdefault(form, token)
        self.as_written, self.normalized = TokenFinder(as_written), TokenFinder(normalized)
        self.bytes_of = {i: token_bytes(t) for i, t in token_of.items() if i not in hidden}
        # 3) Words, and what goes before a text.
        kept = {s: i for s, i in self.vocab.items() if i not in hidden}
        self.whole = kept if model.get("ignore_merges") else {}
        self.steps = word_steps(spec["pre_tokenizer"])
        self.start = leading_ids(spec.get("post_processor"))
        for step in flatten(spec.get("decoder"), "decoders"):
            if step["type"] != "ByteLevel":
                raise InputError(f"decoder {step['type']} is no byte-level BPE known here")
        if not all(type(i) is int and 0 <= i < size for i in [*ids, *self.start]):
            raise ValueError(f"it has ids that are not whole numbers below {size}")
        self.word_ids = lru_cache(2**16)(self._word_ids)

    def normalize(self, text: str) -> str:
        return unicodedata.normalize("NFC", text) if self.composes else text

    def encode(self, text: str) -> list[int]:
        """The ids of a text. Half a surrogate pair counts as U+FFFD."""
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        ids = []
        for part, token in self.as_written.split(text):
            if token is not None:
                ids.append(token)
                continue
            for piece, token in self.normalized.split(self.normalize(part)):
                if token is not None:
                    ids.append(token)
                    continue
                for word in self._words(piece):
                    ids += self.word_ids(word)
        return ids

    def _words(self, text: str) -> list[str]:
        words = [text]
        for step in self.steps:
            words = [piece for word in words for piece in step(word)]
        return words

    def _word_ids(self, word: str) -> list[int]:
        """A word in the vocabulary is taken whole if merges are to be ignored for it. A byte that
        the vocabulary lacks is left out, or becomes the unknown token if there is one."""
        word = "".join(SYMBOL_OF[b] for b in word.encode())
        if word in self.whole:
            return [self.whole[word]]
        symbols, missed = [], False
        for symbol in word:
            if symbol in self.vocab:
                symbols.append(symbol)
            elif self.unknown and not (missed and self.fuse_unknown):
                symbols.append(self.unknown)
            missed = symbol not in self.vocab
        return [self.vocab[symbol] for symbol in self._merge(symbols)]

    def _merge(self, symbols: list[str]) -> list[str]:
        """Again and again, the pair that comes first in the order of merges, the leftmost of equal
        ones, becomes one symbol. The pairs wait in a heap, so that a long word takes no longer than
        its share; one whose symbols have merged with others since is passed over."""
        n = len(symbols)
        symbols = [*symbols, ""]  # the end, which is in no pair
        left, right = [*range(-1, n)], [*range(1, n + 1), n]
        heap = []

        def note(i: int) -> None:
            pair = symbols[i], symbols[right[i]]
            if pair in self.rank:
                heapq.heappush(heap, (self.rank[pair], i, pair))

        for i in range(n):
            note(i)
        while heap:
            _, i, pair = heapq.heappop(heap)
            j = right[i]
            if pair != (symbols[i], symbols[j]):
                continue
            symbols[i], symbols[j] = symbols[i] + symbols[j], ""
            right[i] = right[j]
            left[right[j]] = i
            note(i)
            if left[i] >= 0:
                note(left[i])
        return [symbol for symbol in symbols if symbol]

    def decode(self, ids: list[int]) -> str:
        """Special tokens, and ids of no token, are left out."""
        data = b"".join(self.bytes_of.get(i, b"") for i in ids)
        return data.decode("utf-8", errors="replace")


def check_model(model: dict) -> None:
    """Raise InputError, naming it, if a model of tokenizer.json has what is not supported."""
    if model.get("type") not in ("BPE", None):
        raise InputError(f"model {model['type']} is not supported; use a byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(name):
            raise InputError(f"the BPE sets {name} to {model[name]!r}: not supported")
    if model.get("byte_fallback") and BYTE_OF.keys() - model["vocab"].keys():
        raise InputError("the BPE sets byte_fallback for bytes that it lacks: not supported")


def check_ids(added: list[AddedToken], vocab: dict[str, int]) -> None:
    """Raise InputError if an added token has another id than `tokenizers` gives it, which counts on
    from the vocabulary's size and does not read it."""
    free = len(vocab)
    for token in sorted(added, key=lambda token: token.id):
        i = vocab.get(token.content, free)
        if i != token.id and not token.special:
            what = f"added token {token.content!r} has id {token.id}"
            raise InputError(f"{what}, but {i} with tokenizers: not supported")
        free = max(free, token.id + 1)


def composes(normalizer: dict | None) -> bool:
    """Whether a normalizer makes the normal form NFC. Raises InputError for any other: of NFD, NFKC
    and NFKD Python knows characters that `tokenizers` does not."""
    kinds = [step["type"] for step in flatten(normalizer, "normalizers")]
    for kind in kinds:
        if kind != "NFC":
            raise InputError(f"normalizer {kind} is not supported; use NFC")
    return bool(kinds)


def leading_ids(post_processor: dict | None) -> list[int]:
    """The special tokens that a post_processor puts before a text. Raises InputError."""
    ids = []
    for step in flatten(post_processor, "processors"):
        if step["type"] in ("RobertaProcessing", "BertProcessing"):
            ids.append(step["cls"][1])
        elif step["type"] == "TemplateProcessing":
            for piece in step["single"]:
                if "SpecialToken" not in piece:  # the text begins here
                    break
                ids += step["special_tokens"][piece["SpecialToken"]["id"]]["ids"]
        elif step["type"] != "ByteLevel":  # which only says where in the text a token is
            raise InputError(f"post_processor {step['type']} is not supported")
    return ids


# ----------------------------------------------------------------------------------------- files


def read_optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}


def special_names(settings: dict) -> set[str]:
    """The tokens that tokenizer_config.json or special_tokens_map.json call bos_token and so on."""
    names = set()
    for name, value in settings.items():
        if name.endswith(("_token", "special_tokens")):
            for token in value if isinstance(value, list) else [value]:
                token = token.get("content") if isinstance(token, dict) else token
                names |= {token} if isinstance(token, str) else set()
    return names


def old_layout(folder: Path, settings: dict) -> dict:
    """vocab.json and merges.txt as the tokenizer.json that they stand for. What no merge makes is
    special there: nothing else says what it is."""
    kind = settings.get("tokenizer_class")
    if kind and kind.removesuffix("Fast") not in ("GPT2Tokenizer", "RobertaTokenizer"):
        raise InputError(f"{folder} holds no tokenizer.json, which a {kind} needs")
    vocab = read_json(folder / "vocab.json")
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [m.split(" ") for m in lines if m and not m.startswith("#version")]
    made = BYTE_OF.keys() | {a + b for a, b in merges}
    special = [dict(content=s, id=i, special=True) for s, i in vocab.items() if s not in made]
    prefix = bool(settings.get("add_prefix_space"))
    words = [dict(type="ByteLevel", add_prefix_space=prefix)]
    # Only where digits are not on their own can one follow a space (Ġ) or a digit.
    if not any(re.fullmatch(r"[Ġ\d]\d", s) for s in vocab):
        words.insert(0, dict(type="Digits", individual_digits=True))
    words = dict(type="Sequence", pretokenizers=words)
    return dict(model=dict(vocab=vocab, merges=merges), pre_tokenizer=words, added_tokens=special)


def read_spec(folder: Path) -> dict:
    """tokenizer.json, or what older files say, with the tokens that the files beside it add."""
    settings = read_optional(folder / "tokenizer_config.json")
    older = read_optional(folder / "special_tokens_map.json")
    named = special_names(settings) | special_names(older)
    if (folder / "tokenizer.json").exists():
        spec = read_json(folder / "tokenizer.json")
        last = flatten(spec["pre_tokenizer"], "pretokenizers")[-1:]
        prefix = bool(last and last[0].get("add_prefix_space"))
        if settings.get("add_prefix_space", prefix) != prefix:
            raise InputError("tokenizer_config.json sets another add_prefix_space: not supported")
    elif (folder / "vocab.json").exists():
        spec = old_layout(folder, settings)
    else:
        raise InputError(f"{folder} holds no tokenizer.json and no vocab.json")
    if settings.get("add_bos_token") and not leading_ids(spec.get("post_processor")):
        raise InputError("tokenizer_config.json sets add_bos_token: only a post_processor may")
    beside = read_optional(folder / "added_tokens.json").items()
    tokens = {s: dict(content=s, id=i, normalized=s not in named) for s, i in beside}
    tokens |= {token["content"]: token for token in spec.get("added_tokens") or []}
    later = settings.get("added_tokens_decoder") or {}
    tokens |= {token["content"]: token | {"id": int(i)} for i, token in later.items()}
    for content in tokens.keys() & named:
        tokens[content] = tokens[content] | {"special": True}
    return spec | {"added_tokens": [*tokens.values()]}


def read_tokenizer(name: str | Path, size: int, special: set[int | None]) -> BytePairs:
    """The tokenizer of a checkpoint folder or hub name; size and special: see BytePairs. Raises
    InputError if it has none, or one that is no byte-level BPE known here."""
    folder = checkpoint_folder(name)
    try:
        return BytePairs(read_spec(folder), size, special)
    except InputError as error:
        if str(folder) in str(error):
            raise
        raise InputError(f"the tokenizer in {folder}: {error}") from None
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {error!r}") from error
    except (RecursionError, regex.error) as error:
        raise InputError(f"the tokenizer in {folder} cannot be read: {error!r}") from error
