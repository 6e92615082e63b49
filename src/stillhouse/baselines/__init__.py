"""What claims are measured against; catalogue entries like methods."""
