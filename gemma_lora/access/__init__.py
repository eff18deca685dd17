"""Below the model: how a name becomes files, and whose token opens them."""
