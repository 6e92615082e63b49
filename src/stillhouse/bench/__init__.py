"""Methods and their baselines side by side over seeds: statistics, claims, results."""
