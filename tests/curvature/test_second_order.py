"""Hessians, eigenbases, kept gradients and influence against autograd in float64; stopping and going on."""

import pytest
import torch
from oracles import close, make, sample_gradients, texts
from torch.nn.functional import cross_entropy

from curvkern.curvature import KINDS, CurvatureError, Statistics, estimate, influence

ONE = ["*layers.0.mlp.up_proj.weight"]


def exact_hessian(model, rows, name):
    """Of the sum of the rows' mean losses by one parameter, in float64, entry by entry."""
    from copy import deepcopy

    exact = deepcopy(model).double().eval()
    exact.set_attn_implementation("eager")
    weight = exact.get_parameter(name)

    def loss(flat):
        total = 0
        for row in rows:
            logits = torch.func.functional_call(
                exact, {name: flat.view_as(weight)}, kwargs={"input_ids": torch.tensor([row.ids])}
            ).logits[0, :-1]
            kept = torch.tensor(row.labels[1:]) != -100
            total = total + cross_entropy(logits[kept], torch.tensor(row.labels[1:])[kept])
        return total

    return torch.autograd.functional.hessian(loss, weight.detach().flatten(), vectorize=True)


def test_the_hessians_diagonal_lies_within_the_error_of_its_probes():
    model, rows = make("llama"), texts((5, 6))
    found = estimate(model, rows, quantity="hessian_diag", probes=400, include=ONE)
    (name,) = found["hessian_diag"]
    hessian = exact_hessian(model, rows, name)
    got = found["hessian_diag"][name].flatten().double()
    error = ((hessian.square().sum(1) - hessian.diagonal().square()) / 400).sqrt()  # of a mean of 400
    far = (got - hessian.diagonal()).abs() / error.clamp(min=1e-12)
    assert far.max() < 5
    assert (far < 2).double().mean() > 0.9
    trace, spread = found.trace_error()[name]
    assert abs(trace * 2 - hessian.trace()) < 4 * spread * 2
    assert 0.5 < spread * 2 / float((2 * (hessian.square().sum() - hessian.diagonal().square().sum()) / 400).sqrt()) < 2


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral", "mixtral", "qwen3-moe", "gpt2"])
def test_probes_do_not_depend_on_batches(kind):
    model, rows = make(kind), texts()
    one = estimate(model, rows, quantity="hessian_diag", probes=2, batch_tokens=1)
    other = estimate(model, rows, quantity="hessian_diag", probes=2, batch_tokens=1000)
    fisher = estimate(model, rows, quantity="fisher_diag")
    assert set(one["hessian_diag"]) == set(fisher["fisher_diag"])
    for name, tensor in one["hessian_diag"].items():
        scale = float(tensor.abs().max())
        torch.testing.assert_close(other["hessian_diag"][name], tensor, rtol=1e-3, atol=1e-5 * scale)
    assert all(p.grad is None for p in model.parameters())


def test_ekfac_is_the_fisher_in_the_eigenbasis_and_nearer_than_kfac():
    model, rows = make("llama"), texts()
    found = estimate(model, rows, quantity=("kfac", "ekfac", "fisher_diag"), include=ONE)
    (name,) = found["ekfac"]
    grads = sample_gradients(model, rows)[name]
    left, right = (found[basis][name].double() for basis in ("output_basis", "input_basis"))
    close(found["ekfac"][name], (left.T @ grads @ right).square().sum(0))
    fisher = torch.einsum("nab,ncd->abcd", grads, grads).flatten(0, 1).flatten(1)

    def error(values):
        basis = torch.kron(left, right)
        return float((basis @ torch.diag(values.flatten().double()) @ basis.T - fisher).norm())

    a, s = (found[gram][name].double() for gram in ("input_gram", "output_gram"))
    kron = torch.outer((left.T @ s @ left).diagonal(), (right.T @ a @ right).diagonal())
    best = kron * float((kron * found["ekfac"][name]).sum() / kron.square().sum())  # K-FAC's values at their best scale
    assert error(found["ekfac"][name]) < error(best)
    assert float((left.T @ left - torch.eye(len(left))).abs().max()) < 1e-5


def test_ekfac_of_fused_experts_uses_each_experts_basis():
    model, rows = make("mixtral"), texts()
    found = estimate(model, rows, quantity=("ekfac", "fisher_diag"), include=["*layers.0*experts.down_proj"])
    (name,) = found["ekfac"]
    grads = sample_gradients(model, rows)[name]
    left, right = (found[basis][name].double() for basis in ("output_basis", "input_basis"))
    rotated = left.mT @ grads @ right
    close(found["ekfac"][name], rotated.square().sum(0))
    assert "input_gram" not in found.sums


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
def test_kept_gradients_are_the_samples(kind):
    model, rows = make(kind), texts()
    found = estimate(model, rows, quantity=("low_rank", "gradient"), batch_tokens=20)
    exact = sample_gradients(model, rows)
    for name, grads in found["low_rank"].items():
        assert grads.dtype == torch.bfloat16
        torch.testing.assert_close(grads.double(), exact[name], rtol=1e-2, atol=1e-2 * float(exact[name].abs().max()))


def test_gauss_newton_is_the_exact_matrix_diagonal():
    """J^T H J of the summed loss by one weight, H the Hessian of the loss by the logits."""
    model, rows = make("llama", vocab_size=12), texts((4, 5), 12)
    options = {"fisher_type": "type-2", "loss": "token_sum", "include": ONE}
    found = estimate(model, rows, quantity="gauss_newton_diag", **options)["gauss_newton_diag"]
    (name,) = found
    from copy import deepcopy

    exact = deepcopy(model).double().eval()
    weight = exact.get_parameter(name)
    total = torch.zeros(weight.numel(), dtype=torch.float64)
    for row in rows:
        kept = torch.tensor(row.labels[1:]) != -100

        def logits(flat, row=row, kept=kept):
            out = torch.func.functional_call(
                exact, {name: flat.view_as(weight)}, kwargs={"input_ids": torch.tensor([row.ids])}
            )
            return out.logits[0, :-1][kept]

        jacobian = torch.autograd.functional.jacobian(logits, weight.detach().flatten())
        shares = logits(weight.detach().flatten()).softmax(-1)
        curvature = torch.diag_embed(shares) - shares[..., None] * shares[:, None]
        total += torch.einsum("tvp,tvw,twp->p", jacobian, curvature, jacobian)
    close(found[name].flatten(), total.detach())


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3-moe"])
def test_influence_is_the_inner_product_of_gradients(kind):
    model = make(kind)
    data, queries = texts((7, 12, 3)), texts((6, 5))
    got = influence(model, data, queries, batch_tokens=13)
    names = [n for n in estimate(model, data, quantity="fisher_diag")["fisher_diag"] if not n.endswith("bias")]
    one, other = (sample_gradients(model, rows) for rows in (data, queries))
    exact = sum(torch.einsum("n...,m...->nm", one[n], other[n]) for n in names)
    close(got, exact)


def test_stopped_and_resumed_is_as_if_undisturbed(tmp_path):
    model, rows = make("mixtral"), texts()
    wanted = ("fisher_diag", "gradient", "kfac", "sample_norms", "low_rank")
    options = {"quantity": wanted, "fisher_type": "mc", "mc_samples": 2, "batch_tokens": 13}
    whole = estimate(model, rows, **options)
    part = estimate(model, rows, stop=lambda: True, **options)
    assert 0 < part.counts.rows < len(rows)
    part.save(tmp_path / "part.safetensors")
    resumed = estimate(model, rows, resume=Statistics.load(tmp_path / "part.safetensors"), **options)
    assert resumed.counts == whole.counts
    for quantity, of in whole.sums.items():
        for name, tensor in of.items():
            close(resumed[quantity][name], tensor.double())


def test_what_is_complete_when_stopped_is_kept():
    model, rows = make("llama"), texts()

    def after(batches):
        asked = []
        return lambda: asked.append(1) or len(asked) == batches

    with pytest.warns(UserWarning, match="stopped before ekfac, input_basis, output_basis was complete"):
        found = estimate(model, rows, quantity=("kfac", "ekfac"), stop=after(6), batch_tokens=1)
    whole = estimate(model, rows, quantity="kfac", batch_tokens=1)
    assert set(found.sums) == {"input_gram", "output_gram"}
    assert found.counts == whole.counts
    with pytest.warns(UserWarning, match="stopped before hessian_diag, hessian_trace was complete"):
        found = estimate(model, rows, quantity=("hessian_diag", "fisher_diag"), stop=after(2), batch_tokens=1)
    assert (set(found.sums), found.counts.rows) == ({"fisher_diag"}, 2)
    with pytest.raises(CurvatureError, match="stopped before anything of ekfac was complete"):
        estimate(model, rows, quantity="ekfac", stop=after(1), batch_tokens=1)


@pytest.mark.parametrize("kind", ["llama", "gemma2"])  # the choice of experts has no derivative
def test_differences_of_gradients_are_nearly_the_exact_products(kind):
    model, rows = make(kind), texts()
    before = {name: p.clone() for name, p in model.named_parameters()}
    options = {"quantity": "hessian_diag", "probes": 2, "kinds": KINDS, "include": ["*"]}
    exact, near = (estimate(model, rows, hvp=hvp, **options)["hessian_diag"] for hvp in ("exact", "difference"))
    assert set(exact) == set(near)
    apart, whole = (sum(float(f(exact[n], near[n]).square().sum()) for n in exact) for f in (torch.sub, torch.add))
    assert apart < 1e-4 * whole
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 1}, "cannot resume: seed was 0, is 1"),
        ({"sample": "token"}, "cannot resume: sample was 'sequence', is 'token'"),
        ({"quantity": "ekfac"}, "'ekfac' needs all data at once"),
        ({"quantity": "gradient"}, "cannot resume: there is fisher_diag, asked for is gradient"),
    ],
)
def test_what_cannot_be_resumed_is_told(changes, message):
    model, rows = make("llama"), texts()
    part = estimate(model, rows, stop=lambda: True, batch_tokens=1)
    with pytest.raises(CurvatureError, match=message):
        estimate(model, rows, resume=part, batch_tokens=1, **changes)
    with pytest.raises(CurvatureError, match="the first 1 rows are not those"):
        estimate(model, rows[::-1], resume=part)
    whole = estimate(model, rows)
    with pytest.raises(CurvatureError, match="all 4 rows are done"):
        estimate(model, rows, resume=whole)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantity": "gauss_newton_diag"}, "pass fisher_type='mc' or 'type-2', loss='token_sum'"),
        ({"quantity": "hessian_diag", "fisher_type": "mc"}, "pass fisher_type='empirical'"),
        ({"quantity": "hessian_diag", "probes": 1}, "probes is 1"),
        ({"quantity": ()}, "no quantity"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises((CurvatureError, ValueError), match=message):
        estimate(make("llama"), texts(), **changes)


def test_statistics_of_two_parts_stand_together():
    model, rows = make("llama"), texts()
    wanted = ("sample_norms", "low_rank", "fisher_diag")
    one, other = (estimate(model, part, quantity=wanted) for part in (rows[:1], rows[1:]))
    whole = estimate(model, rows, quantity=wanted)
    both = one + other
    for quantity in wanted:
        for name, tensor in whole[quantity].items():
            torch.testing.assert_close(both[quantity][name], tensor, rtol=1e-4, atol=1e-7)
    with pytest.raises(CurvatureError, match="'sample_norms' is no sum"):
        both.mean("sample_norms")
    ekfac = [estimate(model, part, quantity="ekfac") for part in (rows[:1], rows[1:])]
    with pytest.raises(CurvatureError, match="in two bases"):
        ekfac[0] + ekfac[1]


def test_weights_of_a_lora_adapter_are_linear_modules_too():
    peft = pytest.importorskip("peft")
    rows = texts()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_dropout=0.1)
    model = peft.get_peft_model(make("llama"), config)
    found = estimate(model, rows, quantity=("fisher_diag", "gradient"), include=["*lora_*"])
    exact = sample_gradients(model, rows)
    assert len(found["fisher_diag"]) == 8
    for name, tensor in found["fisher_diag"].items():
        close(tensor, exact[name].square().sum(0))
        close(found["gradient"][name], exact[name].sum(0))


def test_gradients_of_lora_factors_pull_back_that_of_the_weight():
    """s (dB A + B dA) = s^2 (G A^T A + B B^T G), G measured on the merged model."""
    peft = pytest.importorskip("peft")
    rows = texts()
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), config)
    factors = {name: p.detach().double() for name, p in model.named_parameters() if "lora_" in name}
    found = estimate(model, rows, quantity="gradient", include=["*lora_*"])["gradient"]
    merged = estimate(model.merge_and_unload(), rows, quantity="gradient", include=["*q_proj*"])["gradient"]
    for layer in range(2):
        a, b = (next(n for n in found if f"layers.{layer}." in n and side in n) for side in ("lora_A", "lora_B"))
        g = merged[f"model.layers.{layer}.self_attn.q_proj.weight"].double()
        s, A, B = 1.5, factors[a], factors[b]
        close(s * (found[b].double() @ A + B @ found[a].double()), s * s * (g @ A.T @ A + B @ B.T @ g))
