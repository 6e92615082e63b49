"""Kinds of teachers: live modules, stores, functions, endpoints."""
