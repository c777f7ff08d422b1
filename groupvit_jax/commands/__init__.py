"""Commands: train, eval, animate, import, and export with its model card."""
