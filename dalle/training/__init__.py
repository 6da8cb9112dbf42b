"""Training of the dVAE and the prior."""
