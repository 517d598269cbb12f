"""Looking at a model from outside: harmful rate, over-refusal, task accuracy.

Nothing here knows how a model was restored; `curvkern.evaluate.data.read_jsonl` is also the one
reader of JSONL files for everything else in the package.
"""

from curvkern.evaluate.data import Example, Message, read_jsonl
from curvkern.evaluate.generate import chat_prompt, generate
from curvkern.evaluate.harmful import (
    REFUSAL_PHRASES,
    Rate,
    harmful_rate,
    is_degenerate,
    is_refusal,
    wilson,
)
from curvkern.evaluate.model import Evaluation, evaluate, load, load_tokenizer
from curvkern.evaluate.task import over_refusal, task_accuracy

__all__ = [
    "REFUSAL_PHRASES",
    "Evaluation",
    "Example",
    "Message",
    "Rate",
    "chat_prompt",
    "evaluate",
    "generate",
    "harmful_rate",
    "is_degenerate",
    "is_refusal",
    "load",
    "load_tokenizer",
    "over_refusal",
    "read_jsonl",
    "task_accuracy",
    "wilson",
]
