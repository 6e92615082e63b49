"""Figures that the ecosystem's metric libraries do not have, and the few every report needs."""
