"""Every restoration method on a made-up Llama, tuned fully and as a LoRA adapter: seconds, memory, what it changed.

python benchmarks/methods.py --out DIR [--size 1gb] [--methods lox,merge] [--kinds full,lora] [--page]

Each run is a process of its own that calls `curvkern.restore` with the method's defaults, but for `PARAMETERS`. Weights
and updates are random, so what is restored means nothing; what it takes does. `methods.csv` in DIR keeps a row for each
method and kind, so that the table grows from run to run; models are made once. OMP_NUM_THREADS says how many threads;
CPU seconds are of all threads, and hardly depend on what else the machine does.
"""

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
from importlib import import_module
from pathlib import Path

import torch

SIZES = {"tiny": (64, 2, 256), "1gb": (1536, 17, 8192)}  # hidden size, layers, words
#: Other than the defaults: random updates take the few answers that the search is not to lose.
PARAMETERS = {"gradient_rollback": {"max_drop": 0.9, "steps": 5, "save_every": 1}}
ROWS, PROMPT, ANSWER = 4, 48, 16  # of each set; tokens of a prompt; of an answer at most
IMPORTS = "matplotlib.pyplot", "transformers.models.llama.modeling_llama", "curvkern.curvature", "curvkern.evaluate"
COLUMNS = {
    "size": "", "method": "method", "kind": "tuned", "seconds": "seconds", "cpu": "CPU seconds",
    "longest": "longest stage", "peak_mib": "peak MiB", "changed_percent": "weights changed %", "saved": "written",
    "error": "",
}  # fmt: skip


# inputs ---------------------------------------------------------------------------------------------------------------


def make_inputs(root, size):
    """Models base, aligned, unaligned, full; adapters lora, safety_adapter; JSON Lines. Made once."""
    if (root / "done").is_file():
        return
    from curvkern.evaluate import generate, load

    shutil.rmtree(root, ignore_errors=True)
    hidden, layers, words = SIZES[size]
    tokenizer = make_tokenizer(words)
    torch.manual_seed(0)
    model = make_model(hidden, layers, words)
    save(model, tokenizer, root / "base")
    move(model, 0.002)
    save(model, tokenizer, root / "aligned")
    aligned = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, scale in (("unaligned", 0.002), ("full", 0.0005)):
        move(model, scale)
        save(model, tokenizer, root / name)
        model.load_state_dict(aligned)
    del aligned
    save_adapters(model, tokenizer, root)

    # Every set's answers are those of the model that gives them, so that there is something to lose and to win back.
    harmful, task = ([text(words, PROMPT) for _ in range(2 * ROWS)] for _ in range(2))
    for name, answering, prompts in (
        ("harmful", "unaligned", harmful), ("safety", "aligned", harmful), ("task-full", "full", task),
        ("task-lora", "lora", task),
    ):  # fmt: skip
        answers = generate(*load(root / answering), prompts, max_new_tokens=ANSWER)
        write_rows(root / f"{name}.jsonl", prompts, answers)
    (root / "done").touch()


def make_model(hidden, layers, words):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers,
        num_attention_heads=hidden // 32, num_key_value_heads=hidden // 32, dtype=torch.bfloat16,
    )  # fmt: skip
    model = LlamaForCausalLM(config).bfloat16()
    # Every other word ends an answer: nothing taught this model to end one.
    model.generation_config.eos_token_id = list(range(1, words, 2))
    return model


def make_tokenizer(words):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    ids = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(words - 2))])}
    by_word = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    by_word.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=by_word, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return tokenizer


def move(model, scale):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)


def save(model, tokenizer, path):
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


def save_adapters(model, tokenizer, root):
    """Two adapters on ``aligned``, of updates as large as the full one's."""
    import peft

    for name in ("lora", "safety_adapter"):
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        with torch.no_grad():
            for key, parameter in adapted.named_parameters():
                if "lora_B" in key:
                    parameter.normal_(std=0.004)
        adapted.peft_config["default"].base_model_name_or_path = str(root / "aligned")
        save(adapted, tokenizer, root / name)
        model = adapted.unload()


def text(words, count):
    return " ".join(f"w{i}" for i in torch.randint(words - 2, (count,)))


def write_rows(path, prompts, answers):
    """The first whose answer says something and comes to an end."""
    pairs = zip(prompts, answers, strict=True)
    rows = [{"prompt": asked, "response": said} for asked, said in pairs if 0 < len(said.split()) < ANSWER]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:ROWS]))


# runs -----------------------------------------------------------------------------------------------------------------


def run_here(root, method, kind, out):
    """Restore in this process, which is a fresh one; what to say of it."""
    for name in IMPORTS:
        import_module(name)  # before memory is measured
    from curvkern.report.record import resident_memory
    from curvkern.restore import restore

    given = {name: root / name for name in ("base", "unaligned", "safety_adapter")}
    given |= {name: root / f"{name}.jsonl" for name in ("harmful", "safety")} | PARAMETERS.get(method, {})
    before, start, cpu = resident_memory(), time.perf_counter(), time.process_time()
    report = restore(root / "aligned", root / kind, task=root / f"task-{kind}.jsonl", method=method, out=out, **given)
    longest = max(report.stages, key=lambda stage: stage.seconds)
    return {
        "seconds": f"{time.perf_counter() - start:.1f}",
        "cpu": f"{time.process_time() - cpu:.1f}",
        "peak_mib": f"{(report.peak_memory - before) / 2**20:.0f}",
        "longest": f"{longest.name} {longest.seconds:.1f}",
        "changed_percent": f"{100 * report.changed / report.weights:.2f}",
        "saved": report.saved,
    }


def measured(root, method, kind):
    """A row without its key: what a process of its own found, or the line it failed with."""
    out = root / "out"
    shutil.rmtree(out, ignore_errors=True)
    command = [sys.executable, __file__, "--run", str(root), method, kind, str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    shutil.rmtree(out, ignore_errors=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"}
    return json.loads(done.stdout.splitlines()[-1])


def measure(out, size, methods, kinds):
    """Run what is asked for, row by row into ``methods.csv``; all of its rows of that size."""
    root, path = out / f"models-{size}", out / "methods.csv"
    make_inputs(root, size)
    rows = {}
    if path.is_file():
        with path.open(newline="") as file:
            rows = {(row["size"], row["method"], row["kind"]): row for row in csv.DictReader(file)}
    for method in filter(None, methods):
        for kind in kinds:
            rows[size, method, kind] = {"size": size, "method": method, "kind": kind, **measured(root, method, kind)}
            with path.open("w", newline="") as file:
                table = csv.DictWriter(file, list(COLUMNS), restval="")
                table.writeheader()
                table.writerows(rows[key] for key in sorted(rows))
    return [rows[key] for key in sorted(rows) if key[0] == size]


def main():
    from curvkern.methods import REGISTRY

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory for models and methods.csv")
    parser.add_argument("--size", choices=SIZES, default="1gb")
    parser.add_argument("--methods", default=",".join(REGISTRY), help="with commas between them; '' for none")
    parser.add_argument("--kinds", default="full,lora")
    parser.add_argument("--page", action="store_true", help="put the table into docs/methods.md")
    asked = parser.parse_args()
    lines = table(measure(asked.out, asked.size, asked.methods.split(","), asked.kinds.split(",")))
    print("\n".join(lines))
    if asked.page:
        from write_results import DOCS, fill

        fill(DOCS / "methods.md", taken=lines)


def table(rows):
    """Markdown; what failed has its error where others have what they wrote."""
    heads = {key: head for key, head in COLUMNS.items() if head}
    full = ({**row, "saved": row.get("saved") or row["error"]} for row in rows)
    cells = [[row.get(key, "") for key in heads] for row in full]
    return ["| " + " | ".join(line) + " |" for line in (heads.values(), ["---"] * len(heads), *cells)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--run"]:
        root, method, kind, out = sys.argv[2:]
        print(json.dumps(run_here(Path(root), method, kind, Path(out))))
    else:
        main()
