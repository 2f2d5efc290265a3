"""What was done to a model: the data (``model``), for the terminal (``text``), as a page (``page``)."""
