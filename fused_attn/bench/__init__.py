"""Measuring: blocks, whole models and the attention tax, against eager and torch.compile in one run."""
