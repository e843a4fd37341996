"""A frozen table of networks of GLiT's space, each trained by itself: what ideas about the supernet are judged by."""
