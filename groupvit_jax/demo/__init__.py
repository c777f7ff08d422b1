"""A page on which people drop an image, type class names and see the segments; needs requirements-demo.txt."""
