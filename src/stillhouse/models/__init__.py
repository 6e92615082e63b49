"""Small reference networks, a file each, and loading of models by id."""
