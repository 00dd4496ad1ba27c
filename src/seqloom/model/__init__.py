"""Hugging Face models under a plan."""

from seqloom.model.parallelize import parallelize, sum_gradients, token_loss

__all__ = ["parallelize", "sum_gradients", "token_loss"]
