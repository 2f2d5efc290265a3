"""How a rewritten region becomes a kernel. Today every region runs by its ATen meaning, through Inductor."""
