"""The tables; files here that register one with `registry.table` are found automatically."""
