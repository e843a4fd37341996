"""Search spaces: the choices of each block, the networks they make, and budgets on their costs."""
