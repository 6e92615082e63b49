"""Procedures that take a Job and are shared by methods."""
