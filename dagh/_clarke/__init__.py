"""Limiting Hessians at kinks: which branches meet at a point, and what to make of their Hessians."""
