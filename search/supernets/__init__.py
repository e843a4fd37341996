"""Supernets: shared weights for all networks of a space, their training, and scores of networks with them."""
