"""The PyTorch module that `mg3d export` copies beside the weights. It needs torch and transformers, not JAX."""
