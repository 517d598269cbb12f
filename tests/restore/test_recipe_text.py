import pytest
import yaml
from test_cli import run

from curvkern.methods import REGISTRY, MethodError, get, make
from curvkern.restore.evidence import looked_at
from curvkern.restore.recipe import CHECKPOINTS, DATA, read_recipe
from curvkern.restore.recipe_text import recipe_text


@pytest.mark.parametrize("name", REGISTRY)
def test_every_methods_recipe_is_read_back(tmp_path, name):
    (tmp_path / "recipe.yaml").write_text(recipe_text(name))
    recipe = read_recipe(tmp_path / "recipe.yaml", {})
    method = make(name, {})
    assert recipe.method == name
    assert make(name, recipe.parameters) == method
    assert set(recipe.parameters) == set(get(name).model_fields)
    assert {role for role in (*CHECKPOINTS, *DATA) if getattr(recipe, role)} == looked_at(method) - {"model"}


def test_descriptions_and_limits_stand_above_their_parameter():
    text = recipe_text("gradient_rollback")
    assert "  # share of all decoder parameters to reset in a step; number > 0, <= 1\n  rate: 0.002\n" in text
    assert "  # one of strict, exact_k\n  ties: strict\n" in text
    assert "; integer >= 128, a multiple of 128\n  block: 2048\n" in recipe_text("safe_delta")
    assert "; number or null\n  threshold: null\n" in recipe_text("splora")


def test_what_a_parameter_may_ask_for_is_hinted_at():
    assert "Other parameters may need more inputs" in recipe_text("merge")
    assert "Other parameters may need more inputs" not in recipe_text("lox")


def test_unknown_method():
    with pytest.raises(MethodError, match="Did you mean 'budgeted'"):
        recipe_text("budgetted")


def test_command_prints_it():
    done = run("recipe", "lox")
    assert (done.returncode, done.stdout) == (0, recipe_text("lox")), done.stderr
    assert yaml.safe_load(done.stdout)["parameters"] == {"rank": 64, "alpha": 1.0}
