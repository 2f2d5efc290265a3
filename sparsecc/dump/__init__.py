"""Programs on disk: every stage of a compile, in every format."""
