"""The objective, the methods that fill it in, and the one loop that minimises it."""
