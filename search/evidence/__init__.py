"""Evidence of how far a search can be trusted: rank correlations, trained networks to compare with, the control."""
