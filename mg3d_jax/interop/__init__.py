"""Weights in and out: Hugging Face BERT, MONAI ViT, and our own PyTorch module."""
