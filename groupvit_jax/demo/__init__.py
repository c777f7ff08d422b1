"""A page on which anyone can drop a picture, type words and see the segments; needs requirements-demo.txt."""
