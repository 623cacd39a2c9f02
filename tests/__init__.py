"""Tests of dsa-bench; a package, so that no installed package `tests` can hide its modules."""
