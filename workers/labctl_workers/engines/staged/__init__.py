"""A model of transformers cut into stages, one on each GPU: captured, and compiled where that is asked for."""
