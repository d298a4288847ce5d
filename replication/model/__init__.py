"""The transformer, its experts and its loss: plain torch, knows nothing of Lightning."""
