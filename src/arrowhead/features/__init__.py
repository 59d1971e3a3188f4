"""Images to features, and the store that keeps them."""
