"""Evaluation of a model: reconstructions, likelihood, retrieval, and whether generated images match their captions."""
