"""Nothing is looked up."""
