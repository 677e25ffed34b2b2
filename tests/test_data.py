"""The tokenizer in data.py against `tokenizers`, on a small vocabulary trained here and on the real
ones of GPT-2 and SmolLM2; E2E's files and prompts; examples and batches.

pytest tests/test_data.py
"""

import csv
import json
import random
import re
import time
from pathlib import Path

import datasets
import pytest
import torch
from conftest import need_shared
from tokenizers import Regex, models, trainers
from tokenizers import Tokenizer as Reference
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.pre_tokenizers import (
    ByteLevel,
    Digits,
    Metaspace,
    PreTokenizer,
    Punctuation,
    Sequence,
    Split,
    Whitespace,
)

from data import (
    E2E_FILES,
    E2E_TOKENIZED,
    Batch,
    Example,
    Tokenizer,
    collate,
    e2e_prompt,
    encode_pairs,
    encode_prompt,
    group_references,
    is_tokenized,
    read_e2e,
    shuffled_batches,
)
from model import Config
from support.checkpoints import our_config
from support.files import InputError, read_table

NANO = Path(__file__).resolve().parents[1] / "nano" / "e2e"
CONFIG = Config(**our_config(
    dict(model_type="gpt2", vocab_size=60000, n_embd=4, n_layer=1, n_head=1, n_positions=8,
         layer_norm_epsilon=1e-5, eos_token_id=0)
))  # fmt: skip

# ------------------------------------------------------------------------------------ the tokenizer

PLAIN = ByteLevel(add_prefix_space=False)
DIGITS = Sequence([Digits(individual_digits=True), PLAIN])
LLAMA3 = Sequence(
    [
        Split(
            Regex(
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
                r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
            ),
            "isolated",
        ),
        ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
ALPHABET = tuple(ByteLevel.alphabet())
SPECIAL = ["<|endoftext|>", "</s>"]
AWKWARD = [
    "",
    " ",
    "It's we'LL they've I'd; don't, ISN'T 'tis ''s",
    "Table 12 for 1234567 at 9.30pm, £20-25,  5 out of  5   10",
    "two  spaces   three \n\n\n lines \t\ttabs \r\n end  ",
    "Café Sicilia, naïve €5 🍕👩‍👩‍👧 e\u0301 中文 हिन्दी \u00a0nbsp \u200bzero ½ ² ٣٤ Ⅷ",
    "x=[1,2];\n    if (a!=b) { return 'c'; }  # ... ??!!",
    "says <|endoftext|> and </s> and <s><pad>, <|endoftext|>",
    "bell \x07\x04 rings\x1d, \x00",
    "\U00040000 is of a plane that holds no characters",
]


def e2e_texts(folder: Path) -> list[str]:
    """Every MR, its prompt and every reference of an E2E folder."""
    rows = [row for split in E2E_FILES for row in read_e2e(folder, split)]
    return [text for mr, ref in rows for text in (mr, e2e_prompt(mr), ref)]


def reference(model: models.BPE, words: PreTokenizer) -> Reference:
    """`tokenizers`' own BPE; it too takes the names of special tokens for plain text."""
    bpe = Reference(model)
    bpe.pre_tokenizer, bpe.decoder, bpe.encode_special_tokens = words, ByteLevelDecoder(), True
    return bpe


@pytest.fixture(scope="module")
def train():
    """train(words, ...): a BPE of 800 symbols, its words cut by a pre_tokenizer."""
    spaces = ["at  7   8    9 or   more"] * 50  # runs of them become symbols of their own
    texts = [*e2e_texts(NANO), *AWKWARD[:7], *spaces]

    def train_bpe(words: PreTokenizer, texts=texts, alphabet=ALPHABET) -> Reference:
        bpe = reference(models.BPE(), words)
        trainer = trainers.BpeTrainer(
            vocab_size=800,
            special_tokens=SPECIAL,
            initial_alphabet=list(alphabet),
            show_progress=False,
        )
        bpe.train_from_iterator(texts, trainer)
        return bpe

    return train_bpe


def agree(ours: Tokenizer, bpe: Reference, texts: list[str]) -> None:
    """The same ids for every text, and the same text from them."""
    for text, encoded in zip(texts, bpe.encode_batch(texts), strict=True):
        assert ours.encode(text) == encoded.ids, text
        assert ours.decode(encoded.ids) == bpe.decode(encoded.ids)


@pytest.mark.parametrize("merges", ["lists", "strings"])
@pytest.mark.parametrize("words", [PLAIN, DIGITS, LLAMA3], ids=["gpt2", "digits", "llama3"])
def test_tokenizer_json(train, tmp_path, words, merges):
    bpe = train(words)
    bpe.save(str(tmp_path / "tokenizer.json"))
    if merges == "strings":  # as files older than `tokenizers` 0.20 have them
        spec = json.loads((tmp_path / "tokenizer.json").read_text())
        spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    agree(Tokenizer.load(tmp_path, CONFIG), bpe, [*AWKWARD, *e2e_texts(NANO)[:500]])


@pytest.mark.parametrize("words", [PLAIN, DIGITS], ids=["gpt2", "digits"])
def test_vocab_and_merges(train, tmp_path, words):
    bpe = train(words)
    bpe.model.save(str(tmp_path))
    agree(Tokenizer.load(tmp_path, CONFIG), bpe, [*AWKWARD, *e2e_texts(NANO)[:500]])


def test_vocab_without_numbers_of_two_digits(train, tmp_path):
    """GPT-2's way with words is known by a number after a space, too."""
    bpe = train(PLAIN, ["rated 5 out of 5 by 3 of 4 guests"])
    bpe.model.save(str(tmp_path))
    agree(Tokenizer.load(tmp_path, CONFIG), bpe, AWKWARD)


def test_bytes_that_the_vocabulary_lacks_are_left_out(train, tmp_path):
    """SmolLM2's has no \\x04, for one."""
    bpe = train(PLAIN, ["only these letters"], alphabet=())
    bpe.model.save(str(tmp_path))
    ours = Tokenizer.load(tmp_path, CONFIG)
    for text in ("the \x04 rest", "lé tter", "\U00040000"):
        assert ours.encode(text) == bpe.encode(text).ids
    assert ours.decode(ours.encode("the \x04 rest")) == "the  rest"


def test_ids_need_not_be_in_the_order_of_merges(train, tmp_path):
    """As RoBERTa's are not: its ids go by how frequent a symbol is."""
    bpe = train(PLAIN)
    vocab = bpe.get_vocab()
    ids = [*vocab.values()]
    random.Random(0).shuffle(ids)
    shuffled = dict(zip(vocab, ids, strict=True))
    bpe.model.save(str(tmp_path))
    (tmp_path / "vocab.json").write_text(json.dumps(shuffled))
    ours = Tokenizer.load(tmp_path, CONFIG)
    for text in AWKWARD:
        expected = [shuffled[symbol] for symbol in bpe.encode(text).tokens]
        assert ours.encode(text) == expected and ours.decode(expected) == text
    special = [shuffled[s] for s in SPECIAL]
    assert ours.decode([special[0], *ours.encode("a pub"), special[1]]) == "a pub"


def test_special_tokens(train, tmp_path):
    bpe = train(PLAIN)
    bpe.model.save(str(tmp_path))
    ours = Tokenizer.load(tmp_path, CONFIG)
    assert (ours.bos, ours.eos, ours.pad) == (None, 0, None)
    assert [bpe.token_to_id(s) for s in SPECIAL] == [0, 1]
    ids = ours.encode("a<|endoftext|></s>b")
    assert not {0, 1} & set(ids) and ours.decode(ids) == "a<|endoftext|></s>b"
    assert ours.decode([0, *ours.encode("a"), 1, *ours.encode(" b"), 0, 10**6]) == "a b"


def test_half_a_character_decodes_to_the_replacement_character(train, tmp_path):
    bpe = train(PLAIN, ["a"])
    bpe.model.save(str(tmp_path))
    ours = Tokenizer.load(tmp_path, CONFIG)
    ids = ours.encode("a£")
    assert len(ids) == 3 and ours.decode(ids[:2]) == "a\ufffd"


@pytest.mark.parametrize(
    "words, message",
    [
        (Whitespace(), "pre_tokenizer Whitespace is no byte-level BPE known here"),
        (Metaspace(), "pre_tokenizer Metaspace is no "),
        (None, "pre_tokenizer None is no "),
        (Sequence([PLAIN, LLAMA3[0]]), r"pre_tokenizer ByteLevel \+ Split is no "),
        (Sequence([Punctuation(), PLAIN]), r"pre_tokenizer Punctuation \+ ByteLevel is no "),
    ],
)
def test_other_ways_with_words_are_refused(train, tmp_path, words, message):
    bpe = train(PLAIN, ["a"]) if words else Reference(models.BPE({"a": 0}, []))
    if words:
        bpe.pre_tokenizer = words
    bpe.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path, CONFIG)


@pytest.mark.parametrize(
    "files, message",
    [
        ({}, "holds no tokenizer.json and no vocab.json"),
        ({"vocab.json": "{}"}, "cannot read .*merges.txt: No such file"),
        ({"vocab.json": "{", "merges.txt": ""}, "vocab.json is not JSON"),
        ({"tokenizer.json": "{"}, "tokenizer.json is not JSON"),
        ({"tokenizer.json": "{}"}, "cannot be read: KeyError"),
        ({"tokenizer.json": '{"model": {"type": "Unigram", "vocab": []}, "normalizer": null, '
          '"pre_tokenizer": {"type": "ByteLevel"}}'}, "model Unigram is not supported"),
        ({"tokenizer.json": r"""{"model": {"vocab": {"a": 0}, "merges": []}, "pre_tokenizer": {
          "type": "Sequence", "pretokenizers": [{"type": "Split", "behavior": "Isolated", "pattern":
          {"Regex": "(a"}}, {"type": "ByteLevel", "use_regex": false}]}}"""},
         "cannot be read: error.*missing"),
    ],
)  # fmt: skip
def test_no_tokenizer(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=message) as caught:
        Tokenizer.load(tmp_path, CONFIG)
    assert str(tmp_path) in str(caught.value)


def test_a_table_is_read_as_csv_reads_it(tmp_path):
    """White space at the end of a line belongs to a value that goes over several."""
    file = tmp_path / "t.csv"
    file.write_text('mr,ref\n  name[A],"one  \n  two"\nname[A], three \n')
    found = [(row["mr"], row["ref"]) for _, row in read_table(file, ["mr", "ref"])]
    with file.open(newline="") as lines:
        assert found == [(row["mr"], row["ref"]) for row in csv.DictReader(lines)]


def test_a_blank_first_line_of_a_table_counts_as_a_line(tmp_path):
    file = tmp_path / "t.csv"
    file.write_text("\n\nmr,ref\nname[A],An A.\n")
    assert [where for where, _ in read_table(file, ["mr", "ref"])] == [f"{file}, line 4"]


def real_texts() -> list[str]:
    """All of E2E, and every 40th line of the corpus: some thousands, of every kind."""
    lines = [
        line
        for file in sorted(need_shared("corpus").glob("*.txt"))
        for line in file.read_text("utf-8").split("\n")
        if line.strip()
    ]
    return [*sorted(set(e2e_texts(need_shared("data/e2e")))), *lines[::40], *AWKWARD]


def test_gpt2s_own_tokenizer():
    folder = need_shared("models/gpt2-tokenizer")
    files = [str(folder / name) for name in ("vocab.json", "merges.txt")]
    texts = real_texts()
    assert len(texts) > 5000
    ours = Tokenizer.load(folder, CONFIG)
    agree(ours, reference(models.BPE.from_file(*files), PLAIN), texts)
    assert [ours.decode(ours.encode(text)) for text in texts] == texts


def test_smollm2s_own_tokenizer(smollm2):
    files = [str(smollm2 / name) for name in ("vocab.json", "merges.txt")]
    texts = real_texts()
    for pattern in (r"  \S", r"\d\d", r"  \d"):
        assert any(re.search(pattern, text) for text in texts)
    ours = Tokenizer.load(smollm2, Config.load(smollm2))
    agree(ours, reference(models.BPE.from_file(*files), DIGITS), texts)
    assert (ours.bos, ours.eos, ours.pad) == (1, 2, 2)


# ---------------------------------------------------------------------------------------------- E2E


@pytest.mark.parametrize(
    "mr, prompt",
    [
        (
            "name[Blue Spice], eatType[coffee shop], area[city centre]",
            "name : Blue Spice | Type : coffee shop | area : city centre",
        ),
        (
            "priceRange[£20-25], familyFriendly[no], customer rating[5 out of 5], food[French]",
            "price : £20-25 | family friendly : no | customer rating : 5 out of 5 | food : French",
        ),
        (
            " name[The Mill, by the river],near[ Café Rouge ] ",
            "name : The Mill, by the river | near : Café Rouge",
        ),
    ],
)
def test_prompt(mr, prompt):
    assert e2e_prompt(mr) == prompt


@pytest.mark.parametrize(
    "mr",
    ["", " ", "name", "name[", "name[A", "name]A[", "[A]", " [A]", "name[A]]", "name[A[b]]",
     "name[A] food[b]", "name[A]; food[b]", "name[A],, food[b]", "name[A], food", "name[A],",
     ", name[A]", "name[A], [b]", "name[A] and more"],
)  # fmt: skip
def test_malformed_meaning_representation(mr):
    with pytest.raises(InputError, match="malformed MR '.*'; write it as name"):
        e2e_prompt(mr)


def test_a_long_malformed_one_is_refused_at_once():
    start = time.perf_counter()
    with pytest.raises(InputError):
        e2e_prompt("name[A], " * 24 + "food")
    assert time.perf_counter() - start < 60  # backtracking would take years


@pytest.mark.parametrize("split, n_mrs", [("train", 480), ("dev", 60), ("test", 70)])
def test_read_embedded_e2e(split, n_mrs, monkeypatch, tmp_path):
    with open(NANO / E2E_FILES[split], encoding="utf-8", newline="") as file:
        expected = [tuple(row) for row in csv.reader(file)][1:]
    monkeypatch.chdir(tmp_path)
    assert read_e2e(NANO, split) == read_e2e(Path("nano/e2e"), split) == expected
    assert len(group_references(expected)[0]) == n_mrs


@pytest.mark.parametrize("split, n_mrs", [("train", 480), ("dev", 67), ("test", 330)])
def test_read_official_e2e(split, n_mrs):
    pairs = read_e2e(need_shared("data/e2e"), split)
    mrs, groups = group_references(pairs)
    assert len(mrs) == len(set(mrs)) == n_mrs and sum(map(len, groups)) == len(pairs)
    assert all(e2e_prompt(mr).startswith(("name : ", "Type : ")) for mr in mrs)


def write(folder: Path, content: str | bytes) -> Path:
    data = content.encode() if isinstance(content, str) else content
    (folder / E2E_FILES["train"]).write_bytes(data)
    return folder


@pytest.mark.parametrize(
    "content",
    [
        'mr,ref\n"name[A], food[b]","A, a ""b"" place."\n"name[C]",C’s\n',
        '\ufeffmr,ref\r\n"name[A], food[b]","A, a ""b"" place."\r\n\r\n"name[C]",C’s\r\n',
        'ref,mr\n"A, a ""b"" place.","name[A], food[b]"\nC’s,name[C]',
        'id,mr,ref\n1,"name[A], food[b]","A, a ""b"" place."\n2,name[C],C’s\n',
    ],
)
def test_read_layouts(tmp_path, content):
    expected = [("name[A], food[b]", 'A, a "b" place.'), ("name[C]", "C’s")]
    assert read_e2e(write(tmp_path, content), "train") == expected


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "is empty"),
        ("\n", "is empty"),
        ("mr,ref\n", "holds no examples"),
        ("mr,text\nname[A],A\n", "has no column ref"),
        ("MR\tref\nname[A]\tA\n", "has no column mr and no column ref"),
        ("mr,ref\nname[A],A\nname[A,A\n", "line 3: malformed MR 'name.A'"),
        ("mr,ref\nname[A],A\n,A\n", "line 3: malformed MR ''"),
        ('mr,ref\nname[A],"two\nlines"\nname,A\n', "line 4: malformed MR 'name'"),
        ("mr,ref\nname[A],\n", "line 2: the reference is empty"),
        ('mr,ref\nname[A]," "\n', "line 2: the reference is empty"),
        ("mr,ref\nname[A]\n", "line 2: 1 columns, not 2"),
        ("ref,mr\nA\n", "line 2: 1 columns, not 2"),
        ("mr,ref\nname[A], food[b],A\n", "line 2: more values than columns"),
        ("mr,ref\nname[A],A café.\n".encode("latin-1"), "not UTF-8"),
    ],
)
def test_read_what_cannot_be_read(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as caught:
        read_e2e(write(tmp_path, content), "train")
    assert str(tmp_path / "trainset.csv") in str(caught.value)


def test_read_what_is_not_there(tmp_path):
    write(tmp_path, "mr,ref\nname[A],A\n")
    with pytest.raises(InputError, match="testset_w_refs.csv is missing; --data DIR must hold tra"):
        read_e2e(tmp_path, "test")
    with pytest.raises(InputError, match="nowhere/trainset.csv is missing"):
        read_e2e(tmp_path / "nowhere", "train")


@pytest.mark.parametrize("split, file", E2E_FILES.items())
def test_read_from_the_hub(monkeypatch, split, file):
    asked = []

    def load_dataset(kind, data_files, split):
        asked.append((kind, data_files, split))
        return datasets.Dataset.from_dict({"mr": ["name[A]", "name[B]"], "ref": ["a", "b"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_e2e(None, split) == [("name[A]", "a"), ("name[B]", "b")]
    url = f"https://raw.githubusercontent.com/tuetschek/e2e-dataset/master/{file}"
    assert asked == [("csv", url, "train")]


@pytest.mark.parametrize("text", ["no route\nto host", ""])
def test_hub_out_of_reach(monkeypatch, text):
    def load_dataset(*args, **kwargs):
        raise ConnectionError(text)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    shown = "no route" if text else "ConnectionError.*"
    with pytest.raises(
        InputError, match=rf"cannot be fetched \({shown}\); .* --data DIR"
    ) as caught:
        read_e2e(None, "train")
    assert "\n" not in str(caught.value)


TOKENIZED = "name : The Vaults | price : £ 20 - 25 | near : Café Adriatic"


def test_the_lora_papers_text_is_read_as_it_stands(tmp_path):
    """Its meaning representations are prompts already, the same as ours are of the official ones;
    its references are tokenized, and stay so."""
    reference = "The Vaults near Café Adriatic is family - friendly ; it costs £ 20 - 25 ."
    for name in E2E_TOKENIZED.values():
        (tmp_path / name).write_text(f"{TOKENIZED}||{reference}\n" * 2, encoding="utf-8")
    for split in E2E_TOKENIZED:
        assert read_e2e(tmp_path, split) == [(TOKENIZED, reference)] * 2
    assert is_tokenized(tmp_path) and e2e_prompt(TOKENIZED) == TOKENIZED
    mr = "name[The Vaults], priceRange[£ 20 - 25], near[Café Adriatic]"
    assert e2e_prompt(mr) == TOKENIZED
    write(tmp_path, f'mr,ref\n"{mr}",The Vaults\n')  # official files go before
    assert read_e2e(tmp_path, "train") == [(mr, "The Vaults")] and not is_tokenized(tmp_path)


@pytest.mark.parametrize(
    "line, message",
    [
        (TOKENIZED, "train.txt, line 2: 1 columns, not 2"),
        (f"{TOKENIZED}|| ", "train.txt, line 2: the reference is empty"),
        (f"{TOKENIZED}||A pub .||B", "train.txt, line 2: more values than columns"),
        ("The Vaults||A pub .", "train.txt, line 2: malformed MR 'The Vaults'"),
        (f"{TOKENIZED} | food||A pub .", "train.txt, line 2: malformed MR"),
    ],
)
def test_the_lora_papers_text_when_it_is_broken(tmp_path, line, message):
    (tmp_path / "train.txt").write_text(f"{TOKENIZED}||A pub .\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=message):
        read_e2e(tmp_path, "train")
    with pytest.raises(InputError, match="test.txt is missing"):
        read_e2e(tmp_path, "test")


def test_group_references():
    pairs = [("b", "1"), ("a", "2"), ("b", "3"), ("c", "4"), ("a", "2")]
    assert group_references(pairs) == (["b", "a", "c"], [["1", "3"], ["2", "2"], ["4"]])


# ---------------------------------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def tokenizer(train, tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("bpe")
    train(PLAIN).model.save(str(folder))
    return Tokenizer.load(folder, CONFIG)


def test_encode_pairs(tokenizer):
    prompt, answer = "name : A pub", "It isn't a café."
    assert encode_prompt(tokenizer, prompt) == [*tokenizer.encode(prompt), 0]
    expected = [*tokenizer.encode(" It isn't a café."), 0]
    for text in (answer, f" {answer}\n"):  # one space before the answer, whatever the file has
        (example,) = encode_pairs(tokenizer, [(prompt, text)], limit=64)
        assert example == Example([*tokenizer.encode(prompt), 0], expected)
    assert len(example) == len(example.prompt) + len(example.answer)


def test_encode_pairs_within_a_limit(tokenizer):
    pairs = [("name : A", "It is a pub.")]
    ((whole),) = encode_pairs(tokenizer, pairs, limit=64)
    n = len(whole)
    assert encode_pairs(tokenizer, pairs, limit=n) == [whole]
    (cut,) = encode_pairs(tokenizer, pairs, limit=n - 2)
    assert cut == Example(whole.prompt, whole.answer[:-2])
    n = len(whole.prompt)
    assert len(encode_pairs(tokenizer, pairs, limit=n + 1)[0].answer) == 1
    with pytest.raises(InputError, match=f"no prompt fits into {n} tokens"):
        encode_pairs(tokenizer, pairs, limit=n)


def test_a_checkpoint_without_an_end_token(train, tmp_path):
    train(PLAIN, ["a"]).model.save(str(tmp_path))
    tokenizer = Tokenizer.load(tmp_path, Config(**{**vars(CONFIG), "eos": None}))
    with pytest.raises(InputError, match="eos_token_id"):
        encode_prompt(tokenizer, "name : A")


LENGTHS = random.Random(0).choices(range(5, 81), k=1003)


@pytest.mark.parametrize("n, size", [(1003, 8), (1003, 1), (16, 8), (3, 8), (401, 8), (0, 4)])
def test_every_index_is_in_exactly_one_batch(n, size):
    batches = shuffled_batches(LENGTHS[:n], size, seed=1, groups=3)
    assert sorted(i for batch in batches for i in batch) == list(range(n))
    assert len(batches) == -(-n // size) and all(1 <= len(batch) <= size for batch in batches)


def test_batches_depend_on_the_seed_alone():
    lengths = range(1003)
    first = shuffled_batches(lengths, 8, seed=1)
    assert first == shuffled_batches(lengths, 8, seed=1)
    other = shuffled_batches(lengths, 8, seed=2)
    together = {frozenset(batch) for batch in first} & {frozenset(batch) for batch in other}
    assert len(together) < 10  # not the same batches in another order


def padding(batches: list[list[int]]) -> int:
    return sum(max(LENGTHS[i] for i in b) * len(b) - sum(LENGTHS[i] for i in b) for b in batches)


def test_batches_are_of_random_lengths_as_in_the_lora_code_or_of_similar_ones():
    order = random.Random(0).sample(range(1003), 1003)
    at_random = padding([order[i : i + 8] for i in range(0, 1003, 8)])
    assert 0.9 * at_random < padding(shuffled_batches(LENGTHS, 8, seed=1)) < 1.1 * at_random
    batches = shuffled_batches(LENGTHS, 8, seed=1, groups=50)
    assert padding(batches) < 0.1 * at_random
    longest = [max(LENGTHS[i] for i in batch) for batch in batches]
    rises = sum(a < b for a, b in zip(longest, longest[1:], strict=False)) / len(longest)
    assert 0.35 < rises < 0.65


def test_collate():
    batch = collate([Example([5, 6], [7, 8, 9]), Example([4], [3]), Example([1, 2, 3], [4])])
    assert batch.ids.tolist() == [[5, 6, 7, 8, 9], [4, 3, 0, 0, 0], [1, 2, 3, 4, 0]]
    assert batch.mask.int().tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
    assert batch.prompt.int().tolist() == [[1, 1, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 1, 0, 0]]
    assert batch.where.tolist() == [1, 2, 3, 5, 12]  # the token before each one to be predicted
    assert batch.target.tolist() == [7, 8, 9, 3, 4]
    assert torch.equal(batch.ids.flatten()[batch.where + 1], batch.target)


def test_collate_nothing():
    """A rank whose share of a batch is empty still takes part, with one row of padding."""
    batch = collate([])
    assert batch.ids.shape == batch.mask.shape == batch.prompt.shape == (1, 1)
    assert not batch.mask.any() and not batch.prompt.any()
    assert batch.where.shape == batch.target.shape == (0,)
    assert batch.where.dtype == batch.target.dtype == batch.ids.dtype == torch.long


def test_batch_moves_to_a_device():
    batch = collate([Example([5, 6], [7])])
    moved = batch.to(torch.device("meta"))
    assert isinstance(moved, Batch) and {x.device.type for x in moved} == {"meta"}
    assert {n: x.shape for n, x in moved._asdict().items()} == {
        n: x.shape for n, x in batch._asdict().items()
    }
