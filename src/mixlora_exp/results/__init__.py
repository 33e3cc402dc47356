"""Evaluation of records: comparisons, tables, figures and the report."""

from __future__ import annotations
