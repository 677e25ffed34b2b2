"""support/tokenizers.py against `tokenizers` and transformers: every kind of vocabulary on 10,000
random strings, every option of tokenizer.json that is computed, and those that are refused.

pytest tests/test_tokenizers.py
"""

import json
import random
import re
import unicodedata
from pathlib import Path

import pytest
from conftest import need_shared
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Reference
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence, Split
from transformers import AutoTokenizer, GPT2Tokenizer

from data import Tokenizer
from model import Config
from support.checkpoints import our_config
from support.files import InputError
from support.tokenizers import byte_symbols, read_tokenizer

CONFIG = Config(**our_config(
    dict(model_type="gpt2", vocab_size=60000, n_embd=4, n_layer=1, n_head=1, n_positions=8,
         layer_norm_epsilon=1e-5)
))  # fmt: skip
PLAIN, BYTES = ByteLevel(add_prefix_space=False), ByteLevel(False, use_regex=False)
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")
NORMAL = normalizers.NFC()
WORDS = {
    "gpt2": PLAIN,
    "digits": Sequence([Digits(individual_digits=True), PLAIN]),
    "llama3": Sequence([Split(Regex(LLAMA3_WORDS), "isolated"), BYTES]),
    "qwen2": Sequence([Split(Regex(QWEN2_WORDS), "isolated"), BYTES]),
}
TEXTS = [
    "It's we'LL they've I'd; don't, ISN'T 'tis the café naïve £20-25 for 1234567 at 9.30pm",
    "two  spaces   three \n\n\n lines \t\ttabs \r\n end  — e\u0301 中文 हिन्दी ½ ² Ⅷ 🍕👩‍👩‍👧",
    "at  7   8    9 or   more of 0123456789 0123456789",
]
POOLS = (
    " ",
    " \t\n\r\u00a0\u3000",
    "abcdestT",
    "theando",
    "0123456789",
    "'sdmtvrelſK",
    "!?.,-_<|>[]",
    "éßñçÅ",
    "שלםر",
    "中文か",
    "🍕👩\u200d🏽\ufe0f",
    "\u0301\u0323\u200b½²Ⅷ٣",
    "\u1100\u1161\u11a8가\u212b",
)
ADDED = [
    AddedToken("[NAME]", special=False),
    AddedToken("[NAM", special=False, normalized=False),
    AddedToken("the", special=False, single_word=True),
    AddedToken("<l>", special=False, lstrip=True),
    AddedToken("<r>", special=False, rstrip=True, normalized=False),
    AddedToken("e\u0301t", special=False),
    AddedToken("  ", special=False),
    AddedToken("12", special=False, normalized=False, lstrip=True, rstrip=True),
    AddedToken("中", special=False),
    AddedToken("é", special=False, normalized=False),
    AddedToken("<|end|>", special=True),
    AddedToken("end", special=False, normalized=False),
]
PIECES = [token.content for token in ADDED] + ["<|en", "\u00e9t", " ", "\n"]


def random_texts(count: int, pieces: tuple | list = ()) -> list[str]:
    """Texts of up to 40 parts: characters of all planes that Unicode 14 names, and `pieces`. Newer
    characters are letters to the one library and unknown to the other."""
    rng, texts = random.Random(0), []
    for _ in range(count):
        parts = []
        for _ in range(rng.randrange(1, 41)):
            kind = rng.random()
            if kind < 0.1:
                c = chr(rng.randrange(rng.choice((0x80, 0x800, 0x10000, 0x110000))))
                parts.append("" if unicodedata.category(c) in ("Cs", "Cn") else c)
            elif pieces and kind < 0.4:
                parts.append(rng.choice(pieces))
            else:
                parts.append(rng.choice(rng.choice(POOLS)))
        texts.append("".join(parts))
    return texts


def trained(words: pre_tokenizers.PreTokenizer, **options) -> Reference:
    """A BPE of 500 symbols by `tokenizers`; special tokens are text to it, as they are here."""
    bpe = Reference(models.BPE(**options))
    bpe.pre_tokenizer, bpe.decoder = words, decoders.ByteLevel()
    bpe.encode_special_tokens = True
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=sorted(byte_symbols()), show_progress=False
    )
    bpe.train_from_iterator(TEXTS * 20, trainer)
    return bpe


def from_merges(merges: list[tuple[str, str]], more: tuple | list = (), **options) -> Reference:
    """The 256 bytes, what the merges make, and `more` symbols."""
    symbols = dict.fromkeys([*byte_symbols(), *(a + b for a, b in merges), *more])
    vocab = {symbol: i for i, symbol in enumerate(symbols)}
    bpe = Reference(models.BPE(vocab, merges, **options))
    bpe.pre_tokenizer, bpe.decoder = PLAIN, decoders.ByteLevel()
    return bpe


def saved(bpe: Reference, folder: Path, config: Config = CONFIG, **changes) -> Tokenizer:
    """The project's tokenizer from the file that `bpe` saves, with other entries in its model."""
    bpe.save(str(folder / "tokenizer.json"))
    spec = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    spec["model"] |= changes
    (folder / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    return Tokenizer.load(folder, config)


def agree(ours: Tokenizer, theirs: Reference, texts: list[str]) -> None:
    """The same ids for every text, and the same text from them."""
    for text, encoded in zip(
        texts, theirs.encode_batch(texts, add_special_tokens=False), strict=True
    ):
        assert ours.encode(text) == encoded.ids, text
        assert ours.decode(encoded.ids) == theirs.decode(encoded.ids), text


# ---------------------------------------------------------------------- 10,000 strings of each kind


@pytest.mark.parametrize("kind", ["gpt2", "digits", "llama3", "qwen2", "neox", "added"])
def test_random_strings(tmp_path, kind):
    bpe = trained(WORDS.get(kind, PLAIN), ignore_merges=kind == "llama3")
    if kind in ("qwen2", "neox", "added"):
        bpe.normalizer = NORMAL
    if kind == "neox":  # its runs of spaces are added tokens
        bpe.add_tokens([AddedToken(" " * n, special=False) for n in range(24, 1, -1)])
    if kind == "added":
        bpe.add_tokens(ADDED)
    ours = saved(bpe, tmp_path)
    agree(ours, bpe, ["", *TEXTS, *random_texts(10_000, PIECES if kind == "added" else ())])


def test_random_strings_with_gpt2s_own_vocabulary():
    folder = need_shared("models/gpt2-tokenizer")
    bpe = Reference(models.BPE.from_file(*(str(folder / n) for n in ("vocab.json", "merges.txt"))))
    bpe.pre_tokenizer, bpe.decoder = PLAIN, decoders.ByteLevel()
    agree(Tokenizer.load(folder, CONFIG), bpe, random_texts(10_000))


def test_random_merges_in_any_order(tmp_path):
    """Merges that come too late, that make one symbol in two ways, or that nothing reaches."""
    rng = random.Random(0)
    for _ in range(60):
        symbols, merges = list("abc"), {}
        for _ in range(25):
            a, b = rng.choice(symbols), rng.choice(symbols)
            symbols.append(a + b)
            merges[a, b] = None
        merges = list(merges)
        rng.shuffle(merges)
        bpe = from_merges(merges, ignore_merges=rng.random() < 0.3)
        ours = saved(bpe, tmp_path)
        agree(ours, bpe, ["".join(rng.choices("abc", k=rng.randrange(1, 30))) for _ in range(100)])


# -------------------------------------------------------------------------------------------- model


def test_a_word_of_the_vocabulary_is_taken_whole_if_merges_are_ignored(tmp_path):
    for ignore in (True, False):
        bpe = from_merges([("Ġ", "v")], ["Ġviá»ĩc"], ignore_merges=ignore)
        ours = saved(bpe, tmp_path)
        agree(ours, bpe, ["no việc", " việc", "việc"])
        assert (len(ours.encode(" việc")) == 1) == ignore
        assert ours.decode([bpe.token_to_id("Ġviá»ĩc")]) == " việc"


def test_a_word_that_no_merge_reaches_is_not_made(tmp_path):
    bpe = from_merges([("z", "y"), ("zy", "z"), ("zyz", "z"), ("zyzz", "y")])
    agree(saved(bpe, tmp_path), bpe, ["zyzzy"])
    assert bpe.encode("zyzzy").tokens == ["zyz", "zy"]


@pytest.mark.parametrize("fuse", [True, False])
def test_an_unknown_token_stands_for_bytes_that_are_missing(tmp_path, fuse):
    vocab = {"<unk>": 0, "a": 1, "b": 2, "ab": 3}
    bpe = Reference(models.BPE(vocab, [("a", "b")], unk_token="<unk>", fuse_unk=fuse))
    bpe.pre_tokenizer, bpe.decoder = PLAIN, decoders.ByteLevel()
    agree(saved(bpe, tmp_path), bpe, ["abcc", "ccabcdab", "a é b", "", "éé"])


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(dropout=0.1), "the BPE sets dropout to 0.1: not supported"),
        (dict(continuing_subword_prefix="##"), "the BPE sets continuing_subword_prefix to '##'"),
        (dict(end_of_word_suffix="</w>"), "the BPE sets end_of_word_suffix to '</w>'"),
        (dict(byte_fallback=True, vocab={"a": 0}, merges=[]), "the BPE sets byte_fallback for"),
        (dict(type="WordPiece"), "model WordPiece is not supported"),
        (dict(unk_token="<unk>"), "its vocabulary lacks '<unk>', its unk_token"),
        (dict(merges=[["q", "q"]]), "its vocabulary lacks 'qq', which a merge makes"),
    ],
)
def test_other_models_are_refused_by_name(tmp_path, changes, message):
    with pytest.raises(InputError, match=message) as caught:
        saved(from_merges([]), tmp_path, **changes)
    assert str(tmp_path) in str(caught.value)


def test_options_that_change_nothing_are_taken(tmp_path):
    changes = dict(dropout=0.0, continuing_subword_prefix="", end_of_word_suffix="",
                   byte_fallback=True, unk_token="a", fuse_unk=True)  # fmt: skip
    bpe = from_merges([("a", "b")])
    agree(saved(bpe, tmp_path, **changes), bpe, TEXTS)


# -------------------------------------------------------------------------------------------- words

BEHAVIORS = ["isolated", "removed", "merged_with_previous", "merged_with_next", "contiguous"]
PATTERNS = [Regex(r"\d"), Regex(r"\p{N}{1,3}"), Regex(r"\s+"), Regex(r"[\r\n]+"), Regex(r"\s+$"),
            " ", "'", "a", Regex(r"\s*"), Regex(r"(?=[a-z])|[a-z\d]"),
            Regex(r"(?i:'S|ſ|k)|\P{L}++"), Regex(r"[^\s\p{L}&]+|(?<=a).|\p{Lu}+?")]  # fmt: skip


@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("behavior", BEHAVIORS)
def test_ways_to_split(tmp_path, behavior, invert):
    """Also by patterns that do not cover the text, and by those that match nothing between two
    characters."""
    bpe = trained(PLAIN)
    for pattern in PATTERNS:
        bpe.pre_tokenizer = Sequence([Split(pattern, behavior, invert), BYTES])
        agree(saved(bpe, tmp_path), bpe, [*TEXTS, "a  b--\n\n--''aa'", *random_texts(150)])


@pytest.mark.parametrize(
    "words",
    [
        ByteLevel(add_prefix_space=True),
        BYTES,
        Sequence([Digits(individual_digits=False), PLAIN]),
        Sequence([Digits(individual_digits=True), ByteLevel(add_prefix_space=True)]),
        Sequence([Split(Regex(LLAMA3_WORDS), "isolated"), PLAIN]),
        Sequence([Sequence([Split(" ", "removed"), Digits()]), Sequence([BYTES])]),
    ],
)
def test_other_ways_with_words(tmp_path, words):
    bpe = trained(words)
    bpe.add_tokens(ADDED)  # the space before a text is before each part of it
    agree(saved(bpe, tmp_path), bpe, ["", " ", "a", *TEXTS, *random_texts(500, PIECES)])


@pytest.mark.parametrize(
    "pattern, odd",
    [(r"\w+", r"\w+"), (r"a\h", r"\h"), ("^a", "^a"), ("[a[bc]]", "[a[bc]]"), ("x[a&&b]", "[a&&b]"),
     (r"\bno", r"\bno"), ("a{2}+", "{2}+"), (r"\Aa", r"\Aa"), ("(?m:.)", "(?m:.)"),
     (r"[^\w]", "[")],
)  # fmt: skip
def test_patterns_that_two_engines_read_otherwise_are_refused(tmp_path, pattern, odd):
    bpe = from_merges([])
    bpe.pre_tokenizer = Sequence([Split(Regex(pattern), "isolated"), BYTES])
    shown = re.escape(repr(odd)[:-1])
    with pytest.raises(InputError, match=f"Split: its pattern is not supported from {shown}"):
        saved(bpe, tmp_path)


# ------------------------------------------------------------------------ normalizer, ends, decoder


@pytest.mark.parametrize("normalizer", [NORMAL, normalizers.Sequence([NORMAL])])
def test_nfc(tmp_path, normalizer):
    bpe = trained(PLAIN)
    bpe.normalizer = normalizer
    agree(saved(bpe, tmp_path), bpe, ["e\u0301 \u212b ﬁ", *TEXTS])


@pytest.mark.parametrize(
    "part, value, message",
    [
        ("normalizer", normalizers.NFKC(), "normalizer NFKC is not supported; use NFC"),
        ("normalizer", normalizers.Lowercase(), "normalizer Lowercase is not supported"),
        ("normalizer", normalizers.Sequence([NORMAL, normalizers.Strip()]), "normalizer Strip is"),
        ("decoder", decoders.Metaspace(), "decoder Metaspace is no byte-level BPE known here"),
    ],
)
def test_other_parts_are_refused_by_name(tmp_path, part, value, message):
    bpe = from_merges([])
    setattr(bpe, part, value)
    with pytest.raises(InputError, match=message):
        saved(bpe, tmp_path)


@pytest.mark.parametrize("processor", [processors.RobertaProcessing, processors.BertProcessing])
def test_the_first_token_of_a_text_by_other_processors(tmp_path, processor):
    bpe = from_merges([], ["<s>", "</s>"])
    bpe.post_processor = processor(("</s>", 257), ("<s>", 256))
    assert saved(bpe, tmp_path).start == [256] == bpe.encode("a").ids[:1]


def test_truncation_and_padding_are_the_tasks_own(tmp_path):
    bpe = trained(PLAIN)
    ids = bpe.encode(TEXTS[0]).ids
    bpe.enable_truncation(3)
    bpe.enable_padding(length=400)
    assert saved(bpe, tmp_path).encode(TEXTS[0]) == ids


# ------------------------------------------------------------------------------------- added tokens


def test_the_models_own_end_of_text_is_never_produced_from_text(tmp_path):
    """Some files do not call it special."""
    bpe = from_merges([])
    bpe.add_tokens([AddedToken("<end>", special=False)])
    assert saved(bpe, tmp_path).encode("<end>") == [256]
    ours = saved(bpe, tmp_path, Config(**vars(CONFIG) | dict(eos=256)))
    assert 256 not in ours.encode("<end>") and ours.decode([*ours.encode("<end>"), 256]) == "<end>"


@pytest.mark.parametrize("content, i, theirs", [("[NAME]", 300, 256), ("b", 256, 65)])
def test_an_added_token_whose_id_tokenizers_would_not_give_it_is_refused(
    tmp_path, content, i, theirs
):
    from_merges([]).save(str(tmp_path / "tokenizer.json"))
    spec = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    spec["added_tokens"] = [dict(id=i, content=content, **flags)]
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec), "utf-8")
    bpe = Reference.from_file(str(tmp_path / "tokenizer.json"))
    assert bpe.encode(content).ids == [theirs]
    with pytest.raises(InputError, match=f"has id {i}, but {theirs} with tokenizers"):
        Tokenizer.load(tmp_path, CONFIG)


@pytest.mark.parametrize("old", [True, False], ids=["old layout", "tokenizer.json"])
def test_tokens_that_transformers_adds(tmp_path, old):
    bpe = trained(PLAIN)
    bpe.model.save(str(tmp_path))
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    theirs = GPT2Tokenizer(vocab=files[0], merges=files[1])
    theirs.add_tokens(["[NAME]", AddedToken("<l>", lstrip=True)])
    theirs.save_pretrained(tmp_path)
    if old:  # as saved before there was a tokenizer.json
        added = {
            str(token["id"]): {name: value for name, value in token.items() if name != "id"}
            for token in json.loads((tmp_path / "tokenizer.json").read_text())["added_tokens"]
        }
        (tmp_path / "tokenizer.json").unlink()
        settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
        settings["added_tokens_decoder"] = added
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = Tokenizer.load(tmp_path, CONFIG), AutoTokenizer.from_pretrained(tmp_path)
    for text in ["[NAME] is a pub.", "a  <l>[NAME]b", *random_texts(300, ["[NAME]", " <l>"])]:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text) == ids, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_added_tokens_json(tmp_path):
    """The oldest place for them; a token that another file calls by a special name is special."""
    bpe = trained(PLAIN)
    bpe.model.save(str(tmp_path))
    size = bpe.get_vocab_size()
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[NAME]": size, "[PAD]": size + 1}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(dict(pad_token="[PAD]")))
    ours = Tokenizer.load(tmp_path, CONFIG)
    assert ours.encode("[NAME]") == [size] and ours.decode([size, size + 1]) == "[NAME]"
    assert size + 1 not in ours.encode("[PAD]")
    with pytest.raises(InputError, match=f"not whole numbers below {size}"):
        read_tokenizer(tmp_path, size, set())


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            dict(tokenizer_class="Qwen2TokenizerFast"),
            "no tokenizer.json, which a Qwen2",
        ),
        (dict(add_bos_token=True), "tokenizer_config.json sets add_bos_token"),
    ],
)
def test_settings_beside_the_old_layout_are_refused_by_name(tmp_path, settings, message):
    trained(PLAIN).model.save(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path, CONFIG)


def test_a_prefix_space_beside_either_layout(tmp_path):
    bpe = trained(ByteLevel(add_prefix_space=True))
    bpe.model.save(str(tmp_path))
    settings = dict(add_prefix_space=True, tokenizer_class="RobertaTokenizer")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    agree(Tokenizer.load(tmp_path, CONFIG), bpe, TEXTS)
    agree(saved(bpe, tmp_path), bpe, TEXTS)
    bpe.pre_tokenizer = PLAIN
    with pytest.raises(InputError, match="tokenizer_config.json sets another add_prefix_space"):
        saved(bpe, tmp_path)
