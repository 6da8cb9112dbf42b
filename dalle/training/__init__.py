"""Training of the dVAE, its decoder, the prior and CLIP."""
