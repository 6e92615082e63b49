"""Distillation for image classification."""
