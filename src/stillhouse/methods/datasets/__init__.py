"""Distillation of data sets."""
