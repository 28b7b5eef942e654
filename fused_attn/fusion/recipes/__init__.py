"""What a block is, and what it runs then: nothing here looks at anybody's code."""
