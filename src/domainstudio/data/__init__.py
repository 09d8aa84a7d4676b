"""The user's few pictures: checking them, reading them, and the examples that come with the library."""
