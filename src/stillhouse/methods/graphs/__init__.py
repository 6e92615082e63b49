"""Distillation of graph neural networks."""
