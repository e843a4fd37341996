"""A GLiT model turned into something that runs without this repository: ONNX, quantised, served.

Imported as `glit_models.export`. It builds on the zoo, which never imports it; it never imports `glit_models.search`.
"""
