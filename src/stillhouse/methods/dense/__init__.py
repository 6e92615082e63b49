"""Dense prediction: super-resolution, segmentation, detection."""
