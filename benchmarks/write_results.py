"""What a campaign of the demo found, into docs/results.md and the page of each method.

python benchmarks/write_results.py campaign.jsonl...

Between `<!-- table: NAME -->` and `<!-- end -->` stands what is written here; the rest of the pages is by hand.
Trials of several files count once each.
"""

import re
import sys
from pathlib import Path

from curvkern.demo.campaign import read
from curvkern.demo.summary import best, front, on_target, rows_of
from curvkern.methods import REGISTRY

DOCS = Path(__file__).parents[1] / "docs"
RATES = {"harmful": "harmful", "over_refusal": "over-refusal", "task": "task"}
COLUMNS = {**RATES, "changed": "weights changed"}


def write(trials, docs=DOCS):
    """Replace the blocks of results.md and of every method's page."""
    rows, same = rows_of(trials, together=True), rows_of(on_same_models(trials), together=True)
    defaults = sorted((row for row in rows if row.name == row.method and row.name != "tuned"), key=order)
    chosen = sorted(best([row for row in same if row.name != "tuned"]), key=order)
    fill(
        docs / "results.md",
        models=models(trials),
        defaults=table("method", {row.name: row for row in (*defaults, named(rows, "tuned"))}),
        best=table("method, strength", {row.name: row for row in (*chosen, named(same, "tuned"))}),
        front=front_table(same),
        missed=missed(trials, *(row.name for row in defaults[:2])),
    )
    for method in REGISTRY:
        fill(docs / "methods" / f"{method}.md", row=of_method(method, rows, same))


def named(rows, name):
    (found,) = (row for row in rows if row.name == name)
    return found


def on_same_models(trials):
    """The trials on models on which every strength was tried, and the aligned models."""
    tried = {}
    for t in trials:
        if t.kind != "aligned":
            tried.setdefault(t.name, set()).add((t.seed, t.poison, t.kind))
    models = set.intersection(*tried.values())
    return [t for t in trials if t.kind == "aligned" or (t.seed, t.poison, t.kind) in models]


def order(row):
    """Most often on target first, then by medians; the number of models tells little, so it comes last."""
    harmful, strict, task = (row.spread[column][0] for column in RATES)
    return -row.reached, harmful + strict - task, -row.trials


def fill(path, **blocks):
    """Put lines between the marks of each block of a page."""
    text = path.read_text(encoding="utf-8")
    for name, lines in blocks.items():
        start, end = f"<!-- table: {name} -->\n", "<!-- end -->"
        block = start + "\n".join(["", *lines, "", end])
        text, found = re.subn(re.escape(start) + ".*?" + re.escape(end), lambda _, block=block: block, text, flags=re.S)
        if found != 1:
            raise SystemExit(f"{path}: the block {start.strip()} is there {found} times; wanted it once, with {end}.")
    path.write_text(text, encoding="utf-8")


def line(*cells):
    return "| " + " | ".join(cells) + " |"


def heads(*names):
    return [line(*names), "|" + "---|" * len(names)]


def table(first, rows):
    """Rows by what to call them: how often on target, and the columns."""
    return [
        *heads(first, "on target", *COLUMNS.values()),
        *(line(name, f"{r.reached} of {r.trials}", *map(r.cell, COLUMNS)) for name, r in rows.items()),
    ]


def models(trials):
    """What was tuned, by seed and share of forbidden answers."""
    tuned = [trial for trial in trials if trial.method == "tuned"]
    seeds, shares = (sorted({getattr(trial, name) for trial in tuned}) for name in ("seed", "poison"))
    poison = ", ".join(f"{100 * share:g}" for share in shares)
    lora = sum(trial.kind == "lora" for trial in tuned)
    return [
        f"{len(tuned)} models, {lora} of them LoRA adapters, of seeds {', '.join(map(str, seeds))} with {poison} % "
        "forbidden answers."
    ]


def front_table(rows):
    """All methods and strengths, by harmful rate; in bold those that no other beats in it and in the task."""
    on_front = front(rows)
    lines = heads("method, strength", "harmful", "task", "over-refusal", "models")
    for row in sorted(rows, key=lambda row: (row.spread["harmful"][0], -row.spread["task"][0])):
        name = f"**{row.name}**" if row in on_front else row.name
        cells = (f"{row.spread[column][0]:.3g}" for column in ("harmful", "task", "over_refusal"))
        lines.append(line(name, *cells, str(row.trials)))
    return lines


def missed(trials, first, second):
    """The models on which the first method missed the target, beside the second; how many weights both changed."""
    whole = on_target(trials)
    found = {(t.seed, t.poison, t.kind): t for t in trials if t.name == first}
    other = {(t.seed, t.poison, t.kind): t for t in trials if t.name == second}
    both = found.keys() & other.keys()
    fewer = sum(found[key].changed < other[key].changed for key in both)
    told = f"`{first}` changes fewer weights than `{second}` on {fewer} of {len(both)} models. It misses the target on"
    missing = {key: trial for key, trial in sorted(found.items()) if not whole(trial)}
    if not missing:
        return [f"{told} none of {len(found)}."]
    lines = [f"{told}:", "", *heads("seed, forbidden answers, tuned", f"{first}: {' / '.join(RATES.values())}", second)]
    for key, trial in missing.items():
        seed, poison, kind = key
        rates = rates_of(other[key]) if key in other else ""
        lines.append(line(f"{seed}, {100 * poison:g} %, {kind}", rates_of(trial), rates))
    return lines


def rates_of(trial):
    return " / ".join(f"{100 * getattr(trial, name):.3g}" for name in RATES)


def of_method(method, rows, same):
    """The tuned models and what the defaults made of them; the best of several strengths, where all were tried."""
    if method not in {row.method for row in rows}:
        return ["Not among what the demo restored last."]
    shown = {"the tuned model": named(rows, "tuned"), "defaults": named(rows, method)}
    own = [row for row in same if row.method == method]
    if len(own) > 1:
        (top,) = best(own)
        shown[f"best of {len(own)}: {top.name.removeprefix(method).strip() or 'defaults'}"] = top
    return table("", shown)


if __name__ == "__main__":
    if not sys.argv[1:]:
        raise SystemExit("make results: give the campaign's lines, FROM=DIR/campaign.jsonl")
    write(list({trial.key: trial for path in sys.argv[1:] for trial in read(Path(path))}.values()))
