"""Stages of one's own, reached by dotted names: what the tests of store, stage and command line run."""
