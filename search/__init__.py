"""How GLiT architectures are found: spaces, supernet, evolution, the two-stage pipeline.

Imported as `glit_models.search`. It builds on the zoo, which never imports it; it never imports `glit_models.export`.
"""

from .ask_tell import EvolutionConfig, Search
from .budget import Budget, extremes, macs_budget, params_budget
from .budget_sampler import BudgetSampler
from .candidates import Candidate
from .choices import BlockChoices
from .correlation import Correlation, kendall, spearman
from .evolution import SEARCHES, Evolution, RandomSearch
from .latency import latency_budget
from .named_spaces import NAMED_SPACES, glit, glit_released, global_only, load_space
from .pipeline import SearchRun
from .rank import Ranking, rank_networks
from .recipe import SearchRecipe, load_search_recipe, shipped_search_recipes
from .report import write_report
from .space import LowLevel, SearchSpace
from .supernet import Supernet

__all__ = [
    "NAMED_SPACES",
    "SEARCHES",
    "BlockChoices",
    "Budget",
    "BudgetSampler",
    "Candidate",
    "Correlation",
    "Evolution",
    "EvolutionConfig",
    "LowLevel",
    "RandomSearch",
    "Ranking",
    "Search",
    "SearchRecipe",
    "SearchRun",
    "SearchSpace",
    "Supernet",
    "extremes",
    "glit",
    "glit_released",
    "global_only",
    "kendall",
    "latency_budget",
    "load_search_recipe",
    "load_space",
    "macs_budget",
    "params_budget",
    "rank_networks",
    "shipped_search_recipes",
    "spearman",
    "write_report",
]
