"""From a trained model to text that judges compare."""
