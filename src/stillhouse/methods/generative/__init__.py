"""Methods that distil or change models that make images or scenes."""
