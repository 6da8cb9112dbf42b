"""The models of the paper with their configurations, and the files that store them."""
