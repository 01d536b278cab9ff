"""Web frameworks: requests and what became of them, recorded without a call in each handler."""
