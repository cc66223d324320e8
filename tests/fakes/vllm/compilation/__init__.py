"""Nothing is compiled."""
