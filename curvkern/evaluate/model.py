"""One model, three questions: does it refuse what it should, answer what it should, do its task."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from curvkern.evaluate.data import Example, read_jsonl
from curvkern.evaluate.generate import generate
from curvkern.evaluate.harmful import Rate, harmful_rate
from curvkern.evaluate.task import over_refusal, task_accuracy

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Source = str | Path | Sequence[Example]
"""Examples, or the JSONL file that holds them."""


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found; a part that was not asked for is None.

    Attributes:
        harmful: harmful requests that were not refused.
        over_refusal: harmless requests that were refused.
        task: task requests answered exactly as expected.
        responses: every answer, by the name of its set (`harmful`, `benign`, `task`).
        seconds: wall time, loading included.
    """

    harmful: Rate | None
    over_refusal: Rate | None
    task: Rate | None
    responses: dict[str, list[str]] = field(repr=False)
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The rates and the time, ready for JSON; the answers are left out."""
        rates = {"harmful": self.harmful, "over_refusal": self.over_refusal, "task": self.task}
        found = {name: rate and rate.as_dict() for name, rate in rates.items()}
        return {**found, "seconds": self.seconds}


def load(path: str | Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model directory, or a LoRA adapter directory on top of the model it names.

    Args:
        path: a Hugging Face directory that holds a tokenizer too.

    Returns:
        The model in eval mode, and its tokenizer.

    Raises:
        NotADirectoryError: `path` is not a directory.
        ModuleNotFoundError: `path` is an adapter and peft is not installed.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils.import_utils import is_peft_available

    path = Path(path)
    if not path.is_dir():
        raise NotADirectoryError(f"{path}: not a directory; expected a saved model and tokenizer")
    if (path / "adapter_config.json").is_file() and not is_peft_available():
        raise ModuleNotFoundError(f"{path}: a LoRA adapter; reading it needs peft: pip install 'curvkern[lora]'")
    model = cast("PreTrainedModel", AutoModelForCausalLM.from_pretrained(path))
    return model.eval(), load_tokenizer(path)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    from transformers import AutoTokenizer

    return cast("PreTrainedTokenizerBase", AutoTokenizer.from_pretrained(path))


def evaluate(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    harmful: Source | None = None,
    benign: Source | None = None,
    task: Source | None = None,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> Evaluation:
    """Answer up to three sets of prompts greedily and count.

    Args:
        model: a loaded causal language model, or the directory of one.
        tokenizer: needed with a loaded model; read from the directory otherwise.
        harmful: requests that a safe model refuses.
        benign: requests that no model should refuse.
        task: requests with the one right answer to each.
        max_new_tokens: an answer is cut after this many tokens.
        batch_size: prompts per forward pass.

    Returns:
        The rates, the answers and the time.

    Raises:
        ValueError: no set was given, a set is empty or broken, a task row has no response, or a
            loaded model came without its tokenizer.
    """
    began = time.perf_counter()
    given = {"harmful": harmful, "benign": benign, "task": task}
    sets = {name: _examples(name, src) for name, src in given.items() if src is not None}
    if not sets:
        raise ValueError("evaluate: nothing to do; give at least one of harmful, benign, task")
    expected = [row.response for row in sets.get("task", ())]
    if None in expected:
        raise ValueError(f"evaluate: task row {expected.index(None) + 1} has no response to match")
    if isinstance(model, str | Path):
        model, own = load(model)
        tokenizer = tokenizer or own
    elif tokenizer is None:
        raise ValueError("evaluate: a loaded model needs its tokenizer; pass tokenizer=")
    answers = {
        name: generate(
            model,
            tokenizer,
            [row.asked() for row in rows],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
        )
        for name, rows in sets.items()
    }
    counted = _count(answers, cast("list[str]", expected))
    return Evaluation(**counted, responses=answers, seconds=time.perf_counter() - began)


def _examples(name: str, source: Source) -> Sequence[Example]:
    rows = read_jsonl(source) if isinstance(source, str | Path) else source
    if not rows:
        raise ValueError(f"evaluate: the set {name} is empty; expected at least one example")
    return rows


def _count(answers: dict[str, list[str]], expected: list[str]) -> dict[str, Rate | None]:
    count: dict[str, tuple[str, Callable[[list[str]], Rate]]] = {
        "harmful": ("harmful", harmful_rate),
        "over_refusal": ("benign", over_refusal),
        "task": ("task", lambda responses: task_accuracy(responses, expected)),
    }
    return {rate: counter(answers[name]) if name in answers else None for rate, (name, counter) in count.items()}
