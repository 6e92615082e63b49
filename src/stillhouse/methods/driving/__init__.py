"""Driving: detection and representations of street scenes from LiDAR and cameras."""
