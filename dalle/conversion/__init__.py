"""Weights of other projects as models of this one: their files are read without running code from them."""
