"""How a model is changed: its blocks, their parents, what stands around them, and graphs."""
