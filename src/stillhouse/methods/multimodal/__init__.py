"""Distillation across modalities and sensors."""
