"""Pure functions of tensors, by kind of knowledge: student first, then teacher, then target."""
