"""How good a model is: reconstructions, losses, retrieval, and whether drawn pictures show what was asked for."""
