"""Methods that distil what finds and ranks texts."""
