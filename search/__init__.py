"""Search for architectures: search spaces, supernets, search methods, fitness measures, and whole searches.

Imported as `glit_models.search`. It builds on `glit_models`, which never imports it, and not on `glit_models.export`.
"""

from .again import search_again
from .ask_tell import Search
from .budget import Budget, extremes, macs_budget, params_budget
from .budget_sampler import BudgetSampler
from .candidates import Candidate
from .choices import BlockChoices
from .correlation import Correlation, kendall
from .evolution import METHODS, AutoFormerEvolution, Evolution, RandomSearch
from .evolution_config import EvolutionConfig
from .executors import EXECUTORS, Executor
from .extract import Extracted, extract_networks
from .fitness import FITNESSES, Fitness, Setting
from .latency import latency_budget
from .named_spaces import (
    NAMED_SPACES,
    autoformer,
    autoformer_base,
    autoformer_small,
    autoformer_tiny,
    glit,
    glit_conv2d,
    glit_released,
    glit_window,
    global_only,
    load_space,
)
from .nsga2 import Nsga2
from .pipeline import SearchRun
from .plan import SearchPlan, plan_search
from .rank import rank_networks
from .ranking import Ranking
from .recipe import SearchRecipe, load_search_recipe, shipped_search_recipes
from .report import write_report
from .space import SearchSpace
from .supernet import Supernet
from .transform import LearnedTransformation, Transformation
from .worker import open_executor

__all__ = [
    "EXECUTORS",
    "FITNESSES",
    "METHODS",
    "NAMED_SPACES",
    "AutoFormerEvolution",
    "BlockChoices",
    "Budget",
    "BudgetSampler",
    "Candidate",
    "Correlation",
    "Evolution",
    "EvolutionConfig",
    "Executor",
    "Extracted",
    "Fitness",
    "LearnedTransformation",
    "Nsga2",
    "RandomSearch",
    "Ranking",
    "Search",
    "SearchPlan",
    "SearchRecipe",
    "SearchRun",
    "SearchSpace",
    "Setting",
    "Supernet",
    "Transformation",
    "autoformer",
    "autoformer_base",
    "autoformer_small",
    "autoformer_tiny",
    "extract_networks",
    "extremes",
    "glit",
    "glit_conv2d",
    "glit_released",
    "glit_window",
    "global_only",
    "kendall",
    "latency_budget",
    "load_search_recipe",
    "load_space",
    "macs_budget",
    "open_executor",
    "params_budget",
    "plan_search",
    "rank_networks",
    "search_again",
    "shipped_search_recipes",
    "write_report",
]
