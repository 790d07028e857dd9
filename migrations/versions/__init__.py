"""The revisions, oldest first: each with its own frozen SQL, which never changes once it was released."""
