"""How GLiT architectures are found: spaces, supernet, evolution, the two-stage pipeline.

Imported as `glit_models.search`. It builds on the zoo, which never imports it; it never imports `glit_models.export`.
"""
