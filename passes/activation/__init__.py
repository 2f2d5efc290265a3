"""Row by row: activations and norms with statistics of their own, and what stands around them."""
