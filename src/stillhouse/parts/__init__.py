"""Stateful blocks and machinery that methods share."""
