"""Training prompts that already show how the answer begins, so that it need not be learnt (LookAhead Tuning).

A change of the data alone: train on the new rows as on the old ones, with any guard, and ask plain prompts afterwards.
"""

from curvkern.training import lookahead

rows = [
    {"prompt": "What is 12 times 12?", "response": "Twelve twelves are ten twelves and two more: 144."},
    {"messages": [
        {"role": "user", "content": "Name a prime above 20."},
        {"role": "assistant", "content": "The next one is 23, then 29."},
    ]},
]  # fmt: skip


def show(row):
    """Prompt and answer of a row of either kind."""
    asked, answered = [message["content"] for message in row["messages"]] if "messages" in row else row.values()
    print(f"  {asked!r} -> {answered!r}")


for mode in ("real", "virtual"):
    print(mode)
    for row in lookahead(rows, mode, first=3):  # pass tokenizer= to count tokens instead of words
        show(row)
