"""Search for architectures: search spaces, supernets, search methods, fitness measures, and whole searches.

Imported as `glit_models.search`. It builds on `glit_models`, which never imports it, and not on `glit_models.export`.
"""

from .evidence.correlation import Correlation, kendall
from .evidence.ranking import Ranking
from .evidence.table import NetworkTable
from .executors import EXECUTORS, Executor
from .fitness import FITNESSES, Fitness, Setting
from .methods.ask_tell import Search
from .methods.candidates import Candidate
from .methods.config import EvolutionConfig
from .methods.evolution import METHODS, AutoFormerEvolution, Evolution, RandomSearch
from .methods.nsga2 import Nsga2
from .methods.transform import LearnedTransformation, Transformation
from .recipe import SearchRecipe, load_search_recipe, shipped_search_recipes
from .report.page import write_report
from .run.again import search_again
from .run.extract import Extracted, extract_networks
from .run.pipeline import SearchRun
from .run.plan import SearchPlan, plan_search
from .run.rank import rank_networks
from .run.worker import open_executor
from .spaces.budget import Budget, extremes, macs_budget, params_budget
from .spaces.budget_sampler import BudgetSampler
from .spaces.choices import BlockChoices
from .spaces.latency import latency_budget
from .spaces.named import (
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
    vitas,
)
from .spaces.space import SearchSpace
from .supernets.supernet import Supernet

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
    "NetworkTable",
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
    "vitas",
    "write_report",
]
