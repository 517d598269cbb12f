"""A progress bar for the terminal."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def bar(what: str, total: int, shown: bool) -> Generator[Callable[[int, str], None]]:
    """Show a bar with the time left; it is gone when the block ends.

    Args:
        what: text before the bar.
        total: steps in all.
        shown: if false, nothing is.

    Yields:
        Takes how many steps are done, and a text to put in place of ``what``.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not shown, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda done, text: progress.update(task, completed=done, description=text)
