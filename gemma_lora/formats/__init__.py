"""Above the model: how an adapter or a tuned model leaves, and comes back."""
