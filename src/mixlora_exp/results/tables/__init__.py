"""The tables: each file here that registers one (`registry.table`) is found by itself."""
