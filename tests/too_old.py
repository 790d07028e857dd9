"""A server that is older than pgchan supports, refused with one sentence at every way in. Run by versions.py alone:
a server of that age is not where `make test` runs."""
