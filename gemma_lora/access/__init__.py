"""Below the model: whose token is used (kaggle), how a name becomes files (fetch)."""
