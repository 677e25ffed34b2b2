"""The beam search of the public LoRA code against ours (Table 2, section "E2E").

train.py searches as transformers does or, with --beam-rule lora, as github.com/microsoft/LoRA does
(gpt2_beam.py), with which the paper's row was most likely decoded. That code has the same beams,
length penalty (log-probability over length ** penalty, the end token counted), ban on repeated
n-grams of the answer and longest answer. Three rules are others there:

- The best `beams` continuations are taken, here twice as many. One that ends keeps its place but is
  dead, so fewer beams go on from there; here as many go on as before.
- Banned tokens leave the softmax, so that the others share their probability; here they do not.
- All steps are run. Here a search is done when its best open beam, at its present length, is no
  better than the worst of `beams` finished ones.

("\\n\\n", a token of GPT-2's, ends an answer there, too. We leave that out of our rule.)

    python experiments/beam_search.py                  small: nano/gpt2 learns E2E for one epoch
    python experiments/beam_search.py runs/gpt2-medium-e2e-* --limit 100               in full

In full it takes finished runs on E2E. Both searches use the run's own settings and get each prompt
alone, as in the LoRA code, so a MoLEx that routes by batch scores differently from eval.py.

Measured on the CPU, LoRA code's minus ours, with 10 beams, length penalty 0.9, 4-grams banned:

- SmolLM2-135M with LoRA after 150 steps on E2E, 60 MRs: 3 outputs differ (5.0%), BLEU 71.60 for
  72.09 (-0.49 points; paired bootstrap: p = 0.10), NIST +0.018, CIDEr -0.001.
- nano/gpt2 on all 70 MRs of nano/e2e: LoRA 0 outputs, BLEU 73.69 both; LoRA + MoLEx 1 (1.4%), BLEU
  73.86 for 73.87 (-0.01 points; p = 0.14).
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from eval import decode_test, e2e_scores, load_run
from experiments.small import finished_runs, runs_parser
from lora import merge
from support.cli import at_least, command_line, pick_device
from support.files import InputError

SMALL = "--no-molex --epochs 1"


def compare(folder: Path, limit: int | None, device: torch.device) -> None:
    """Decode a run's test set with both and print the table."""
    model, tokenizer, s = load_run(folder, device)
    if s.task != "e2e":
        raise InputError(f"{folder} is a run on {s.task}; give runs on e2e")
    merge(model)
    limits = [n for n in (limit, s.test_limit) if n]
    s = replace(s, eval_batch=1, test_limit=min(limits, default=None))
    (_, ours, references), (_, theirs, _) = (
        decode_test(model, tokenizer, replace(s, beam_rule=rule))
        for rule in ("transformers", "lora")
    )
    differ, n = sum(a != b for a, b in zip(ours, theirs, strict=True)), len(ours)
    rows = {"ours": e2e_scores(ours, references), "LoRA code's": e2e_scores(theirs, references)}
    rows["difference"] = {k: v - rows["ours"][k] for k, v in rows["LoRA code's"].items()}
    print(f"\n{folder.name}: {differ} of {n} outputs differ ({100 * differ / n:.1f}%)")
    print(f"{'':12}" + "".join(f"{metric.upper():>10}" for metric in rows["ours"]))
    for name, scores in rows.items():
        print(f"{name:12}" + "".join(f"{value:>10.4f}" for value in scores.values()))


def main() -> None:
    about = "Decode E2E with the public LoRA code's beam search and with ours"
    what = "finished runs on E2E (default: train nano/gpt2)"
    parser = runs_parser(about, what, "runs/beam_search")
    parser.add_argument("--limit", type=at_least(1), help="only so many MRs (all of the run's)")
    args = parser.parse_args()
    for folder in finished_runs(args, SMALL):
        compare(folder, args.limit, pick_device(args.device))


if __name__ == "__main__":
    command_line(main)
