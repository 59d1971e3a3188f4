"""A bundle on images."""
