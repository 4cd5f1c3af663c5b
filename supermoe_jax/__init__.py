"""Universal user representations with a sparse Mixture-of-Experts transformer."""
