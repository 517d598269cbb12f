"""The command line: argument parsing only; each command calls one function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    name="curvkern",
    help="Give a fine-tuned language model its safety back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _parameters(assignments: list[str]) -> dict[str, Any]:
    """``key=value`` pairs; values are read as YAML."""
    import yaml

    parameters: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals or not key:
            raise typer.BadParameter(f"{assignment!r}: write key=value, for example rate=0.002")
        try:
            parameters[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise typer.BadParameter(f"{assignment!r}: the value is not valid YAML") from None
    return parameters


def _lists(assignments: list[str]) -> dict[str, list[Any]]:
    """``key=v1,v2`` pairs; the values are read as a YAML list. A key alone has none."""
    pairs = (assignment.partition("=") for assignment in assignments)
    return _parameters([f"{key}=[{values}]" for key, _, values in pairs])


def _sides(block: str) -> tuple[int, int] | str:
    """``128x64`` as numbers."""
    rows, _, cols = block.partition("x")
    return (int(rows), int(cols)) if rows.isdigit() and cols.isdigit() else block


@app.command()
def restore(
    recipe: Annotated[
        Path | None, typer.Argument(help="YAML, or curvkern.json of a run to repeat; options override.")
    ] = None,
    aligned: Annotated[Path | None, typer.Option(help="The safe chat model.")] = None,
    tuned: Annotated[Path | None, typer.Option(help="What fine-tuning made of it: checkpoint or LoRA adapter.")] = None,
    base: Annotated[Path | None, typer.Option(help="The model before alignment.")] = None,
    unaligned: Annotated[Path | None, typer.Option(help="An aligned model broken on purpose.")] = None,
    safety_adapter: Annotated[Path | None, typer.Option(help="The aligned model tuned on safety data.")] = None,
    method: Annotated[str | None, typer.Option(help="Restoration method, or several: a,b; each in OUT/NAME.")] = None,
    harmful: Annotated[Path | None, typer.Option(help="JSON Lines of harmful prompts.")] = None,
    safety: Annotated[Path | None, typer.Option(help="JSON Lines of harmful prompts, with safe responses.")] = None,
    task: Annotated[Path | None, typer.Option(help="JSON Lines of the task, with responses.")] = None,
    out: Annotated[Path | None, typer.Option(help="Directory to make.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Method parameter: key=value, or method.key=value; repeatable.")
    ] = None,
    include: Annotated[list[str] | None, typer.Option(help="Pattern on weight names; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of weights to leave; repeatable.")] = None,
    save: Annotated[str | None, typer.Option(help="auto, checkpoint, adapter or delta.")] = None,
    statistics: Annotated[Path | None, typer.Option(help="Directory of curvature statistics to share.")] = None,
    device: Annotated[str | None, typer.Option(help="Where to work: cpu, cuda, cuda:1.")] = None,
    memory_budget: Annotated[
        str | None, typer.Option(help="Of the device, 20GiB; a model that takes more runs layer by layer.")
    ] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    resume: Annotated[bool, typer.Option(help="Go on where a killed run stopped.")] = False,
    trace: Annotated[Path | None, typer.Option(help="Chrome trace to write; the report names the limit.")] = None,
    quiet: Annotated[bool, typer.Option(help="No progress bar, no table.")] = False,
) -> None:
    """Restore a fine-tuned model and write the result with a report."""
    from curvkern.report import print_report
    from curvkern.restore import each_method, make_recipe, read_recipe, run_recipes

    given = {
        "aligned": aligned, "tuned": tuned, "base": base, "unaligned": unaligned, "safety_adapter": safety_adapter,
        "method": method, "harmful": harmful, "safety": safety, "task": task, "out": out,
        "include": include, "exclude": exclude, "save": save, "statistics": statistics, "device": device,
        "memory_budget": memory_budget,
    }  # fmt: skip
    values: dict[str, Any] = {key: value for key, value in given.items() if value}
    values["parameters"] = _parameters(set_ or [])
    chosen = make_recipe(values) if recipe is None else read_recipe(recipe, values)
    parts = each_method(chosen)
    for report in run_recipes(parts, overwrite=overwrite, resume=resume, progress=not quiet, trace=trace):
        if not quiet:
            print_report(report)


@app.command()
def apply(
    delta: Annotated[Path, typer.Argument(help="Made by restore --save delta.")],
    tuned: Annotated[Path, typer.Argument(help="The fine-tuned checkpoint that it was made with.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
) -> None:
    """Make the restored checkpoint of the tuned one and a delta."""
    from curvkern.checkpoint import apply_delta

    changed = apply_delta(delta, tuned, out, overwrite=overwrite)
    typer.echo(f"{out}: restored; {changed} tensors differ from {tuned}")


@app.command()
def undo(
    delta: Annotated[Path, typer.Argument(help="Made by restore --save delta.")],
    restored: Annotated[Path, typer.Argument(help="What apply made, or the same restore with --save checkpoint.")],
    out: Annotated[Path, typer.Option(help="Directory to make.")],
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
) -> None:
    """Make the tuned checkpoint again, bit for bit, of the restored one and the delta."""
    from curvkern.checkpoint import undo_delta

    changed = undo_delta(delta, restored, out, overwrite=overwrite)
    typer.echo(f"{out}: as it was tuned; {changed} tensors differ from {restored}")


@app.command()
def sweep(
    recipe: Annotated[Path, typer.Argument(help="YAML recipe.")],
    out: Annotated[Path, typer.Option(help="Directory for sweep.json, sweep.html and statistics.")],
    harmful_eval: Annotated[Path, typer.Option(help="Held-out JSON Lines of harmful prompts.")],
    benign_eval: Annotated[Path, typer.Option(help="Held-out JSON Lines of harmless prompts.")],
    task_eval: Annotated[Path, typer.Option(help="Held-out JSON Lines of the task, with responses.")],
    vary: Annotated[list[str] | None, typer.Option(help="parameter=value,value,...; repeated: combinations.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Method parameter: key=value; repeatable.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="An answer is cut after these.")] = 64,
    batch_size: Annotated[int, typer.Option(help="Prompts answered at a time.")] = 32,
    margin: Annotated[float, typer.Option(help="Of task and over-refusal that safety may cost.")] = 0.05,
) -> None:
    """Try values of a method's parameters, measure each restored model, recommend one."""
    from curvkern.restore import read_recipe
    from curvkern.sweep import sweep as run

    run(
        read_recipe(recipe, {"out": out, "parameters": _parameters(set_ or [])}), vary=_lists(vary or []),
        harmful=harmful_eval, benign=benign_eval, task=task_eval, max_new_tokens=max_new_tokens, batch_size=batch_size,
        margin=margin,
    )  # fmt: skip


@app.command()
def recipe(method: Annotated[str, typer.Argument(help="Restoration method.")]) -> None:
    """Print a recipe of a method with all of its parameters, to fill in."""
    from curvkern.restore.recipe_text import recipe_text

    typer.echo(recipe_text(method), nl=False)


@app.command()
def curvature(
    model: Annotated[Path, typer.Argument(help="Hugging Face directory or LoRA adapter.")],
    data: Annotated[Path, typer.Option(help="JSON Lines with responses.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write.")],
    quantity: Annotated[str, typer.Option(help="One or several, by commas: fisher_diag,gradient.")] = "fisher_diag",
    sample: Annotated[str, typer.Option(help="What is squared: sequence, token or batch.")] = "sequence",
    fisher_type: Annotated[str, typer.Option(help="empirical, mc or type-2.")] = "empirical",
    loss: Annotated[str, typer.Option(help="response_mean, token_mean or token_sum.")] = "response_mean",
    mc_samples: Annotated[int, typer.Option(help="Draws of labels, for mc.")] = 1,
    probes: Annotated[int, typer.Option(help="Random directions, for hessian_diag.")] = 8,
    hvp: Annotated[str, typer.Option(help="Products with the Hessian: exact or difference.")] = "exact",
    kinds: Annotated[str, typer.Option(help="Of linear,experts,norm,embedding.")] = "linear,experts",
    block: Annotated[str, typer.Option(help="Tiles of fisher_blocks: 128x128, row, column, module.")] = "128x128",
    seed: Annotated[int, typer.Option(help="Of draws and probes.")] = 0,
    include: Annotated[list[str] | None, typer.Option(help="Pattern on weight names; repeatable.")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="Pattern of weights to leave; repeatable.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch, padding included.")] = 4096,
    max_length: Annotated[int | None, typer.Option(help="Tokens of a row; the rest is cut off.")] = None,
    non_finite: Annotated[str, typer.Option(help="A batch whose loss is not finite: raise or skip.")] = "raise",
    html: Annotated[Path | None, typer.Option(help="Page to write.")] = None,
    against: Annotated[Path | None, typer.Option(help="Statistics of other data: their overlap, on the page.")] = None,
    device: Annotated[str, typer.Option(help="Where the model runs.")] = "cpu",
    layerwise: Annotated[bool, typer.Option(help="One decoder layer in memory, also where the model fits.")] = False,
    spill: Annotated[Path | None, typer.Option(help="For hidden states between layers, with --layerwise.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace what is at --out.")] = False,
    resume: Annotated[bool, typer.Option(help="Add what an interrupted run left.")] = False,
    quiet: Annotated[bool, typer.Option(help="No progress bar.")] = False,
) -> None:
    """Estimate gradients and curvature of a model on data, and save them. Ctrl-C keeps what is complete."""
    from curvkern.measure import measure, rows_of

    found = measure(
        model, data, out, quantity=quantity.split(","), sample=sample, fisher_type=fisher_type, loss=loss,
        mc_samples=mc_samples, probes=probes, hvp=hvp, kinds=kinds.split(","), block=_sides(block), seed=seed,
        include=include or (), exclude=exclude or (), batch_tokens=batch_tokens, max_length=max_length,
        non_finite=non_finite, html=html, against=against, device=device, overwrite=overwrite, resume=resume,
        progress=not quiet, layerwise=True if layerwise else "auto", spill=spill,
    )  # fmt: skip
    if found.unmeasured:
        few = ", ".join(found.unmeasured[:4])
        typer.echo(f"not measured: {len(found.unmeasured)} parameters, such as {few}; the file names all")
    done, total = found.counts.rows, rows_of(data)
    typer.echo(f"{out}: {', '.join(found.sums)} of {done} rows, {found.counts.targets} targets")
    if done < total:
        typer.echo(f"interrupted: {total - done} rows are left; the same command with --resume adds them", err=True)
        raise typer.Exit(130)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where models, results and the page go.")] = Path("demo-out"),
    seed: Annotated[int, typer.Option(help="Of data, weights and training.")] = 0,
    training: Annotated[bool, typer.Option("--training", help="Guards while it is fine-tuned, instead.")] = False,
    seeds: Annotated[int, typer.Option(help="Instead, a campaign over so many seeds: every method; hours.")] = 0,
    poison: Annotated[str, typer.Option(help="Of the campaign: shares of forbidden tuning data.")] = "0.02,0.05,0.1",
) -> None:
    """Train, align, spoil and restore a tiny model: the whole story in three minutes."""
    if training:
        from curvkern.demo.training import run as run_guards

        run_guards(out, seed=seed)
        return
    if seeds:
        from curvkern.demo.campaign import run as run_campaign

        shares = _lists([f"poison={poison}"])["poison"]
        run_campaign(out, seeds=range(seed, seed + seeds), poison=shares)
        return
    from curvkern.demo.story import run

    run(out, seed=seed)


@app.command()
def bench(
    ops: Annotated[list[str] | None, typer.Argument(help="Ops or functions: fisher, rollback_. All if none.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only this one: fp32, fp16, bf16.")] = None,
    size: Annotated[str | None, typer.Option(help="tiny, s, m or l; m on a GPU, s on a CPU.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu; a GPU if there is one.")] = None,
    backend: Annotated[str, typer.Option(help="Only this one beside the reference.")] = "auto",
    compile_: Annotated[bool, typer.Option("--compile", help="torch.compile of the reference too.")] = False,
    seconds: Annotated[float, typer.Option(help="For each provider of each case.")] = 0.3,
    limit: Annotated[float, typer.Option(help="Seconds after which no case is begun.")] = float("inf"),
    pass_: Annotated[bool, typer.Option("--pass", help="The whole restoration pass instead of ops.")] = False,
    shape: Annotated[str | None, typer.Option(help="With --pass: llama-3-8b, llama-3-70b..., weights made up.")] = None,
    layers: Annotated[int | None, typer.Option(help="With --shape: only the first so many; the rest is told.")] = None,
    trace: Annotated[Path | None, typer.Option(help="With --pass: Chrome trace to write.")] = None,
    compare: Annotated[Path | None, typer.Option(help="Earlier CSV; this machine's in benchmarks/results.")] = None,
    csv: Annotated[Path | None, typer.Option(help="File to replace, or directory for <machine>.csv.")] = None,
    html: Annotated[Path | None, typer.Option(help="Page to write.")] = None,
    tune_: Annotated[bool, typer.Option("--tune", help="Find and keep the fastest launches on this GPU.")] = False,
) -> None:
    """Measure the ops here against plain torch and other libraries; exit 1 if one is wrong or slower than before."""
    if tune_:
        import torch

        from curvkern.bench.tune import tune

        where = device or ("cuda" if torch.cuda.is_available() else "cpu")
        typer.echo(tune(torch.device(where), size or "m"))
        return
    from curvkern.bench.run import run

    status = run(
        ops or (), dtype=dtype, size=size, device=device, backend=backend, compiled=compile_, seconds=seconds,
        limit=limit, passes=pass_, shape=shape, layers=layers, trace=trace, compare=compare, csv=csv, html=html,
    )  # fmt: skip
    raise typer.Exit(status)


@app.command()
def env(json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Say what this machine has and which backend each op takes."""
    from curvkern.env import main as env_main

    env_main(["--json"] if json else [])


def main() -> None:
    """Run the command line; errors of use are one line, not a traceback."""
    try:
        app()
    except Exception as error:
        if not isinstance(error, _errors_of_use()):
            raise
        typer.secho(f"curvkern: error: {error}", err=True, fg="red")
        sys.exit(2)


def _errors_of_use() -> tuple[type[Exception], ...]:
    """Imported once something went wrong: `curvkern --help` need not wait for them."""
    from curvkern import BackendError
    from curvkern.checkpoint import CheckpointError
    from curvkern.curvature import CurvatureError
    from curvkern.restore import RestoreError

    return (
        ValueError,
        TypeError,
        FileNotFoundError,
        FileExistsError,
        NotADirectoryError,
        BackendError,
        CheckpointError,
        CurvatureError,
        RestoreError,
    )
