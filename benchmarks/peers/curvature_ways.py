"""Ways to compute the curvature of a small Llama: ours, by hand, and by each library that can.

A way is a function of (model, ids, quantity) that gives quantity -> weight -> sums, under the names of `estimate`.
"""

import inspect
import itertools
from functools import cache, partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from curvkern import rademacher_
from curvkern.curvature import Text, estimate

LAYERS = {
    "vocab_size": 8192, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
}  # fmt: skip
GRAMS = ("input_gram", "output_gram")
BASES = ("input_basis", "output_basis")
#: quantity -> name -> (way, the package it needs).
WAYS = {"fisher_diag": {}, "kfac": {}, "ekfac": {}, "hessian_diag": {}}
FIRST_ORDER = tuple(WAYS)[:3]


def way(name, *quantities, package=""):
    """Enter a function as a way to compute quantities; ``package`` is what pip calls its library."""

    def enter(function):
        for quantity in quantities:
            WAYS[quantity][name] = function, package
        return function

    return enter


def model_and_ids(samples, tokens):
    """A Llama of which the weights in the layers alone get gradients, and texts [samples, tokens]."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**LAYERS)).eval()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name and parameter.ndim == 2)
    return model, torch.randint(0, LAYERS["vocab_size"], (samples, tokens))


def weights_of(model):
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


@cache
def modules_of(model):
    """By name; libraries freeze weights and rename modules later on."""
    names = [name.removesuffix(".weight") for name in weights_of(model)]
    return {name: model.get_submodule(name) for name in names}


def by_weight(model, found, prefix="", **theirs):
    """What a library found, by its own names of quantities and modules, in ours."""
    return {
        ours: {f"{name}.weight": found[its][prefix + name] for name in modules_of(model)}
        for ours, its in theirs.items()
        if found.get(its)
    }


def pairs_by_weight(names, pairs):
    """name -> weight -> tensor of weight -> (one, other)."""
    return {name: {weight: pair[at] for weight, pair in pairs.items()} for at, name in enumerate(names)}


def split(model, flat):
    """A vector of all weights' entries, by weight."""
    parts = flat.split([module.weight.numel() for module in modules_of(model).values()])
    return {f"{n}.weight": p.view_as(m.weight) for (n, m), p in zip(modules_of(model).items(), parts, strict=True)}


def losses(model, ids, **inputs):
    """[n]: of each text, the mean over its tokens."""
    logits = model(**(inputs or {"input_ids": ids}), use_cache=False).logits[:, :-1]
    return cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none").view(len(ids), -1).mean(1)


class Calling(nn.Module):
    """A module whose forward is ``function(model, ...)``, for libraries that want one."""

    def __init__(self, function, model):
        super().__init__()
        self.function, self.model = function, model

    def forward(self, *inputs):
        return self.function(self.model, *inputs)


@way("forward and backward", *WAYS)
def _backward(model, ids, _):
    losses(model, ids).sum().backward()


@way("curvkern", *WAYS)
def _curvkern(model, ids, quantity, texts=1 << 20, hvp="exact"):
    rows = [Text(tuple(row), (-100, *row[1:])) for row in ids.tolist()]
    return estimate(model, rows, quantity=quantity, batch_tokens=texts * ids.shape[1], probes=2, hvp=hvp).sums


way("curvkern, two texts at a time", *WAYS)(partial(_curvkern, texts=2))
way("curvkern, differences of gradients", "hessian_diag")(partial(_curvkern, hvp="difference"))


@way("autograd, text by text", "fisher_diag")
def by_autograd(model, ids, _, rotated=lambda name, gradient: gradient):
    weights = weights_of(model)
    found = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    for text in ids:
        gradients = torch.autograd.grad(losses(model, text[None]).sum(), weights.values())
        for (name, total), gradient in zip(found.items(), gradients, strict=True):
            total.addcmul_(*[rotated(name, gradient)] * 2)
    return {"fisher_diag": found}


def signs_of(model):
    """Of `estimate`'s two probes: every way multiplies the Hessian with the same."""
    weights = weights_of(model)
    starts = itertools.accumulate((weight.numel() for weight in weights.values()), initial=0)
    places = list(zip(weights.items(), starts, strict=False))
    return [
        {name: rademacher_(torch.empty_like(weight), seed=seed, offset=at) for (name, weight), at in places}
        for seed in range(2)
    ]


def mean_of_products(product, directions):
    """v * (H v), mean over directions v."""
    found = []
    for signs in directions:
        products = product(signs)
        found.append({name: v * products[name] for name, v in signs.items()})
    return {"hessian_diag": {name: sum(of[name] for of in found) / len(found) for name in found[0]}}


@way("double backward", "hessian_diag")
def by_double_backward(model, ids, _):
    model.set_attn_implementation("eager")  # the others have no second derivative
    weights = weights_of(model)
    gradients = torch.autograd.grad(losses(model, ids).sum(), weights.values(), create_graph=True)

    def product(signs):
        found = torch.autograd.grad(gradients, weights.values(), signs.values(), retain_graph=True)
        return dict(zip(weights, found, strict=True))

    return mean_of_products(product, signs_of(model))


@way("jvp(grad) of torch.func", "hessian_diag")
def _jvp(model, ids, _):
    model.set_attn_implementation("eager")

    def loss(weights):
        return losses(lambda **inputs: torch.func.functional_call(model, weights, (), inputs), ids).sum()

    def product(signs):
        return torch.func.jvp(torch.func.grad(loss), (weights_of(model),), (signs,))[1]

    return mean_of_products(product, signs_of(model))


@way("vmap(grad) of torch.func", "fisher_diag")
def _vmap(model, ids, _):
    def loss(weights, text):
        return losses(lambda **inputs: torch.func.functional_call(model, weights, (), inputs), text[None]).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights_of(model), ids)
    return {"fisher_diag": {name: gradient.square_().sum(0) for name, gradient in gradients.items()}}


def in_hooks(model, ids, take):
    """By weight, ``take(name, d, x)`` of output gradients and inputs, in a backward that forms no weight's gradient."""
    handles, found = [], {}
    for name, module in modules_of(model).items():

        def after(module, inputs, output, name=f"{name}.weight"):
            output.register_hook(lambda d: found.update({name: take(name, d, inputs[0].detach())}))

        handles.append(module.register_forward_hook(after))
    start = model.get_input_embeddings()(ids).requires_grad_()
    torch.autograd.grad(losses(model, ids, inputs_embeds=start).sum(), start)
    for handle in handles:
        handle.remove()
    return found


def loop_of_products(_, d, x):
    """Squares of one text's gradient after the other's."""
    total = torch.zeros(d.shape[2], x.shape[2])
    for one, other in zip(d, x, strict=True):
        gradient = one.T @ other
        total.addcmul_(gradient, gradient)
    return total


@way("loop of products in hooks", "fisher_diag")
def _loop(model, ids, _):
    return {"fisher_diag": in_hooks(model, ids, loop_of_products)}


@way("products in hooks", "kfac")
def grams_in_hooks(model, ids, _):
    pairs = in_hooks(model, ids, lambda _, d, x: [rows.T @ rows for rows in (x.flatten(0, 1), d.flatten(0, 1))])
    return pairs_by_weight(GRAMS, pairs)


@way("loop of products in hooks", "ekfac")
def _rotated(model, ids, _):
    grams = grams_in_hooks(model, ids, _)
    u, v = ({name: torch.linalg.eigh(gram)[1] for name, gram in grams[factor].items()} for factor in GRAMS)
    found = in_hooks(model, ids, lambda name, d, x: loop_of_products(name, d @ v[name], x @ u[name]))
    return {"input_basis": u, "output_basis": v, "ekfac": found}


@way("BackPACK", "fisher_diag", package="backpack-for-pytorch")
def _backpack(model, ids, _):
    from backpack import backpack, extend
    from backpack.extensions import SumGradSquared

    for module in modules_of(model).values():
        extend(module)
    with backpack(SumGradSquared()):
        losses(model, ids).sum().backward()
    return {"fisher_diag": {name: vars(weight).pop("sum_grad_squared") for name, weight in weights_of(model).items()}}


@way("Opacus", "fisher_diag", package="opacus")
def _opacus(model, ids, _):
    from opacus import GradSampleModule

    wrapped = GradSampleModule(Calling(losses, model).train(), loss_reduction="sum")  # in eval mode it takes nothing
    wrapped(ids).sum().backward()
    found = {name: weight.grad_sample.square_().sum(0) for name, weight in weights_of(model).items()}
    wrapped.to_standard_module()
    return {"fisher_diag": found}


@way("Laplace", "fisher_diag", package="laplace-torch")
def _laplace(model, ids, _):
    from laplace.curvature import CurvlinopsEF

    backend = CurvlinopsEF(Calling(losses, model), "classification")
    backend.lossfunc = Calling(lambda _, losses, labels: losses.sum(), None)
    return {"fisher_diag": split(model, backend.diag(ids, ids)[1])}


@way("nngeometry", *FIRST_ORDER, package="nngeometry")
def _nngeometry(model, ids, quantity):
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.object import PMatDiag, PMatEKFAC, PMatKFAC

    layers, start = LayerCollection(), model.get_input_embeddings()(ids).detach()
    for module in modules_of(model).values():
        layers.add_layer_from_model(model, module)
    to_backend, to_matrix = {"layer_collection": layers}, {}
    if "layer_collection" not in inspect.signature(TorchHooksJacobianBackend).parameters:  # after 0.4
        to_backend, to_matrix = to_matrix, to_backend
    texts = DataLoader(TensorDataset(start, ids), batch_size=len(ids))
    backend = TorchHooksJacobianBackend(
        model=model, function=lambda start, ids: losses(model, ids, inputs_embeds=start)[:, None], **to_backend
    )
    kind = {"fisher_diag": PMatDiag, "kfac": PMatKFAC, "ekfac": PMatEKFAC}[quantity]
    matrix, n = kind(generator=backend, examples=texts, **to_matrix), len(ids)  # it gives means over texts
    if quantity == "fisher_diag":
        return {quantity: split(model, matrix.get_diag() * n)}
    if quantity == "kfac":
        return pairs_by_weight(GRAMS, {f"{name}.weight": (x * n, d * n) for name, (x, d) in matrix.data.items()})
    matrix.update_diag(texts)
    bases, diagonals = matrix.data
    bases = pairs_by_weight(BASES, {f"{name}.weight": pair for name, pair in bases.items()})
    return {**bases, quantity: split(model, torch.cat([of.flatten() for of in diagonals.values()]) * n)}


@cache
def _prepared_for_kronfluence(model):
    """Its task, and the model with its modules around ours, for good."""
    from kronfluence.analyzer import prepare_model
    from kronfluence.task import Task

    names = list(modules_of(model))

    class LossOfTexts(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return losses(model, batch).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return names

    return LossOfTexts(), prepare_model(model, LossOfTexts())


@way("kronfluence", *FIRST_ORDER, package="kronfluence")
def _kronfluence(model, ids, quantity):
    from kronfluence.arguments import FactorArguments
    from kronfluence.factor import covariance, eigen
    from kronfluence.utils.state import State

    task, prepared = _prepared_for_kronfluence(model)
    strategy = "diagonal" if quantity == "fisher_diag" else quantity
    how = FactorArguments(strategy, use_empirical_fisher=True, eigendecomposition_dtype=torch.float32)
    given = {"model": prepared, "state": State(cpu=True), "factor_args": how, "disable_tqdm": True}
    data = {"task": task, "loader": DataLoader(ids, batch_size=len(ids))}
    found = {}  # what its Analyzer does, without the files in between
    if quantity != "fisher_diag":
        found = covariance.fit_covariance_matrices_with_loader(**given, **data)[1]
    if quantity == "ekfac":
        found = eigen.perform_eigendecomposition(found, **given)
    if quantity != "kfac":
        found |= eigen.fit_lambda_matrices_with_loader(**given, **data, eigen_factors=found or None)[1]
    grams = {"input_gram": "activation_covariance", "output_gram": "gradient_covariance"}
    bases = {"input_basis": "activation_eigenvectors", "output_basis": "gradient_eigenvectors"}
    return by_weight(model, found, **grams, **bases, **{} if quantity == "kfac" else {quantity: "lambda_matrix"})


@way("curvlinops", *WAYS, package="curvlinops-for-pytorch")
def _curvlinops(model, ids, quantity):
    from curvlinops import EKFACLinearOperator, HessianLinearOperator, KFACLinearOperator

    if quantity == "fisher_diag":
        raise NotImplementedError("it multiplies by the empirical Fisher, and has no diagonal of it")
    logits = Calling(lambda model, ids: model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1), model)
    terms, data = ids.shape[1] - 1, [(ids, ids[:, 1:].flatten())]
    if quantity == "hessian_diag":
        model.set_attn_implementation("eager")
        weights = list(weights_of(model).values())
        loss = nn.CrossEntropyLoss(reduction="sum")
        hessian = HessianLinearOperator(logits, loss, weights, data, check_deterministic=False, num_data=len(ids))
        flat = [torch.cat([v.flatten() for v in signs.values()]) for signs in signs_of(model)]
        return {quantity: split(model, sum(v * (hessian @ v) for v in flat) / len(flat) / terms)}
    matrix = {"kfac": KFACLinearOperator, "ekfac": EKFACLinearOperator}[quantity](
        logits, nn.CrossEntropyLoss(reduction="sum"), list(weights_of(model).values()), data, fisher_type="empirical",
        check_deterministic=False, num_data=len(ids), num_per_example_loss_terms=terms,
    )  # fmt: skip
    matrix.compute_kronecker_factors()
    if quantity == "ekfac":
        matrix.compute_eigenvalue_correction()
    found = matrix.state_dict()
    for scale, its in ((ids.numel(), "input_covariances"), (terms**-2, "gradient_covariances")):
        found[its] = {name: gram * scale for name, gram in found[its].items()}  # of token means, of token sums
    squares = found.get("corrected_eigenvalues", {}).items()
    found["ekfac"] = {name: next(iter(of.values())) * terms**-2 for name, of in squares}
    grams = {"input_gram": "input_covariances", "output_gram": "gradient_covariances"}
    bases = {"input_basis": "input_covariances_eigenvectors", "output_basis": "gradient_covariances_eigenvectors"}
    return by_weight(model, found, "model.", ekfac="ekfac", **grams, **bases)
