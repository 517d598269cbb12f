"""The restoration pass: from a recipe to a checkpoint, weights streamed, models in memory or layer by layer."""

from curvkern.restore.recipe import Recipe, RecipeError, each_method, make_recipe, read_recipe
from curvkern.restore.run import restore, run_recipe, run_recipes
from curvkern.restore.scope import RestoreError

__all__ = [
    "Recipe",
    "RecipeError",
    "RestoreError",
    "each_method",
    "make_recipe",
    "read_recipe",
    "restore",
    "run_recipe",
    "run_recipes",
]
