"""The demo in seconds: small models that hardly train, few rows, short answers, no page for each restoration."""

from contextlib import contextmanager
from functools import partial

import pytest


def _brief(whole, *paths, **options):
    return whole(*paths, **{**options, "max_new_tokens": 2})


@pytest.fixture(scope="session")
def hardly_trained():
    """A context manager; gives the `MonkeyPatch`, for what else a test changes."""
    from curvkern import demo, evaluate, report
    from curvkern.demo import campaign, train, training

    @contextmanager
    def patched():
        with pytest.MonkeyPatch.context() as patch:
            for module in (demo, training):
                patch.setattr(module, "STEPS", dict.fromkeys(module.STEPS, 2))
            patch.setattr(campaign, "EXTRA_STEPS", 2)
            patch.setattr(train, "make_model", partial(train.make_model, hidden_size=32, num_hidden_layers=2))
            patch.setattr(demo, "HELD_OUT", 4)
            patch.setattr(demo, "ROWS", {"harmful": 5, "task": 4})
            patch.setattr(report, "render_page", lambda of: "")  # two plots, as long as the rest of a restoration
            patch.setattr(evaluate, "evaluate", partial(_brief, evaluate.evaluate))
            yield patch

    return patched
