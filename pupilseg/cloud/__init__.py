"""Training on Modal."""
