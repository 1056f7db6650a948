"""Image-text samples, and statistics collected by running a program on them."""
