"""The benchmark suite: cases shared with the tests."""
