"""The one loop, and what keeps it safe: stages, checkpoints, log, progress, hardware."""
