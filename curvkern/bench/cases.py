"""The cases of every op: what is tested is what is measured."""

from __future__ import annotations

from curvkern.bench import cases_of_statistics as statistics
from curvkern.bench import cases_of_weights as weights
from curvkern.bench.case import Case as Case

CASES: dict[str, list[Case]] = {
    "fisher": statistics.fisher(),
    "gram": statistics.gram(),
    "obs": statistics.obs(),
    "hessian": statistics.hessian(),
    "loss": statistics.loss(),
    "perturb": weights.perturb(),
    "mix": weights.mix(),
    "rollback": weights.rollback(),
    "change": weights.change(),
    "select": weights.select(),
    "subspace": statistics.subspace(),
    "vectors": weights.vectors(),
}
