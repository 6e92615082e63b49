"""Language: labelling, compression, sequence models."""
