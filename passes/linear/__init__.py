"""The algebra of linear maps: products of weights, unread rows, equal branches, constants in biases."""
