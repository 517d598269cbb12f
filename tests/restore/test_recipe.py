from pathlib import Path

import pytest

from curvkern.restore import RecipeError, make_recipe, read_recipe

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
        ("aligned: a\ntuned: [", r":2: not valid YAML"),
        ("aligned: a\n b: c\n", r":2: not valid YAML: mapping values are not allowed here"),
        ("aligned: \x01", ": not valid YAML"),
        ("aligned: a\nparameters: [weight, 0.1]", r":2: parameters is \['weight', 0.1\]; wanted a mapping"),
        ("# numbers\n1: a", ":2: unknown entry '1'"),
        ("- aligned", ": wanted a mapping"),
        ("", ": wanted a mapping"),
        (RECIPE + "methods: x", ":9: unknown entry 'methods'.*Did you mean 'method'"),
        ("aligned: a\ntuned: t\nout: o", ": method is missing"),
        (RECIPE + "save: zip", ":9: save is 'zip'"),
        (RECIPE + "include:\n- 3", ":9: include.0 is 3"),
        (RECIPE.replace("parameters:\n  weight: 0.25", "parameters: 3"), ":6: parameters"),
        (RECIPE.replace("merge", "merg"), ":5: unknown method 'merg'.*Did you mean 'merge'"),
        (RECIPE.replace("weight", "wait"), ":7: merge: unknown parameter 'wait'.*Did you mean 'weight'"),
        (RECIPE.replace("0.25", "3"), ":7: merge: weight is 3"),
    ],
)
def test_bad_recipes_name_file_line_and_entry(tmp_path, text, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=r"recipe\.yaml" + message):
        read_recipe(path, {})


def test_what_an_option_overrides_has_no_line(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    with pytest.raises(RecipeError, match=r"recipe\.yaml: save is 'zip'"):
        read_recipe(path, {"save": "zip"})
    with pytest.raises(RecipeError, match=r"recipe\.yaml: merge: weight is 3"):
        read_recipe(path, {"parameters": {"weight": 3}})


def test_a_recipe_may_refer_to_itself_and_is_refused(tmp_path):
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("0.25", "&loop [*loop]"))
    with pytest.raises(RecipeError, match=r"recipe\.yaml:7: merge: weight is"):
        read_recipe(tmp_path / "recipe.yaml", {})


def test_missing_file():
    with pytest.raises(RecipeError, match=r"nowhere\.yaml: cannot be read"):
        read_recipe(Path("nowhere.yaml"), {})


def test_values_are_checked():
    with pytest.raises(RecipeError, match="restore: aligned is missing"):
        make_recipe({"tuned": "t"})
