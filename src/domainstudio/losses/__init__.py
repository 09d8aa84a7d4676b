"""The losses as pure, vectorised functions of tensors."""
