"""Images to features, and the store that holds them."""
