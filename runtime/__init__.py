"""What runs at call time: folded weights that are kept fresh."""
