"""One file per paper, in rooms by what is distilled."""
