"""Features to trained heads."""
