"""Recipes, and the trainer for pretraining, fine-tuning and retraining."""

from .objective import Objective
from .recipe import Recipe, load_recipe, shipped_recipes
from .trainer import Trainee, Trainer

__all__ = ["Objective", "Recipe", "Trainee", "Trainer", "load_recipe", "shipped_recipes"]
