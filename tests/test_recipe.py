from pathlib import Path

import pytest

from curvkern.recipe import RecipeError, make_recipe, read_recipe

RECIPE = """
aligned: a
tuned: t
out: o
method: merge
parameters:
  weight: 0.25
exclude: ["*.q_proj.weight"]
"""


def test_file_and_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    recipe = read_recipe(path, {"out": Path("elsewhere"), "parameters": {"weight": 0.5}})
    assert (recipe.out, recipe.parameters, recipe.exclude) == (Path("elsewhere"), {"weight": 0.5}, ("*.q_proj.weight",))
    assert read_recipe(path, {}).parameters == {"weight": 0.25}
    assert "out" not in recipe.record()


@pytest.mark.parametrize(
    "text, message",
    [
        ("aligned: a\ntuned: [", r":\d+: not valid YAML"),
        ("aligned: \x01", "not valid YAML"),
        ("aligned: a\nparameters: [weight, 0.1]", r"parameters is \['weight', 0.1\]; wanted a mapping"),
        ("1: a", "unknown entry '1'"),
        ("- aligned", "wanted a mapping"),
        (RECIPE + "methods: x", "unknown entry 'methods'.*Did you mean 'method'"),
        ("aligned: a\ntuned: t\nout: o", "method is missing"),
        (RECIPE + "save: zip", "save is 'zip'"),
        (RECIPE.replace("parameters:\n  weight: 0.25", "parameters: 3"), "parameters"),
    ],
)
def test_bad_recipes_name_file_and_entry(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml.*" + message):
        read_recipe(path, {})


def test_missing_file():
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read"):
        read_recipe(Path("nowhere.yaml"), {})


def test_values_are_checked():
    with pytest.raises(RecipeError, match="restore: aligned is missing"):
        make_recipe({"tuned": "t"})
