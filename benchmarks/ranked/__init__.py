"""A frozen table of stand-alone trained networks of GLiT's space, for judging changes to the supernet."""
